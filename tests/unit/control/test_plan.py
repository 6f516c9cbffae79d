"""The decision of the control loop, told as stories: what stands in Serve and what people are told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.unit.control.builders import World, model
from tidegate.control.attempts import FIRST_RETRY_SECONDS
from tidegate.control.desired import WHOLE, revision_of
from tidegate.control.observed import Capacity, ServeState, SourceState
from tidegate.control.plan import PoolPlan
from tidegate.control.reasons import CONDITION_TYPES, Reason
from tidegate.control.rollout import SWITCH_SECONDS
from tidegate.sources.facts import DecoderShape


def standing(plan: PoolPlan) -> list[str]:
    return [application.name for application in plan.applications]


def told(plan: PoolPlan, name: str, kind: str) -> tuple[str, str]:
    found = next(item for item in plan.entries[name].conditions if item.type == kind)
    return found.status, found.reason


class TestComingUp:
    def test_a_new_model_is_built_and_takes_requests_that_wait(self) -> None:
        world = World(model())
        plan = world.step("DEPLOYING")
        assert standing(plan) == [f"one--{revision_of(model().spec)}"]
        entry = plan.entries["one"]
        assert (entry.ready, entry.accepts, entry.reason) == (False, True, "Building")

    def test_ready_needs_the_proof_and_not_serves_word(self) -> None:
        world = World(model(scaling={"minReplicas": 0, "maxReplicas": 1}))
        world.step("RUNNING")
        plan = world.step()
        assert not plan.entries["one"].ready
        assert plan.applications[0].keep_awake
        world.report("one", revision_of(world.models[0].spec))
        plan = world.step()
        assert (plan.entries["one"].ready, plan.entries["one"].reason) == (True, "Asleep")
        assert not plan.applications[0].keep_awake

    def test_a_proof_outlives_the_host(self) -> None:
        world = World(model())
        world.settle("one")
        world.see(serve=ServeState(), replicas=(), reports={})
        plan = world.step("DEPLOYING")
        assert not plan.applications[0].keep_awake
        assert told(plan, "one", "Ready") == ("False", "Waking")

    def test_a_source_is_looked_at_first(self) -> None:
        wanted = model(engine={"name": "transformers"}, source={"uri": "/w"})
        world = World(wanted)
        plan = world.step()
        assert (plan.resolve, standing(plan)) == ((("one", revision_of(wanted.spec)),), [])
        assert plan.entries["one"].precision == ""
        world.source(0, SourceState("resolving"))
        assert told(world.step(), "one", "WeightsAvailable") == ("Unknown", "Resolving")
        world.source(0, SourceState("resolved", "/cache/w", 10, "gptq", "float16"))
        plan = world.step("DEPLOYING")
        assert plan.applications[0].checkpoint == "/cache/w"
        assert (plan.entries["one"].quantization, plan.entries["one"].precision) == ("gptq", "float16")

    @pytest.mark.parametrize(
        ("asked", "found", "task"),
        [("auto", "", "generate"), ("auto", "score", "score"), ("classify", "score", "classify")],
    )
    def test_a_replica_is_told_the_task_that_the_entry_names(self, asked: str, found: str, task: str) -> None:
        world = World(model(engine={"name": "transformers"}, source={"uri": "/w"}, task=asked))
        world.source(0, SourceState("resolved", "/w", 10, "none", "float16", task=found))
        plan = world.step("DEPLOYING")
        assert (plan.applications[0].task, plan.entries["one"].task) == (task, task)

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"contextLength": 129}, "contextLength is 129, but the checkpoint holds 128 positions"),
            ({"quantization": "gptq"}, "quantization is gptq, but the checkpoint is not quantized"),
        ],
    )
    def test_what_a_checkpoint_cannot_give_is_refused_before_a_replica(
        self, asked: dict[str, Any], words: str
    ) -> None:
        world = World(model(engine={"name": "transformers"}, source={"uri": "/w"}, **asked))
        shape = DecoderShape(positions=128)
        world.source(0, SourceState("resolved", "/w", 10, "none", "float16", shape=shape))
        plan = world.step()
        assert standing(plan) == []
        assert told(plan, "one", "WeightsAvailable") == ("False", "InvalidEngineArgs")
        assert words in plan.entries["one"].message

    def test_what_generates_nothing_is_asked_no_probe(self) -> None:
        probed = {"probes": [{"prompt": "a", "expect": "b"}]}
        wanted: dict[str, Any] = {"engine": {"name": "transformers"}, "source": {"uri": "/w"}}
        world = World(model(**wanted, rollout=probed))
        world.source(0, SourceState("resolved", "/w", 10, "none", "float16", task="embed"))
        plan = world.step()
        assert standing(plan) == []
        assert told(plan, "one", "WeightsAvailable") == ("False", "InvalidEngineArgs")
        assert "made to embed: rollout.probes" in plan.entries["one"].message

    def test_a_source_that_is_missing_is_the_models_status(self) -> None:
        world = World(model(engine={"name": "transformers"}, source={"uri": "/w"}))
        world.source(0, SourceState("failed", reason="SourceNotFound", message="There is no folder."))
        plan = world.step()
        entry = plan.entries["one"]
        assert (entry.accepts, entry.reason, entry.message) == (
            False,
            "SourceNotFound",
            "There is no folder.",
        )

    def test_what_cannot_fit_is_said_with_the_sum(self) -> None:
        world = World(
            model(resources={"cpus": 9}),
            model("two", engine={"name": "transformers"}, source={"uri": "/w"}),
        )
        world.see(capacity=Capacity(2, 0, 1 << 30))
        world.source(1, SourceState("resolved", "/w", 3 << 30, "none", "float16"))
        plan = world.step()
        assert told(plan, "one", "Scheduled") == ("False", "TooFewCpus")
        assert "3.00 GiB and the machine has 1.00 GiB" in plan.entries["two"].message
        assert standing(plan) == []


class TestWaves:
    def test_the_first_model_comes_first_and_few_are_built_at_once(self) -> None:
        world = World(*(model(f"m{number}") for number in range(6)))
        plan = world.step("DEPLOYING")
        assert [name.split("--")[0] for name in standing(plan)] == ["m0", "m1", "m2", "m3"]
        assert told(plan, "m5", "Progressing") == ("True", "Queued")
        plan = world.step("DEPLOYING")
        assert len(standing(plan)) == 4
        world.status(standing(plan)[1], "RUNNING")
        assert len(standing(world.step("DEPLOYING"))) == 5

    def test_a_small_machine_takes_one(self) -> None:
        world = World(model("a"), model("b"))
        assert len(standing(world.step("DEPLOYING", wave=1))) == 1

    def test_a_pool_has_an_end(self) -> None:
        world = World(model("a"), model("b"), maxLiveRevisions=1)
        plan = world.step()
        assert len(standing(plan)) == 1
        assert told(plan, "b", "Progressing") == ("True", "PoolFull")


class TestChange:
    def changed(self) -> tuple[World, str, str]:
        world = World(model())
        old = world.settle("one")
        world.models = [model(engine={"name": "simulated", "args": {"seed": 2}})]
        return world, old, revision_of(world.models[0].spec)

    def test_the_new_revision_proves_itself_beside_the_old(self) -> None:
        world, old, new = self.changed()
        plan = world.step("DEPLOYING")
        assert standing(plan) == [f"one--{old}", f"one--{new}"]
        assert plan.entries["one"].revisions == {old: 100}
        assert plan.entries["one"].ready

    def test_it_takes_over_and_the_old_one_drains(self) -> None:
        world, old, new = self.changed()
        world.step("DEPLOYING")
        world.report("one", new)
        world.status(f"one--{new}", "RUNNING")
        plan = world.step()
        assert plan.entries["one"].revisions == {old: 100}, "its replica takes no requests yet"
        assert plan.entries["one"].ready
        world.replica("one", new)
        plan = world.step()
        assert plan.entries["one"].revisions == {new: 100}
        assert plan.entries["one"].ready
        world.depth("one", old, 0, 2)
        world.now += SWITCH_SECONDS
        assert f"one--{old}" in standing(world.step())
        world.depth("one", old, 0, 0)
        plan = world.step()
        assert standing(plan) == [f"one--{new}"]
        assert [key for key, _ in plan.registry.drop] == [("one", old)]

    def test_traffic_comes_first_then_the_newest_then_what_drains(self) -> None:
        world, old, new = self.changed()
        world.step("DEPLOYING")
        world.report("one", new)
        world.step()
        world.depth("one", old, 0, 1)
        world.models = [model(engine={"name": "simulated", "args": {"seed": 3}})]
        third = revision_of(world.models[0].spec)
        assert standing(world.step()) == [f"one--{new}", f"one--{third}", f"one--{old}"]

    def test_where_it_fails_the_old_one_stays_and_the_status_says_why(self) -> None:
        world, old, new = self.changed()
        world.step("DEPLOYING")
        world.report("one", new, proved=False, reason="OutOfMemory", message="No room for the weights.")
        plan = world.step()
        assert standing(plan) == [f"one--{old}"]
        entry = plan.entries["one"]
        assert (entry.revisions, entry.ready) == ({old: 100}, True)
        assert told(plan, "one", "Degraded") == ("True", "RevisionFailed")
        assert "No room for the weights." in next(c for c in entry.conditions if c.type == "Degraded").message

    def test_a_failed_revision_is_tried_again_later_and_later(self) -> None:
        world, _, new = self.changed()
        for failure in range(3):
            world.step("DEPLOYING")
            world.report("one", new, proved=False, reason="X", message="y")
            plan = world.step()
            assert plan.next_at is not None
            pause = plan.next_at - (world.now - 1)
            assert pause == FIRST_RETRY_SECONDS * 2**failure
            assert f"one--{new}" not in standing(world.step())
            world.now += pause
            assert f"one--{new}" in standing(world.plan())

    def test_scaling_and_queue_change_in_place(self) -> None:
        world = World(model())
        revision = world.settle("one")
        world.models = [model(scaling={"minReplicas": 2, "maxReplicas": 3}, queue={"maxRequests": 7})]
        plan = world.step()
        assert standing(plan) == [f"one--{revision}"]
        assert plan.applications[0].spec.scaling.max_replicas == 3
        assert plan.entries["one"].limits.max_requests == 7

    def test_what_changed_in_place_is_remembered_of_the_revision(self) -> None:
        """While a later spec is refused, what runs is what the record says: the last valid scaling."""
        world = World(model())
        revision = world.settle("one")
        world.models = [model(scaling={"minReplicas": 2, "maxReplicas": 3})]
        kept = world.step().records["one"].revisions[revision]
        assert kept.spec["scaling"]["minReplicas"] == 2
        assert kept.is_proved

    def test_going_back_keeps_the_old_one(self) -> None:
        world, old, _ = self.changed()
        world.step("DEPLOYING")
        world.models = [model()]
        plan = world.step()
        assert standing(plan) == [f"one--{old}"]
        assert plan.entries["one"].revisions == {old: 100}

    def test_a_new_change_replaces_one_that_was_never_proved(self) -> None:
        world, old, new = self.changed()
        world.step("DEPLOYING")
        world.models = [model(engine={"name": "simulated", "args": {"seed": 3}})]
        plan = world.step("DEPLOYING")
        assert f"one--{new}" not in standing(plan)
        assert f"one--{old}" in standing(plan)

    def test_traffic_may_be_shared_by_several(self) -> None:
        world, old, new = self.changed()
        older = "0123456789"
        record = world.records["one"]
        kept = replace(record.revisions[old], revision=older)
        shared = replace(record, weights={older: 40, old: 60}, revisions={older: kept, **record.revisions})
        world.records = {"one": shared}
        plan = world.step("DEPLOYING")
        assert plan.entries["one"].revisions == {older: 40, old: 60}
        assert standing(plan) == [f"one--{older}", f"one--{old}", f"one--{new}"]
        assert plan.records["one"].weights == shared.weights
        world.report("one", new)
        plan = world.step()
        assert plan.entries["one"].revisions == {new: 100}
        for revision in (older, old):
            assert plan.records["one"].revisions[revision].retired_at
            world.depth("one", revision, 0, 0)
        world.now += SWITCH_SECONDS
        assert standing(world.step()) == [f"one--{new}"]


class TestLeaving:
    def test_removing_one_leaves_the_others_as_they_are(self) -> None:
        world = World(model("a"), model("b"))
        for name in ("a", "b"):
            world.settle(name)
        before = {app.name: app for app in world.plan().applications}
        world.models = [model("b")]
        plan = world.step()
        assert plan.registry.delete == ("a",)
        assert [before[app.name] for app in plan.applications] == list(plan.applications)

    def test_an_entry_without_a_resource_goes_also_after_a_restart(self) -> None:
        world = World(model("a"))
        entry = world.step().entries["a"]
        world.see(entries={"a": entry, "ghost": entry})
        assert world.plan().registry.delete == ("ghost",)


class TestTrouble:
    def test_serve_away_changes_nothing_that_stands(self) -> None:
        world = World(model())
        revision = world.settle("one")
        world.see(serve=None)
        plan = world.plan()
        assert plan.entries["one"].revisions == {revision: 100}
        assert not plan.is_settled

    def test_a_lost_controller_gets_everything_again(self) -> None:
        world = World(model("a"), model("b"))
        for name in ("a", "b"):
            world.settle(name)
        world.see(serve=ServeState())
        assert len(standing(world.plan())) == 2

    def test_a_build_that_serve_gave_up_is_a_failure(self) -> None:
        world = World(model())
        plan = world.step("DEPLOYING")
        world.status(standing(plan)[0], "DEPLOY_FAILED", "Traceback\n  x\nImportError: no such module")
        plan = world.step()
        assert standing(plan) == []
        entry = plan.entries["one"]
        assert (entry.accepts, entry.reason) == (False, "RevisionFailed")
        assert "no such module" in entry.message

    def test_a_proved_revision_that_serve_gave_up_leaves_and_comes_back(self) -> None:
        world = World(model())
        revision = world.settle("one")
        name = f"one--{revision}"
        world.see(replicas=())
        world.status(name, "DEPLOY_FAILED", "The replica failed to start 3 times in a row.")
        plan = world.step()
        assert standing(plan) == []
        assert plan.registry.drop == ()
        entry = plan.entries["one"]
        assert (entry.accepts, entry.ready, entry.reason) == (True, False, "DeployFailed")
        assert plan.next_at is not None
        world.now = plan.next_at
        assert standing(world.step()) == [name]
        world.report("one", revision)
        world.replica("one", revision)
        assert told(world.step(), "one", "Degraded") == ("False", "Healthy")

    def test_a_failing_replica_of_a_proved_revision_degrades_and_stays(self) -> None:
        world = World(model())
        revision = world.settle("one")
        world.report("one", revision, proved=False, reason="OutOfMemory", message="No room.")
        world.see(replicas=())
        plan = world.step()
        assert standing(plan) == [f"one--{revision}"]
        assert told(plan, "one", "Degraded") == ("True", "ReplicaFailed")
        assert told(plan, "one", "Ready") == ("False", "ReplicaFailed")

    def test_serves_refusal_is_told(self) -> None:
        world = World(model())
        world.settle("one")
        world.see(serve_problem=("ServeRejected", "Serve says no."))
        assert told(world.plan(), "one", "Degraded") == ("True", "ServeRejected")


EVENTS = st.lists(
    st.sampled_from(["step", "prove", "fail", "change", "remove", "add", "lost", "drained", "wait"]),
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(1, 4))
def test_promises_hold_whatever_happens(events: list[str], max_unbuilt: int) -> None:
    world = World(model("a"), model("b"), maxUnbuilt=max_unbuilt, maxLiveRevisions=3)
    for seed, event in enumerate(events, start=1):
        before = set(world.seen.serve.applications if world.seen.serve is not None else ())
        plan = act(world, event, seed)
        names = standing(plan)
        assert len(names) == len(set(names))
        assert len(set(names) - before) <= max_unbuilt
        for name, entry in plan.entries.items():
            record = plan.records[name]
            assert not entry.ready or all(kept.is_proved for kept in record.serving)
            assert not record.weights or sum(record.weights.values()) == WHOLE
            assert set(record.weights) <= set(record.revisions)
            assert [item.type for item in entry.conditions] == list(CONDITION_TYPES)
            assert {item.reason for item in entry.conditions} <= {*Reason}
            assert set(entry.revisions) <= set(record.revisions)


def act(world: World, event: str, seed: int) -> PoolPlan:
    newest: dict[str, Any] = {
        name: next(reversed(record.revisions)) for name, record in world.records.items() if record.revisions
    }
    if event in ("prove", "fail"):
        for name, revision in newest.items():
            world.report(name, revision, proved=event == "prove", reason="X")
    elif event == "change":
        world.models = [
            model(wanted.name, engine={"name": "simulated", "args": {"seed": seed}})
            for wanted in world.models
        ]
    elif event == "remove":
        world.models = world.models[1:]
    elif event == "add":
        world.models = [*world.models, model(f"m{seed}")]
    elif event == "lost":
        world.see(serve=ServeState())
    elif event == "drained":
        for name, record in world.records.items():
            for revision in record.revisions:
                world.depth(name, revision, 0, 0)
    elif event == "wait":
        world.now += 100.0
    return world.step("DEPLOYING" if seed % 2 else "RUNNING")
