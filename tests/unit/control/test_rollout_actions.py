"""What people ask of rollouts: each action once, and wrong ones refused with a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.control.builders import model
from tests.unit.control.rolling import Fault, Rolling
from tests.unit.control.test_rollout import rolling, steps
from tidegate.control.desired import WHOLE
from tidegate.messages.rollouts import Action, Verb

LONG = {"steps": steps(20, 50, 100, hold=1000.0)}


def under_way(rollout: dict[str, Any] | None = None) -> tuple[Rolling, str, str]:
    world, old, new = rolling(rollout or LONG)
    world.until("one", "Progressing")
    world.ticks(20)
    return world, old, new


def test_a_pause_holds_and_resume_goes_on() -> None:
    world, _, _ = under_way({"steps": steps(20, 100, hold=30.0), "minRequests": 1})
    world.ask("one", "pause")
    world.ticks(100)
    assert (world.view().phase, world.view().weight) == ("Paused", 20)
    assert world.said("one", "Progressing") == ("True", "RolloutPaused")
    world.ask("one", "resume")
    world.tick()
    assert world.view().weight == 100


def test_one_that_is_paused_before_it_has_traffic_gets_none() -> None:
    world, old, _ = rolling(LONG)
    world.tick()
    world.ask("one", "pause")
    world.ticks(30)
    assert (world.view().phase, world.records["one"].weights) == ("Paused", {old: WHOLE})
    world.ask("one", "resume")
    world.until("one", "Progressing")


def test_a_steps_pause_is_ended_for_that_step_alone() -> None:
    pausing = [{"weight": weight, "holdSeconds": 1, "pause": True} for weight in (20, 60, 100)]
    world, _, _ = rolling({"steps": pausing, "minRequests": 1})
    for weight in (20, 60, 100):
        world.until("one", "Paused")
        world.ticks(50)
        assert (world.view().phase, world.view().weight) == ("Paused", weight)
        world.ask("one", "resume")
    world.until("one", "Completed")


def test_promote_ends_what_the_step_waits_for_and_not_the_next() -> None:
    world, _, _ = under_way()
    world.ask("one", "promote")
    world.ticks(50)
    assert world.view().weight == 50
    world.ask("one", "pause")
    world.tick()
    world.ask("one", "promote")
    world.ticks(50)
    assert (world.view().phase, world.view().weight) == ("Progressing", 100)
    world.ask("one", "promote")
    world.until("one", "Completed")


def test_promote_does_not_overrule_a_gate() -> None:
    world, old, new = under_way()
    world.faults[new] = Fault(errors=1.0)
    world.ticks(3)
    world.ask("one", "promote")
    world.ticks(5)
    assert (world.view().phase, world.records["one"].weights) == ("Aborted", {old: WHOLE})


def test_abort_names_who_asked() -> None:
    world, old, new = under_way()
    world.ask("one", "abort")
    plan = world.tick()
    assert plan.entries["one"].revisions == {old: WHOLE}
    assert world.view().message == "It was aborted by ada."
    assert world.state().refuses(new)


@pytest.mark.parametrize(
    ("verb", "why"),
    [
        ("resume", "the rollout is not paused."),
        ("retry", "was not given up."),
        ("undo", "revision 'x' is not known; known are "),
    ],
)
def test_what_is_wrong_changes_nothing(verb: Verb, why: str) -> None:
    world, _, _ = under_way()
    before = world.records["one"]
    world.ask("one", verb, "x" if verb == "undo" else "")
    plan = world.tick()
    assert f"{verb} was refused: " in world.view().message
    assert why in world.view().message
    assert [(note.reason, note.is_trouble) for note in plan.notes] == [("ActionRefused", True)]
    after = world.records["one"]
    assert (after.weights, after.pinned) == (before.weights, before.pinned)
    assert world.state().step == 0
    world.ask("one", "pause")
    world.tick()
    assert "refused" not in world.view().message


@pytest.mark.parametrize("verb", ["pause", "resume", "promote", "abort", "retry", "undo"])
def test_without_a_rollout_there_is_nothing_to_act_on(verb: Verb) -> None:
    world = Rolling(model(rollout={}))
    (old,) = world.up()
    world.ask("one", verb)
    world.tick()
    assert f"{verb} was refused: " in world.view().message
    assert world.records["one"].weights == {old: WHOLE}
    fresh = Rolling(model(rollout={}))
    fresh.ask("one", verb)
    fresh.ticks(12)
    assert fresh.records["one"].weights == {old: WHOLE}


@pytest.mark.parametrize("verb", ["promote", "pause"])
def test_one_that_is_not_ready_is_not_promoted(verb: Verb) -> None:
    world, old, _ = rolling(LONG)
    world.tick()
    world.ask("one", verb)
    world.tick()
    assert ("promote was refused" in world.view().message) == (verb == "promote")
    world.ask("one", "pause")
    world.tick()
    assert ("pause was refused" in world.view().message) == (verb == "pause")
    assert world.records["one"].weights == {old: WHOLE}


def test_the_first_revision_cannot_be_aborted() -> None:
    world = Rolling(model(rollout={"limits": {"errorRate": 0.1}}))
    (first,) = world.up()
    world.ask("one", "abort")
    world.tick()
    assert "there is none to go back to" in world.view().message
    assert world.records["one"].weights == {first: WHOLE}


def test_an_action_is_taken_up_once_however_long_it_is_presented() -> None:
    world, _, _ = under_way()
    action = Action("promote", author="ada", at=1.0)
    for _ in range(30):
        world.actions["one"] = action
        world.tick()
    assert world.view().weight == 50
    world.actions.clear()
    world.tick()
    world.actions["one"] = action  # the same once more
    world.tick()
    assert world.view().weight == 100


def test_one_that_was_taken_up_before_a_crash_is_not_taken_up_again() -> None:
    world, _, _ = under_way()
    world.ask("one", "promote")
    world.crash = "records"
    world.tick()
    assert "one" in world.actions
    world.ticks(30)
    assert world.view().weight == 50


class TestUndo:
    def test_of_a_rollout_under_way_goes_back_to_what_stands(self) -> None:
        world, old, _ = under_way()
        starts = world.starts
        world.ask("one", "undo")
        plan = world.tick()
        assert plan.entries["one"].revisions == {old: WHOLE}
        world.ticks(60)
        assert world.starts == starts
        assert list(world.records["one"].revisions) == [old]

    def test_two_back_takes_one_step_and_holds_until_the_spec_changes(self) -> None:
        world, first, second = rolling({"steps": steps(50, 100)})
        world.until("one", "Completed")
        third = world.change("one", 3)
        world.until("one", "Completed")
        world.ticks(20)
        assert list(world.records["one"].revisions) == [third]
        world.ask("one", "undo", first)
        took = world.until("one", "Completed")
        assert took < 15
        world.ticks(200)
        assert world.records["one"].weights == {first: WHOLE}
        assert [step.weight for step in world.view().steps] == [100]
        assert world.records["one"].revisions[first].cause.startswith("undo to")
        world.change("one", 4)
        world.until("one", "Completed")
        assert first not in world.records["one"].weights
        assert second not in world.records["one"].weights

    def test_without_a_goal_goes_to_the_one_before(self) -> None:
        world, first, _ = rolling({"steps": steps(50, 100)})
        world.until("one", "Completed")
        world.ticks(20)
        world.ask("one", "undo")
        world.until("one", "Completed")
        assert world.records["one"].weights == {first: WHOLE}

    def test_one_that_was_given_up_is_not_the_one_before(self) -> None:
        world, first, bad = rolling({"steps": steps(50, 100)}, fault=Fault(load="LoadFailed"))
        world.until("one", "Aborted")
        third = world.change("one", 3)
        world.until("one", "Completed")
        world.ticks(20)
        world.ask("one", "undo")
        world.tick()
        world.until("one", "Completed")
        assert world.records["one"].weights == {first: WHOLE}
        assert {bad, third}.isdisjoint(world.records["one"].weights)

    def test_of_what_has_the_traffic_is_refused(self) -> None:
        world, _, second = rolling({"steps": steps(50, 100)})
        world.until("one", "Completed")
        world.ask("one", "undo", second)
        world.tick()
        assert "has all the traffic" in world.view().message

    def test_within_a_tight_budget_it_takes_the_steps(self) -> None:
        tight: dict[str, Any] = {"maxSurge": 1, "stableScalesDown": True, "minRequests": 0}
        tight["steps"] = steps(50, 100, hold=100.0)
        world, first, _ = rolling(tight, scaling={"minReplicas": 2, "maxReplicas": 2})
        world.until("one", "Completed")
        world.ticks(20)
        world.ask("one", "undo", first)
        assert world.until("one", "Completed") < 60
        assert world.records["one"].weights == {first: WHOLE}

    def test_is_not_compared_with_what_it_leaves(self) -> None:
        """Which may be faster, and wrong."""
        world, first, _ = rolling({"steps": steps(50, 100), "maxSurge": 1})
        world.until("one", "Completed")
        world.ticks(20)
        world.faults[first] = Fault(slow=5.0, errors=0.5)
        world.ask("one", "undo", first)
        world.until("one", "Completed", "Aborted")
        assert world.records["one"].weights == {first: WHOLE}

    def test_that_fails_leaves_what_serves(self) -> None:
        world, first, second = rolling({"steps": steps(50, 100)})
        world.until("one", "Completed")
        world.ticks(20)
        world.faults[first] = Fault(load="LoadFailed")
        world.ask("one", "undo", first)
        world.until("one", "Aborted")
        world.ticks(100)
        assert world.records["one"].weights == {second: WHOLE}
