"""Rollouts told as stories, in virtual time: how one goes out, what ends it, and what stays of it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from tests.unit.control.builders import NOW, model
from tests.unit.control.rolling import LOAD_SECONDS, Fault, Rolling
from tidegate.control.desired import WHOLE, ModelRecord, RevisionRecord, traffic_of
from tidegate.control.observed import Observation
from tidegate.control.rollout import SWITCH_SECONDS, retired
from tidegate.control.rollout_state import RolloutState
from tidegate.messages.queue import Depth
from tidegate.messages.registry import RevisionReport

BUSY = 20  # requests a second
READY = LOAD_SECONDS + 3


def rolling(
    rollout: dict[str, Any] | None = None, *, rate: int = BUSY, fault: Fault | None = None, **spec: Any
) -> tuple[Rolling, str, str]:
    """A model that serves and whose next revision was just asked for; its names."""
    world = Rolling(model(rollout=rollout if rollout is not None else {}, **spec))
    (old,) = world.up()
    world.rates = {"one": rate}
    world.ticks(10)
    new = world.change("one", 2)
    if fault is not None:
        world.faults[new] = fault
    return world, old, new


def steps(*weights: int, hold: float = 5.0) -> list[dict[str, Any]]:
    return [{"weight": weight, "holdSeconds": hold} for weight in weights]


def traffic(world: Rolling) -> list[dict[str, int]]:
    """The tables of weights that were published, each once."""
    found: list[dict[str, int]] = []
    for plan in world.plans:
        if not found or found[-1] != plan.entries["one"].revisions:
            found.append(plan.entries["one"].revisions)
    return found


class TestCanary:
    def test_goes_out_by_steps_and_the_target_stands_first(self) -> None:
        world, old, new = rolling({"steps": steps(15, 50, 100)})
        world.until("one", "Completed")
        world.ticks(10)
        assert traffic(world)[-4:] == [
            {old: 100},
            {new: 15, old: 85},
            {new: 50, old: 50},
            {new: 100},
        ]
        assert [next(iter(table)) for table in traffic(world)[-3:]] == [new, new, new]
        assert list(world.records["one"].revisions) == [new]
        assert list(world.standing) == [f"one--{new}"]
        assert world.view().message == f"Revision {new} takes all traffic."
        assert sum(world.failed.values()) == 0

    def test_a_step_is_held(self) -> None:
        world, _, _ = rolling({"steps": steps(50, 100, hold=40.0), "minRequests": 1})
        world.until("one", "Progressing")
        assert world.until("one", "Completed") >= 79

    def test_what_is_compared_has_a_label_and_nothing_else_has(self) -> None:
        world, _, _ = rolling({"steps": steps(15, 100)})
        world.tick()
        assert world.entries["one"].cohort == ""
        world.until("one", "Progressing")
        rollout = world.view().id
        assert world.entries["one"].cohort == f"{rollout}.15"
        world.until("one", "Completed")
        assert world.entries["one"].cohort == ""
        assert {f"{rollout}.15", f"{rollout}.100"} <= {
            cohort for outcomes in world.outcomes.values() for cohort in outcomes
        }

    def test_counts_of_one_that_is_over_go_with_the_next(self) -> None:
        world, _, new = rolling({"steps": steps(50, 100)})
        world.until("one", "Completed")
        past = world.view().id
        assert any(cohort.startswith(f"{past}.") for cohort in world.outcomes["one", new])
        world.change("one", 3)
        world.until("one", "Completed")
        world.ticks(5)
        assert not any(cohort.startswith(f"{past}.") for each in world.outcomes.values() for cohort in each)

    def test_a_round_in_which_nothing_was_decided_writes_nothing(self) -> None:
        """What changes all the time (seconds, requests, gates) is neither in the record nor in the entry."""
        world, _, _ = rolling({"steps": steps(50, 100, hold=100.0)})
        world.until("one", "Progressing")
        before = world.ticks(5)
        after = world.tick()
        assert before.rollouts != after.rollouts
        assert (after.registry.put, after.registry.move, after.notes) == ((), (), ())
        assert before.records["one"].durable == after.records["one"].durable

    def test_an_end_is_predicted_where_it_can_be(self) -> None:
        world, _, _ = rolling({"steps": steps(50, 100, hold=30.0), "minRequests": 10})
        world.until("one", "Progressing")
        world.ticks(10)
        predicted = world.view().ends_at
        world.until("one", "Completed")
        assert abs(world.view().ended - predicted) <= 3

    def test_without_the_field_everything_goes_at_once(self) -> None:
        world = Rolling(model())
        (old,) = world.up()
        new = world.change("one", 2)
        world.until("one", "Completed")
        world.ticks(READY)
        assert traffic(world)[-2:] == [{old: 100}, {new: 100}]
        assert world.view().strategy == "AllAtOnce"
        assert world.view().gates == []

    def test_without_the_field_a_failed_one_is_tried_again(self) -> None:
        world = Rolling(model())
        (old,) = world.up()
        new = world.change("one", 2)
        world.faults[new] = Fault(load="LoadFailed")
        world.ticks(READY)
        assert (world.view().phase, world.said("one", "Degraded")) == ("Warming", ("True", "RevisionFailed"))
        world.faults.clear()
        world.ticks(70)
        assert world.records["one"].weights == {new: WHOLE} != {old: WHOLE}

    def test_steps_are_those_of_its_begin(self) -> None:
        world, _, new = rolling({"steps": steps(15, 100, hold=20.0)})
        world.until("one", "Progressing")
        assert world.change("one", 2, rollout={"steps": steps(90, 100)}) == new
        world.ticks(5)
        assert (world.view().weight, [step.weight for step in world.view().steps]) == (15, [15, 100])

    def test_a_field_that_is_taken_away_lets_nothing_slip(self) -> None:
        world, old, new = rolling({"steps": steps(15, 100, hold=20.0)}, fault=Fault(errors=0.5))
        world.until("one", "Progressing")
        world.change("one", 2, rollout=None)
        world.until("one", "Aborted", "Completed")
        assert world.records["one"].weights == {old: WHOLE}
        assert world.state().refuses(new)


class TestOtherStrategies:
    def test_blue_green_moves_once_as_many_are_ready(self) -> None:
        world, old, new = rolling(
            {"strategy": "BlueGreen"}, scaling={"minReplicas": 3, "maxReplicas": 3}, rate=0
        )
        while world.records["one"].weights == {old: WHOLE}:
            assert world.view().phase == "Warming" or world.tick()
            world.tick()
        assert world.ready("one", new) == 3
        assert traffic(world)[-2:] == [{old: 100}, {new: 100}]

    def test_recreate_stops_the_old_first_and_requests_wait(self) -> None:
        world, old, new = rolling({"strategy": "Recreate", "maxSurge": 0, "steps": steps(100)})
        both = False
        for _ in range(60):
            world.tick()
            both |= {f"one--{old}", f"one--{new}"} <= set(world.standing)
        assert not both
        assert world.view().phase == "Completed"
        assert (world.peaks["one"], sum(world.failed.values())) == (1, 0)
        assert not world.queues.get(("one", old))

    def test_recreate_brings_the_old_one_back(self) -> None:
        world, old, _ = rolling({"strategy": "Recreate", "maxSurge": 0}, fault=Fault(load="OutOfMemory"))
        world.ticks(40)
        assert (world.view().phase, world.records["one"].weights) == ("Aborted", {old: WHOLE})
        assert world.ready("one", old) == 1
        assert not world.queues.get(("one", old))

    @pytest.mark.parametrize(
        ("strategy", "fault", "gate"),
        [
            ("BlueGreen", Fault(errors=0.2), "errors"),
            ("BlueGreen", Fault(errors=0.9), "errors"),
            ("BlueGreen", Fault(end="empty"), "abnormalEnds"),
            ("Recreate", Fault(errors=0.2), "errors"),
            ("Recreate", Fault(end="empty"), "abnormalEnds"),
        ],
    )
    def test_what_is_bad_at_100_percent_is_given_up(self, strategy: str, fault: Fault, gate: str) -> None:
        """However short the step is."""
        world, old, new = rolling({"strategy": strategy, "steps": steps(100, hold=0.0)}, fault=fault)
        world.until("one", "Aborted", "Completed")
        assert [each.name for each in world.view().gates if each.state == "fails"] == [gate]
        assert "at 100 %, compared with what the stable did before" in world.view().message
        assert world.records["one"].weights == {old: WHOLE}
        world.ticks(60)
        assert list(world.standing) == [f"one--{old}"]
        assert world.ready("one", old) == 1
        assert not [key for key, queue in world.queues.items() if queue]
        assert world.state().refuses(new)

    @pytest.mark.parametrize("strategy", ["BlueGreen", "Recreate"])
    def test_what_is_as_good_as_before_is_complete(self, strategy: str) -> None:
        world, old, _ = rolling({"strategy": strategy, "steps": steps(100)}, fault=Fault(errors=0.03))
        world.until("one", "Aborted", "Completed")
        assert (world.view().phase, world.failed.get(old, 0)) == ("Completed", 0)

    @pytest.mark.parametrize("hold", ["pause", "step's pause", "hold"])
    def test_a_canary_that_breaks_under_the_whole_load_is_given_up(self, hold: str) -> None:
        last = {"weight": 100, "holdSeconds": 500 if hold == "hold" else 1, "pause": hold == "step's pause"}
        world, old, new = rolling({"steps": [*steps(50), last]})
        world.until("one", "Progressing")
        while world.state().weight < WHOLE:
            world.tick()
        if hold == "pause":
            world.ask("one", "pause")
        world.ticks(5)
        assert world.view().phase == ("Progressing" if hold == "hold" else "Paused")
        world.faults[new] = Fault(errors=0.5)
        assert world.until("one", "Aborted", "Completed") < 60
        assert (world.view().phase, world.records["one"].weights) == ("Aborted", {old: WHOLE})

    def test_recreate_stops_nothing_before_the_source_is_known(self) -> None:
        world, old, _ = rolling({"strategy": "Recreate"})
        world.change("one", 2, engine={"name": "transformers"}, source={"uri": "/nowhere"})
        world.ticks(10)
        assert world.ready("one", old) == 1

    def test_a_shadow_touches_nobody(self) -> None:
        world, old, new = rolling({"shadow": {}, "steps": steps(50, 100)}, fault=Fault(errors=0.1))
        world.until("one", "Shadow")
        assert (world.entries["one"].shadow, world.entries["one"].shadow_share) == (new, 100)
        assert world.entries["one"].cohort.endswith(".0")
        assert world.until("one", "Aborted") <= 30
        assert world.entries["one"].shadow == ""
        assert world.failed == {old: 0}
        assert "Errors in the shadow" in world.view().message

    def test_a_good_shadow_is_followed_by_the_steps(self) -> None:
        world, _, _ = rolling(
            {"shadow": {"requests": 200, "holdSeconds": 1, "share": 50}, "steps": steps(50, 100)}
        )
        world.until("one", "Shadow")
        assert world.until("one", "Progressing") >= 15
        assert world.until("one", "Completed") > 0

    def test_a_quiet_shadow_waits(self) -> None:
        world, _, _ = rolling({"shadow": {"requests": 5}}, rate=0)
        world.ticks(60)
        assert (world.view().phase, world.view().reason) == ("Shadow", "WaitingForEvidence")
        assert world.view().message.startswith("0 of 5 shadowed requests")


class TestGates:
    @pytest.mark.parametrize(
        ("fault", "gate"),
        [
            (Fault(load="LoadFailed"), "load"),
            (Fault(load="SelfCheckFailed"), "selfCheck"),
            (Fault(load="ProbeFailed"), "probes"),
            (Fault(lost=0.3), "restarts"),
            (Fault(errors=0.1), "errors"),
            (Fault(slow=3.0), "firstToken"),
            (Fault(end="empty"), "abnormalEnds"),
        ],
    )
    def test_each_aborts_by_itself_and_says_why(self, fault: Fault, gate: str) -> None:
        world, old, new = rolling(fault=fault)
        world.until("one", "Aborted", "Completed")
        assert world.view().phase == "Aborted"
        failed = [each for each in world.view().gates if each.state == "fails"]
        assert failed[0].name == gate
        assert failed[0].message in world.view().message
        assert world.records["one"].weights == {old: WHOLE}
        assert world.entries["one"].revisions == {old: WHOLE}
        assert world.said("one", "Degraded") == ("True", "RolloutAborted")
        assert world.said("one", "Ready") == ("True", "Serving")
        notes = [note for plan in world.plans for note in plan.notes if note.reason == "RolloutAborted"]
        assert [(note.is_trouble, failed[0].message in note.message) for note in notes] == [(True, True)]
        assert world.failed.get(new, 0) <= 20

    def test_a_start_that_fails_later_aborts_too(self) -> None:
        world, _, new = rolling(
            {"steps": steps(30, 100, hold=20.0)}, scaling={"minReplicas": 3, "maxReplicas": 3}
        )
        world.until("one", "Progressing")
        world.faults[new] = Fault(load="OutOfMemory")
        world.until("one", "Aborted")
        assert "OutOfMemory" in world.view().message

    def test_a_replica_that_served_and_ended_is_no_failed_start(self) -> None:
        world, _, new = rolling({"steps": steps(50, 100)})
        world.until("one", "Progressing")
        report = RevisionReport("one", new, world.now, False, "EngineCrashed", "It ends.", slots=4)
        world.reports["one", new] = report
        world.until("one", "Completed")

    def test_the_limit_of_the_spec_holds_though_the_stable_is_as_bad(self) -> None:
        limits = {"errorRate": 0.01}
        world, old, _ = rolling({"limits": limits, "steps": steps(50, 100)}, fault=Fault(errors=0.3))
        world.faults[old] = Fault(errors=0.3)
        world.until("one", "Aborted", "Completed")
        assert [each.name for each in world.view().gates if each.state == "fails"] == ["limits.errorRate"]

    def test_the_first_revision_has_nothing_but_limits(self) -> None:
        world = Rolling(model(rollout={"limits": {"errorRate": 0.01}, "steps": steps(20, 100)}))
        (first,) = world.up()
        world.rates = {"one": BUSY}
        assert (world.view().phase, world.view().steps[0].weight) == ("Progressing", WHOLE)
        world.until("one", "Completed")
        bad = Rolling(model(rollout={"limits": {"errorRate": 0.01}}))
        bad.rates = {"one": BUSY}
        bad.faults[first] = Fault(errors=0.2)
        bad.ticks(READY)
        bad.until("one", "Aborted")
        bad.ticks(100)
        assert bad.records["one"].weights == {first: WHOLE}
        assert bad.ready("one", first) == 1
        assert bad.said("one", "Degraded") == ("True", "RolloutAborted")

    def test_one_without_limits_is_complete_at_once(self) -> None:
        world = Rolling(model(rollout={}))
        world.up()
        assert world.view().phase == "Completed"


class TestComplaints:
    """What users of other tools complain of (Argo, Flagger, KServe, KubeRay, Kayenta)."""

    def test_silence_is_neither_pass_nor_fail(self) -> None:
        world, old, new = rolling(rate=0)
        world.ticks(2000)
        assert world.records["one"].weights == {new: 15, old: 85}
        assert world.said("one", "Progressing") == ("True", "WaitingForEvidence")
        assert world.view().message == "0 of 59 requests of the target ended well: it waits for more."
        world.rates = {"one": BUSY}
        world.until("one", "Completed")

    def test_traffic_that_stops_later_stops_the_rollout(self) -> None:
        world, old, new = rolling({"steps": steps(15, 100, hold=2.0), "margin": 0.01})
        world.until("one", "Progressing")
        world.ticks(10)
        world.rates = {}
        world.ticks(1000)
        assert world.records["one"].weights == {new: 15, old: 85}

    def test_a_quiet_model_may_go_by_the_clock_and_says_so(self) -> None:
        world, _, _ = rolling({"minRequests": 0, "steps": steps(50, 100)}, rate=0)
        world.until("one", "Completed")
        assert "It went by the clock" in world.view().message

    def test_a_stable_without_an_error_does_not_hide_those_of_the_target(self) -> None:
        world, old, _ = rolling(fault=Fault(errors=0.05))
        world.until("one", "Aborted", "Completed")
        assert (world.view().phase, world.failed[old]) == ("Aborted", 0)

    @pytest.mark.parametrize("hold", ["pause", "step's pause", "hold"])
    def test_gates_judge_while_it_waits(self, hold: str) -> None:
        step = {"weight": 50, "holdSeconds": 1000 if hold == "hold" else 1, "pause": hold == "step's pause"}
        world, old, new = rolling({"steps": [step, {"weight": 100}]})
        world.until("one", "Progressing")
        if hold == "pause":
            world.ask("one", "pause")
        world.ticks(20)
        assert world.view().phase == ("Progressing" if hold == "hold" else "Paused")
        world.faults[new] = Fault(errors=0.2)
        world.until("one", "Aborted", most=60)
        assert world.records["one"].weights == {old: WHOLE}

    def test_figures_are_of_that_revision_alone(self) -> None:
        """The stable fails; the target does not, and is not blamed."""
        world, old, new = rolling({"steps": steps(50, 100)})
        world.faults[old] = Fault(errors=0.5)
        world.until("one", "Aborted", "Completed")
        assert (world.view().phase, world.records["one"].weights) == ("Completed", {new: WHOLE})

    def test_figures_are_of_that_rollout_alone(self) -> None:
        world, _, new = rolling({"steps": steps(50, 100)}, fault=Fault(errors=0.5))
        world.until("one", "Aborted")
        world.faults.clear()
        world.ask("one", "retry")
        world.tick()
        world.until("one", "Aborted", "Completed")
        assert world.records["one"].weights == {new: WHOLE}

    def test_an_abort_without_a_rollout_is_refused(self) -> None:
        world = Rolling(model(rollout={}))
        (old,) = world.up()
        world.ask("one", "abort")
        plan = world.tick()
        assert world.records["one"].weights == {old: WHOLE}
        assert "abort was refused: no rollout is under way" in world.view().message
        assert [note.reason for note in plan.notes] == ["ActionRefused"]

    def test_a_change_that_is_taken_back_is_no_third_revision(self) -> None:
        world, old, new = rolling({"steps": steps(15, 100, hold=100.0)})
        world.until("one", "Progressing")
        world.ticks(5)
        assert world.change("one", 1) != new
        world.models = [model(rollout={"steps": steps(15, 100, hold=100.0)})]
        before = world.starts
        world.tick()
        assert world.entries["one"].revisions == {old: WHOLE}
        world.ticks(20)
        assert world.starts == before
        assert (world.view().phase, world.view().target) == ("Completed", old)
        assert list(world.records["one"].revisions) == [old]

    def test_what_was_given_up_never_comes_back_by_itself(self) -> None:
        world, old, new = rolling({"abortScaleDownSeconds": 20}, fault=Fault(errors=0.5))
        world.until("one", "Aborted")
        world.ticks(10)
        assert world.ready("one", new) == 1
        world.ticks(30)
        assert list(world.standing) == [f"one--{old}"]
        starts = world.starts_of[new]
        world.faults.clear()
        world.ticks(200)
        world.crash = "before"
        world.ticks(200)
        assert world.starts_of[new] == starts
        assert world.said("one", "Progressing") == ("False", "RolloutAborted")
        assert world.plans[-1].is_settled

    def test_an_aborted_one_can_be_tried_again(self) -> None:
        world, _, new = rolling(fault=Fault(load="LoadFailed"))
        world.until("one", "Aborted")
        world.ticks(60)
        past = world.view().id
        world.faults.clear()
        world.ask("one", "retry")
        world.tick()
        world.until("one", "Completed")
        assert world.records["one"].weights == {new: WHOLE}
        assert world.view().id > past

    def test_another_spec_ends_the_refusal(self) -> None:
        world, _, new = rolling(fault=Fault(errors=0.5))
        world.until("one", "Aborted")
        other = world.change("one", 3)
        world.tick()
        world.until("one", "Completed")
        assert world.records["one"].weights == {other: WHOLE}
        world.faults.clear()
        assert world.change("one", 2) == new
        world.tick()
        world.until("one", "Completed")
        assert world.records["one"].weights == {new: WHOLE}

    def test_nothing_happens_round_after_round(self) -> None:
        world, _, _ = rolling(fault=Fault(errors=0.5))
        world.until("one", "Aborted")
        world.ticks(60)
        world.rates = {}
        before = world.ticks(20)
        after = world.tick()
        assert dict(after.records) == dict(before.records)
        assert (after.registry.put, after.registry.move, after.notes) == ((), (), ())
        assert after.is_settled


class TestChangesDuringChanges:
    def test_a_new_target_takes_the_place_of_the_one_under_way(self) -> None:
        world, old, new = rolling({"steps": steps(50, 100, hold=30.0)})
        world.until("one", "Progressing")
        world.ticks(5)
        third = world.change("one", 3)
        plan = world.tick()
        assert plan.entries["one"].revisions == {old: WHOLE}
        world.queues["one", new] = ["x"] * 7
        plan = world.tick()
        assert ("one", new) in [move[0] for move in plan.registry.move]
        world.until("one", "Completed")
        world.ticks(10)
        assert world.records["one"].weights == {third: WHOLE}
        assert list(world.records["one"].revisions) == [third]
        assert not world.queues.get(("one", new))

    def test_one_whose_source_is_not_found_yet_stops_the_other(self) -> None:
        world, old, _ = rolling({"steps": steps(50, 100, hold=30.0)})
        world.until("one", "Progressing")
        world.change("one", 2, engine={"name": "transformers"}, source={"uri": "/nowhere"})
        world.ticks(5)
        assert world.records["one"].weights == {old: WHOLE}
        assert (world.view().phase, world.view().reason) == ("Aborted", "RolloutReplaced")
        assert world.said("one", "Degraded") == ("False", "Healthy")

    def test_one_before_its_first_proof_is_replaced(self) -> None:
        world = Rolling(model(rollout={}))
        world.ticks(2)
        second = world.change("one", 2)
        world.ticks(READY + 3)
        assert world.records["one"].weights == {second: WHOLE}
        assert list(world.records["one"].revisions) == [second]

    def test_no_request_is_lost_by_an_abort(self) -> None:
        """Also those that a gateway sends until it follows."""
        world, _, new = rolling({"steps": steps(50, 100, hold=100.0)})
        world.until("one", "Progressing")
        world.standing[f"one--{new}"].replicas.clear()
        world.ticks(3)
        assert world.queues["one", new]
        world.ask("one", "abort")
        world.ticks(4)
        assert not world.queues.get(("one", new))
        assert world.state().reason == "RolloutAborted"
        assert "ada" in world.state().message

    def test_what_has_begun_goes_on_where_the_weights_are_the_same(self) -> None:
        world, _, _ = rolling({"steps": steps(50, 100, hold=100.0)})
        world.until("one", "Progressing")
        record = world.records["one"]
        target = world.view().target
        kept = record.revisions[target]
        world.records["one"] = record.with_revision(
            RevisionRecord(target, kept.spec, checkpoint="/other", digest="d2", proof=kept.proof)
        )
        world.queues["one", target] = ["x"]
        world.ask("one", "abort")
        (move,) = world.tick().registry.move
        assert move[2] is False


class TestSleepers:
    SLEEPER: ClassVar[dict[str, Any]] = {"minReplicas": 0, "maxReplicas": 2, "idleSeconds": 1}

    def test_a_sleeping_model_rolls_out_and_sleeps_again(self) -> None:
        world, _, new = rolling({"minRequests": 0, "steps": steps(50, 100)}, rate=0, scaling=self.SLEEPER)
        world.until("one", "Completed")
        world.ticks(10)
        assert world.records["one"].weights == {new: WHOLE}
        assert world.said("one", "Ready") == ("True", "Asleep")
        assert all(not each.staying for each in world.standing.values())

    def test_a_target_may_sleep_while_it_waits_for_requests(self) -> None:
        world, _, new = rolling(rate=0, scaling=self.SLEEPER)
        world.until("one", "Progressing")
        world.ticks(100)
        assert world.ready("one", new) == 0
        world.rates = {"one": BUSY}
        world.until("one", "Completed")


class TestClock:
    @pytest.mark.parametrize("jump", [-7200.0, 7200.0])
    def test_a_jump_ends_no_step_without_evidence_and_holds_none_for_ever(self, jump: float) -> None:
        world, _, new = rolling({"steps": steps(50, 100, hold=30.0), "margin": 0.02})
        world.until("one", "Progressing")
        world.offset = jump
        assert world.view().weight == 50
        assert world.until("one", "Completed", most=200) <= 100
        assert world.records["one"].weights == {new: WHOLE}

    def test_no_two_rollouts_share_their_name(self) -> None:
        world, _, _ = rolling({"steps": steps(100, hold=1.0), "minRequests": 0})
        names = []
        for seed in (3, 4, 5):
            world.until("one", "Completed")
            names.append(world.view().id)
            world.offset -= 10_000
            world.change("one", seed)
            world.tick()
        assert len(set(names)) == 3
        assert names == sorted(names)


NOBODY = Observation(serve=None)


def revision(name: str, *, is_proved: bool, retired_at: float = 0.0) -> RevisionRecord:
    proof = RevisionReport("m", name, NOW, True) if is_proved else None
    return RevisionRecord(name, {}, proof=proof, retired_at=retired_at)


def record(weights: dict[str, int], *revisions: RevisionRecord) -> ModelRecord:
    return ModelRecord("m", 1, weights, {kept.revision: kept for kept in revisions})


OLD, NEW = revision("old", is_proved=True), revision("new", is_proved=True)
UNPROVED = revision("new", is_proved=False)


class TestRetiring:
    def test_whoever_takes_traffic_stays(self) -> None:
        both = record({"old": 85, "new": 15}, OLD, NEW)
        assert retired(both, "target", NOBODY, NOW) == (both, ())

    def test_what_never_proved_itself_goes_at_once(self) -> None:
        left, gone = retired(record({"old": WHOLE}, OLD, UNPROVED), "target", NOBODY, NOW)
        assert (list(left.revisions), [name for name, _ in gone]) == (["old"], ["new"])

    def test_the_stable_stays_to_the_end(self) -> None:
        state = RolloutState("1", "new", "old", "Canary", "Progressing", NOW)
        whole = ModelRecord("m", 1, {"new": WHOLE}, {"old": OLD, "new": NEW}, rollout=state)
        assert retired(whole, "new", NOBODY, NOW) == (whole, ())

    @pytest.mark.parametrize(
        ("age_seconds", "depth", "goes"),
        [
            (SWITCH_SECONDS, Depth(0, 0, 0.0), True),
            (SWITCH_SECONDS - 0.1, Depth(0, 0, 0.0), False),
            (SWITCH_SECONDS, Depth(1, 0, 0.0), False),
            (SWITCH_SECONDS, Depth(0, 1, 0.0), False),
            (SWITCH_SECONDS, None, False),
        ],
    )
    def test_what_lost_its_traffic_drains_first(
        self, age_seconds: float, depth: Depth | None, *, goes: bool
    ) -> None:
        without, _ = retired(record({"new": WHOLE}, OLD, NEW), "new", NOBODY, NOW)
        assert without.revisions["old"].retired_at == NOW
        seen = Observation(serve=None, depths={("m", "old"): depth} if depth is not None else {})
        left, gone = retired(without, "new", seen, NOW + age_seconds)
        assert ("old" not in left.revisions, bool(gone)) == (goes, goes)


class TestRecords:
    def test_serving_goes_by_share_and_lead_is_its_first(self) -> None:
        both = record({"old": 15, "new": 85}, OLD, NEW)
        assert both.serving == (NEW, OLD)
        assert both.lead == NEW
        assert record({}, OLD, NEW).lead == NEW
        assert record({}).lead is None

    @pytest.mark.parametrize(
        ("stored", "weights"),
        [
            ({"serving": "a"}, {"a": WHOLE}),
            ({"serving": ""}, {}),
            ({}, {}),
            ({"weights": {"a": 15, "b": 85}}, {"a": 15, "b": 85}),
            ({"weights": {}, "serving": "a"}, {}),
        ],
    )
    def test_the_form_before_is_read(self, stored: dict[str, object], weights: dict[str, int]) -> None:
        assert traffic_of(stored) == weights
