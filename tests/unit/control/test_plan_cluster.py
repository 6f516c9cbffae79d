"""Plans of a cluster: places in groups, models that are deleted, what Serve or Kubernetes refuses."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.unit.control.builders import REPLICAS, World, model
from tidegate.control.attempts import FIRST_RETRY_SECONDS
from tidegate.control.desired import ModelRecord, revision_of
from tidegate.control.observed import Group, PodProblem, ServeState, SourceState
from tidegate.control.packing import Placement
from tidegate.control.plan import DRAIN_LIMIT_SECONDS, PoolPlan
from tidegate.control.reasons import Reason
from tidegate.control.rollout import SWITCH_SECONDS
from tidegate.control.serve_config import application_config
from tidegate.control.status import outage
from tidegate.sources.facts import DecoderShape

GIB = 1 << 30
GPU = Group("gpu", gpus_per_worker=1, gpu_memory_bytes=24 * GIB, max_workers=1, cpus=8, memory_bytes=32 * GIB)
CPU = Group("cpu", max_workers=2, cpus=4, memory_bytes=8 * GIB)
SHAPE = DecoderShape(layers=16, kv_heads=8, head_dim=64, hidden=2048, vocab=128_256, positions=2048)


def world(*models: Any, groups: tuple[Group, ...] = (CPU, GPU), **pool: Any) -> World:
    made = World(*models, **pool)
    made.see(groups=groups)
    return made


def shared(name: str, memory: str = "10Gi", **spec: Any) -> Any:
    return model(name, **{"resources": {"gpuMemory": memory}, **spec})


def told(plan: PoolPlan, name: str, kind: str) -> tuple[str, str]:
    found = next(item for item in plan.entries[name].conditions if item.type == kind)
    assert found.reason in {*Reason}
    return found.status, found.reason


def standing(plan: PoolPlan) -> list[str]:
    return [application.model for application in plan.applications]


class TestPlaces:
    def test_two_share_a_gpu_and_the_third_is_told_the_sum(self) -> None:
        there = world(shared("one"), shared("two"), shared("three"))
        plan = there.step()
        assert standing(plan) == ["one", "two"]
        assert told(plan, "three", "Scheduled") == ("False", "GpusTaken")
        assert told(plan, "three", "Progressing") == ("False", "Settled")
        entry = plan.entries["three"]
        assert (entry.accepts, entry.ready, entry.reason) == (False, False, "GpusTaken")
        assert "resources.gpuMemory 10.00 GiB" in entry.message
        there.models.pop(0)
        there.step()
        plan = there.step()
        assert standing(plan) == ["two", "three"]

    def test_the_place_reaches_ray_and_the_engine(self) -> None:
        there = world(shared("one", "6Gi"))
        (application,) = there.step().applications
        assert application.placement == Placement("gpu", 0.25, 6 * GIB)
        config = application_config(application, REPLICAS)
        options = config["deployments"][0]["ray_actor_options"]
        assert options == {"num_cpus": 0.1, "num_gpus": 0.25, "resources": {"tidegate-group-gpu": 0.001}}
        engine = config["args"]["engine"]
        assert (engine["memory_cap_bytes"], engine["device"]) == (6 * GIB, "cuda")

    def test_a_model_without_a_gpu_goes_to_the_cpus(self) -> None:
        there = world(model("one", resources={"cpus": 1, "memory": "2Gi"}))
        (application,) = there.step().applications
        assert application.placement == Placement("cpu", 0, 2 * GIB, 2 * GIB)
        options = application_config(application, REPLICAS)["deployments"][0]["ray_actor_options"]
        assert (options["memory"], options["num_gpus"]) == (2 * GIB, 0)

    def test_one_machine_has_no_places(self) -> None:
        (application,) = World(model("one", resources={"gpus": 0.5})).step().applications
        assert application.placement is None
        options = application_config(application, REPLICAS)["deployments"][0]["ray_actor_options"]
        assert options == {"num_cpus": 0.1, "num_gpus": 0.5}

    def test_a_place_is_kept_and_survives_the_records(self) -> None:
        there = world(shared("young"), shared("old"))
        there.settle("young")
        before = there.records["young"].revisions
        wire = msgspec.json.encode(there.records)
        there.records = msgspec.json.decode(wire, type=dict[str, ModelRecord])
        assert there.records["young"].revisions == before
        # A new group that would be the better one moves nothing.
        small = Group("small", gpus_per_worker=1, gpu_memory_bytes=12 * GIB, cpus=8)
        there.see(groups=(small, GPU))
        for application in there.step().applications:
            assert application.placement is not None
            assert application.placement.group == "gpu"

    def test_the_sum_comes_from_the_checkpoint_and_is_remembered(self) -> None:
        wanted = model(
            "one",
            engine={"name": "transformers", "maxSlots": 2},
            source={"uri": "/w"},
            device="cuda",
            resources={"gpus": 1},
        )
        shares = model(
            "two",
            engine={"name": "transformers", "maxSlots": 2},
            source={"uri": "/w"},
            resources={"accelerator": "gpu"},
        )
        there = world(wanted, shares)
        for number in (0, 1):
            there.source(number, SourceState("resolved", "/c", 20 * GIB, "none", "float16", shape=SHAPE))
        plan = there.step()
        assert standing(plan) == ["one"]
        assert "weights 21.00 GiB + KV cache 0.15 GiB + runtime 1.00 GiB = 22.15 GiB" in (
            plan.entries["two"].message
        )
        # The answer of the look is gone with its Job; nobody asks again.
        there.see(sources={})
        plan = there.step()
        assert plan.resolve == ()
        assert told(plan, "two", "Scheduled") == ("False", "GpusTaken")
        assert told(plan, "two", "WeightsAvailable") == ("True", "Resolved")

    def test_an_unknown_architecture_asks_for_the_number(self) -> None:
        wanted = model(
            "one", engine={"name": "transformers"}, source={"uri": "/w"}, resources={"accelerator": "gpu"}
        )
        there = world(wanted)
        there.source(0, SourceState("resolved", "/c", GIB, "none", "float16"))
        plan = there.step()
        assert told(plan, "one", "Scheduled") == ("False", "MemoryUnknown")
        assert "spec.resources.gpuMemory" in plan.entries["one"].message

    def test_a_recorded_answer_outlives_the_job_that_gave_it(self) -> None:
        there = world(model(engine={"name": "transformers"}, source={"uri": "/w"}))
        there.source(0, SourceState("resolved", "/w", 10, "none", "float16", shape=SHAPE))
        there.settle("one")
        for state in (SourceState("failed", reason="JobFailed"), SourceState("resolving")):
            there.source(0, state)
            plan = there.step()
            assert told(plan, "one", "WeightsAvailable") == ("True", "Resolved")
            assert plan.entries["one"].ready
            assert standing(plan) == ["one"]

    def test_until_the_look_ends_nothing_is_known(self) -> None:
        there = world(model("one", engine={"name": "transformers"}, source={"uri": "/w"}))
        there.source(0, SourceState("resolving"))
        assert told(there.step(), "one", "Scheduled") == ("Unknown", "NotChecked")

    def test_a_change_without_room_beside_the_old_one_is_refused_and_the_old_one_serves(self) -> None:
        there = world(shared("one", "20Gi"))
        old = there.settle("one")
        there.models = [shared("one", "21Gi")]
        plan = there.step()
        assert [application.revision for application in plan.applications] == [old]
        assert told(plan, "one", "Scheduled") == ("False", "GpusTaken")
        assert f"its own revision {old}" in next(
            item.message for item in plan.entries["one"].conditions if item.type == "Scheduled"
        )
        assert (plan.entries["one"].ready, plan.entries["one"].accepts) == (True, True)

    def test_a_group_that_is_gone_takes_its_models_along(self) -> None:
        there = world(shared("one"))
        there.settle("one")
        there.see(groups=(CPU,))
        plan = there.step()
        entry = plan.entries["one"]
        assert (standing(plan), entry.accepts, entry.ready, entry.reason) == ([], False, False, "NoSuchGroup")
        there.see(groups=(CPU, GPU))
        assert standing(there.step()) == ["one"]

    def test_what_takes_traffic_is_seated_before_what_is_older(self) -> None:
        there = world(shared("old", "20Gi"), shared("young", "20Gi"))
        there.models.reverse()
        there.settle("young")
        there.see(groups=(CPU,))
        there.step()
        there.records["old"] = replace(there.records["old"], created=1)
        there.see(groups=(CPU, GPU))
        assert standing(there.step()) == ["young"]

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
    def test_nobody_is_left_pending(self, sizes: list[int], workers: int) -> None:
        """Whatever is asked: a model stands in Serve with a place, or is refused; and the GPUs hold all."""
        many = Group("gpu", 1, 24 * GIB, workers, 0, 8)
        there = world(*(shared(f"m{n}", f"{size}Gi") for n, size in enumerate(sizes)), groups=(many,))
        for _ in range(3):
            plan = there.step()
        placed = {item.model: item.placement for item in plan.applications}
        for name in plan.entries:
            assert (name in placed) == (told(plan, name, "Scheduled")[0] == "True")
        assert sum(place.gpus for place in placed.values() if place) <= workers + 1e-9


class TestDeletion:
    def deleted(self) -> tuple[World, str]:
        there = world(shared("one"), shared("two"))
        revision = there.settle("one")
        there.settle("two")
        there.deleting = {"one": there.now}
        return there, revision

    def test_it_takes_nothing_new_and_finishes_what_it_has(self) -> None:
        there, revision = self.deleted()
        there.depth("one", revision, 1, 2)
        there.now += SWITCH_SECONDS
        plan = there.step()
        entry = plan.entries["one"]
        assert (entry.accepts, entry.ready, entry.reason) == (False, False, "Deleting")
        assert (standing(plan), plan.drained, plan.registry.delete, plan.is_settled) == (
            ["one", "two"],
            (),
            (),
            False,
        )
        assert "3 requests" in next(item.message for item in entry.conditions if item.type == "Progressing")
        there.depth("one", revision, 0, 0)
        plan = there.step()
        assert (standing(plan), plan.drained, plan.registry.delete) == (["two"], ("one",), ("one",))
        assert "one" not in plan.entries
        assert "one" not in plan.records

    def test_gateways_get_time_to_see_it(self) -> None:
        there, revision = self.deleted()
        there.depth("one", revision, 0, 0)
        plan = there.plan()
        assert plan.drained == ()
        assert plan.next_at == there.deleting["one"] + SWITCH_SECONDS
        there.now += SWITCH_SECONDS
        assert there.plan().drained == ("one",)

    def test_it_has_an_end(self) -> None:
        there, revision = self.deleted()
        there.depth("one", revision, 5, 5)
        there.now += DRAIN_LIMIT_SECONDS - 1
        assert there.plan().drained == ()
        there.now += 1
        assert there.plan().drained == ("one",)

    def test_a_queue_that_is_not_known_is_not_taken_for_empty(self) -> None:
        there, _ = self.deleted()
        there.see(depths={})
        there.now += SWITCH_SECONDS + 60
        assert there.plan().drained == ()

    def test_a_sleeping_model_wakes_for_what_waits(self) -> None:
        there = world(shared("one", scaling={"minReplicas": 0, "maxReplicas": 1}))
        revision = there.settle("one")
        there.see(serve=ServeState(), replicas=())
        there.deleting = {"one": there.now}
        there.depth("one", revision, 1, 0)
        (application,) = there.step().applications
        assert (application.revision, application.keep_awake) == (revision, False)

    def test_one_that_never_came_up_goes_at_once(self) -> None:
        there = world(model("one", engine={"name": "transformers"}, source={"uri": "/w"}))
        there.step()
        there.deleting = {"one": there.now}
        plan = there.plan()
        assert (plan.drained, plan.resolve, standing(plan)) == (("one",), (), [])

    def test_its_place_is_free_only_when_it_has_drained(self) -> None:
        there, revision = self.deleted()
        there.models.append(shared("three"))
        there.depth("one", revision, 1, 0)
        there.now += SWITCH_SECONDS
        assert told(there.step(), "three", "Scheduled") == ("False", "GpusTaken")
        there.depth("one", revision, 0, 0)
        there.step()
        there.models.pop(0)
        there.deleting = {}
        assert standing(there.step()) == ["two", "three"]


class TestRefusals:
    def test_an_application_that_serve_refuses_is_its_models_status(self) -> None:
        there = world(shared("one"), shared("two"))
        there.step()
        name = f"one--{revision_of(there.models[0].spec)}"
        there.see(rejected={name: "Ray Serve refused the config: num_gpus"})
        plan = there.step()
        assert standing(plan) == ["two"]
        assert plan.entries["one"].reason == "RevisionFailed"
        assert "ServeRejected: Ray Serve refused the config: num_gpus" in plan.entries["one"].message
        there.see(rejected={})
        there.now += FIRST_RETRY_SECONDS
        assert standing(there.step()) == ["one", "two"]

    def test_a_refused_change_in_place_is_told_and_it_serves_on(self) -> None:
        there = world(shared("one"))
        revision = there.settle("one")
        there.see(rejected={f"one--{revision}": "max_replicas must be ..."})
        plan = there.step()
        assert standing(plan) == ["one"]
        assert told(plan, "one", "Degraded") == ("True", "ServeRejected")
        assert told(plan, "one", "Ready") == ("True", "Serving")


def problem(reason: str, group: str = "gpu") -> PodProblem:
    return PodProblem("main-worker-1", "ray-worker", reason, f"Pod main-worker-1: {reason}.", group)


class TestPods:
    @pytest.mark.parametrize(
        "reason", ["ImagePullFailed", "OutOfMemory", "CrashLoop", "SecretMissing", "VolumeMissing"]
    )
    @pytest.mark.parametrize("group", ["gpu", ""])
    def test_what_keeps_a_pod_down_is_the_status_of_those_that_need_it(self, reason: str, group: str) -> None:
        there = world(shared("one"), model("two"))
        there.step("DEPLOYING")
        there.see(pod_problems=(problem(reason, group),))
        plan = there.step()
        assert told(plan, "one", "Degraded") == ("True", reason)
        assert (plan.entries["one"].reason, plan.entries["one"].message) == (
            reason,
            f"Pod main-worker-1: {reason}.",
        )
        assert told(plan, "two", "Degraded")[0] == ("False" if group else "True")

    def test_a_pod_without_a_node(self) -> None:
        there = world(shared("one"))
        there.step("DEPLOYING")
        there.see(pod_problems=(problem("Unschedulable"),))
        plan = there.step()
        assert told(plan, "one", "Scheduled") == ("False", "Unschedulable")
        assert plan.entries["one"].reason == "Unschedulable"
        assert standing(plan) == ["one"]

    def test_those_that_have_their_replicas_are_well(self) -> None:
        there = world(shared("one"))
        there.settle("one")
        there.see(pod_problems=(problem("CrashLoop"),))
        assert told(there.step(), "one", "Degraded") == ("False", "Healthy")

    def test_a_cluster_that_starts(self) -> None:
        there = world(shared("one"))
        there.see(serve=None)
        plan = there.step()
        assert told(plan, "one", "Progressing") == ("True", "ClusterStarting")
        assert plan.entries["one"].accepts, "requests wait for it in the queue"


def test_an_outage_leaves_what_is_known() -> None:
    there = world(shared("one"))
    there.settle("one")
    entry = there.step().entries["one"]
    found = {item.type: item for item in outage(entry.conditions, "RedisUnreachable", "No route.", there.now)}
    assert (found["Ready"].status, found["Ready"].reason) == ("False", "RedisUnreachable")
    assert (found["Degraded"].status, found["Degraded"].message) == ("True", "No route.")
    assert found["Scheduled"].status == "True"
    assert list(found) == [item.type for item in entry.conditions]
    again = outage(list(found.values()), "RedisUnreachable", "No route.", there.now + 60)
    assert again == list(found.values()), "the same outage changes nothing"
