"""How many replicas both revisions may have, and which Models of a Pool roll at a time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from pydantic import ValidationError

from tests.unit.control.builders import NOW, model
from tests.unit.control.rolling import Fault, Rolling
from tests.unit.control.test_rollout import rolling, steps
from tidegate.control.desired import WHOLE, ModelRecord, RevisionRecord
from tidegate.control.observed import ApplicationState, Group, Observation, ReplicaState, ServeState
from tidegate.control.rollout_schema import RolloutSpec, peak_replicas
from tidegate.control.rollout_state import RolloutState
from tidegate.control.room import Seat
from tidegate.control.surge import Held, bounds_of, has_room
from tidegate.control.surge import Rolling as Coming

FINE = steps(25, 50, 75, 100, hold=3.0)


class TestOneModel:
    def test_the_peak_keeps_to_the_budget_and_the_stable_shrinks(self) -> None:
        world, _, new = rolling(
            {"maxSurge": 1, "stableScalesDown": True, "steps": FINE, "minRequests": 1},
            scaling={"minReplicas": 4, "maxReplicas": 4},
        )
        world.until("one", "Completed")
        world.ticks(20)
        assert world.peaks["one"] == 5
        assert world.ready("one", new) == 4

    def test_the_stable_keeps_what_it_had(self) -> None:
        world, old, _ = rolling(
            {"steps": FINE, "minRequests": 1}, scaling={"minReplicas": 3, "maxReplicas": 4}
        )
        world.until("one", "Progressing")
        while world.view().phase == "Progressing":
            assert world.ready("one", old) == 3
            world.tick()
        assert world.view().phase == "Completed"

    def test_never_below_min_available(self) -> None:
        world, old, _ = rolling(
            {"minAvailable": 2, "stableScalesDown": True, "steps": FINE, "minRequests": 1},
            scaling={"minReplicas": 3, "maxReplicas": 3},
        )
        fewest = 3
        while world.view().phase != "Completed" or world.view().target == old:
            fewest = min(fewest, world.ready("one", old))
            world.tick()
        assert fewest == 2

    def test_both_grow_by_their_own_load_within_the_budget(self) -> None:
        world, old, new = rolling(
            {"maxSurge": 2, "steps": steps(50, 100, hold=60.0)}, scaling={"minReplicas": 1, "maxReplicas": 2}
        )
        world.until("one", "Progressing")
        for revision in (old, new):
            world.queues["one", revision] = ["x"] * 1000
        world.ticks(8)
        assert (world.ready("one", old), world.ready("one", new)) == (2, 2)
        assert world.peaks["one"] == 4

    def test_what_an_abort_leaves_counts_until_it_has_gone(self) -> None:
        world, old, new = rolling(
            {"maxSurge": 1, "stableScalesDown": True, "steps": FINE, "minRequests": 1},
            scaling={"minReplicas": 4, "maxReplicas": 4},
        )
        while world.view().weight < 75:
            world.tick()
        world.faults[new] = Fault(errors=0.9)
        world.until("one", "Aborted")
        world.ticks(60)
        assert (world.peaks["one"], world.ready("one", old)) == (5, 4)


def gpus(share: float) -> dict[str, Any]:
    return {"gpus": share}


class TestAccelerators:
    """From half-precision weights on 0.67 of a GPU to quantized ones on 0.3."""

    def rolling(
        self, rollout: dict[str, Any], shares: tuple[float, float] = (0.67, 0.3), most: int = 1
    ) -> tuple[Rolling, str, str]:
        quick = {"steps": steps(50, 100), "minRequests": 1}
        scaling = {"minReplicas": most, "maxReplicas": most}
        first = model(rollout={**quick, **rollout}, resources=gpus(shares[0]), scaling=scaling)
        world = Rolling(first, gpus=64)
        (old,) = world.up()
        world.rates = {"one": 20}
        world.ticks(5)
        return world, old, world.change("one", 2, resources=gpus(shares[1]))

    def test_the_sum_of_both_shares_keeps_to_the_bound(self) -> None:
        world, old, _ = self.rolling({"maxSurgeAccelerators": 0.3})
        world.until("one", "Completed")
        world.ticks(20)
        assert world.gpu_peaks["one"] == pytest.approx(0.97)
        world.ask("one", "undo")
        world.until("one", "Progressing")
        world.until("one", "Completed")
        assert world.view().target == old
        assert world.gpu_peaks["one"] == pytest.approx(0.97)

    def test_the_stable_shrinks_by_its_own_share(self) -> None:
        fine = {"stableScalesDown": True, "steps": FINE, "minRequests": 1}
        world, _, new = self.rolling({**fine, "maxSurgeAccelerators": 0.5}, (1, 0.5), most=4)
        world.until("one", "Completed")
        world.ticks(20)
        assert (world.gpu_peaks["one"], world.ready("one", new)) == (4.5, 4)

    def test_no_part_of_a_share_is_given_out(self) -> None:
        shrinking = {
            "stableScalesDown": True,
            "steps": steps(50, 100, hold=60.0),
            "maxSurgeAccelerators": 0.5,
        }
        needs: dict[str, Any] = {"resources": gpus(0.5), "scaling": {"minReplicas": 1, "maxReplicas": 2}}
        world = Rolling(model(rollout=shrinking, **needs), gpus=64)
        (old,) = world.up()
        world.rates = {"one": 20}
        world.ticks(5)
        new = world.change("one", 2, resources=gpus(0.3))
        world.until("one", "Progressing")
        for revision in (old, new):
            world.queues["one", revision] = ["x"] * 1000
        world.ticks(8)
        assert (world.ready("one", old), world.ready("one", new)) == (1, 2)

    def test_one_that_cannot_fit_is_refused_with_the_sum_until_the_bound_is_raised(self) -> None:
        world, old, new = self.rolling({"maxSurgeAccelerators": 0.23})
        world.ticks(30)
        words = (
            "rollout.maxSurgeAccelerators is 0.23: with scaling.maxReplicas 1 both revisions may take "
            "0.9 GPU together, and the rollout of 1 needs 1 x 0.67 + 1 x 0.3 = 0.97 of it; raise "
            "maxSurgeAccelerators to 0.3"
        )
        assert world.view().phase == "Queued"
        assert words in world.view().message
        assert world.said("one", "Scheduled") == ("False", "SurgeTooSmall")
        assert world.said("one", "Progressing") == ("False", "Settled")
        assert world.said("one", "Ready") == ("True", "Serving")
        assert list(world.starts_of) == [old]
        world.change_rollout("one", maxSurgeAccelerators=0.3)
        world.until("one", "Completed")
        assert list(world.records["one"].weights) == [new]

    def test_a_bound_that_gets_too_small_on_the_way_is_told(self) -> None:
        world, _, _ = self.rolling({"maxSurgeAccelerators": 0.3})
        world.until("one", "Progressing")
        world.change_rollout("one", maxSurgeAccelerators=0.1)
        world.tick()
        assert world.said("one", "Scheduled") == ("False", "SurgeTooSmall")
        assert world.view().phase == "Progressing"

    def test_what_is_too_large_holds_nobody_up(self) -> None:
        world, _, _ = self.rolling({"maxSurgeAccelerators": 0.1})
        world.models.append(model("two", rollout={"steps": steps(100), "minRequests": 0}))
        world.ticks(20)
        world.change("two", 2)
        world.until("two", "Completed")
        assert world.view().phase == "Queued"

    def test_the_stable_keeps_what_takes_so_much(self) -> None:
        keeping = {"minAvailableAccelerators": 1.1, "stableScalesDown": True, "steps": FINE, "minRequests": 1}
        world, old, _ = self.rolling(keeping, (0.5, 0.25), most=4)
        fewest = 4
        while world.view().phase != "Completed" or world.view().target == old:
            fewest = min(fewest, world.ready("one", old))
            world.tick()
        assert fewest == 3

    @pytest.mark.parametrize(
        ("rollout", "shares", "most", "words"),
        [
            (
                {"minAvailableAccelerators": 1},
                (0.5, 0.5),
                1,
                "is 2 replicas of 0.5 GPU, above scaling.maxRep",
            ),
            (
                {"minAvailableAccelerators": 1, "maxSurge": 1, "stableScalesDown": True},
                (0.5, 0.5),
                2,
                "needs 4; raise maxSurge to 2",
            ),
            ({"maxSurgeAccelerators": 0.4}, (0.5, 1), 1, "1 x 0.5 + 1 x 1 = 1.5 of it"),
        ],
        ids=["more than there are", "with replicas", "a larger target"],
    )
    def test_every_bound_is_in_the_sum(
        self, rollout: dict[str, Any], shares: tuple[float, float], most: int, words: str
    ) -> None:
        world, _, _ = self.rolling(rollout, shares, most)
        world.ticks(3)
        assert world.said("one", "Scheduled") == ("False", "SurgeTooSmall")
        assert words in world.view().message


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"maxSurge": 1, "maxSurgeAccelerators": 1}, "give maxSurge or maxSurgeAccelerators, one of them"),
        (
            {"minAvailable": 1, "minAvailableAccelerators": 1},
            "give minAvailable or minAvailableAccelerators, one of them",
        ),
        ({"strategy": "Recreate", "minAvailableAccelerators": 1}, "leave minAvailableAccelerators 0"),
    ],
)
def test_one_number_bounds_one_thing(rollout: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        model(rollout=rollout, resources=gpus(1))


@pytest.mark.parametrize("field", ["maxSurgeAccelerators", "minAvailableAccelerators"])
def test_what_takes_no_accelerator_is_counted_in_replicas(field: str) -> None:
    for device in ("cpu", "auto"):
        with pytest.raises(ValidationError, match="a replica takes none; give maxSurge and minAvailable, in"):
            model(rollout={field: 1}, device=device)


@pytest.mark.parametrize(
    ("rollout", "most", "words"),
    [
        (
            {"maxSurge": 0},
            1,
            "rollout.maxSurge is 0: with scaling.maxReplicas 1 both revisions may have 1 replicas together, "
            "and the rollout of 1 needs 2; raise maxSurge to 1",
        ),
        ({"maxSurge": 1}, 4, "the rollout of 4 needs 8; raise maxSurge to 4"),
        ({"maxSurge": 1, "stableScalesDown": True}, 4, "needs 6; raise maxSurge to 2"),
        ({"strategy": "BlueGreen", "maxSurge": 1}, 2, "needs 4; raise maxSurge to 2"),
        ({"minAvailable": 3}, 2, "rollout.minAvailable (3) is above scaling.maxReplicas (2)"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_sum(rollout: dict[str, Any], most: int, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        model(rollout=rollout, scaling={"maxReplicas": most})
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("rollout", "most"),
    [
        ({"maxSurge": 1}, 1),
        ({"maxSurge": 4}, 4),
        ({"maxSurge": 1, "stableScalesDown": True, "steps": FINE}, 4),
        ({"strategy": "Recreate", "maxSurge": 0}, 4),
        ({}, 64),
    ],
)
def test_what_fits_is_taken(rollout: dict[str, Any], most: int) -> None:
    assert model(rollout=rollout, scaling={"maxReplicas": most}).spec.rollout is not None


@given(
    st.integers(1, 30),
    st.lists(st.integers(1, 99), max_size=5, unique=True).map(sorted),
    st.booleans(),
    st.integers(0, 5),
)
def test_a_peak_is_no_less_than_either_end(size: int, weights: list[int], gives: bool, least: int) -> None:
    spec = RolloutSpec.model_validate(
        {
            "steps": [{"weight": weight} for weight in [*weights, 100]],
            "stableScalesDown": gives,
            "minAvailable": least,
        }
    )
    peak = peak_replicas(spec, size)
    assert max(size, least) < peak <= max(size, least) + size


STATE = RolloutState("1", "new", "old", "Canary", "Progressing", NOW, weight=25, ready_for=50, size=4)
RECORD = ModelRecord(
    "one",
    1,
    {"new": 25, "old": 75},
    {name: RevisionRecord(name, {}) for name in ("old", "new")},
    rollout=STATE,
)
SHRINKING = model(
    rollout={"maxSurge": 1, "stableScalesDown": True, "steps": FINE},
    scaling={"minReplicas": 4, "maxReplicas": 4},
).spec


def standing(revision: str, staying: int, ending: int, least: int, most: int) -> ApplicationState:
    """An application that was told to keep to these numbers."""
    scaling = {"min_replicas": least, "max_replicas": most, "upscale_delay_s": 0.0}
    replicas = [ReplicaState(f"{revision}{n}", "RUNNING", 1, "n") for n in range(staying)]
    replicas += [ReplicaState(f"{revision}e{n}", "STOPPING", 1, "n") for n in range(ending)]
    config = {"deployments": [{"autoscaling_config": scaling}]}
    return ApplicationState(f"one--{revision}", "RUNNING", "", config, staying, tuple(replicas))


@pytest.mark.parametrize(
    ("old", "new", "others", "bounds"),
    [
        ((4, 0, 4, 4), (1, 0, 1, 1), (), {"new": (1, 1), "old": (3, 3)}),
        ((3, 0, 3, 4), (1, 0, 1, 1), (), {"new": (1, 1), "old": (3, 3)}),
        ((3, 1, 3, 3), (1, 0, 1, 1), (), {"new": (1, 1), "old": (3, 3)}),
        ((3, 0, 3, 3), (1, 0, 1, 1), (), {"new": (2, 2), "old": (3, 3)}),
        ((3, 0, 3, 3), (1, 0, 1, 1), ((0, 1, 0, 0),), {"new": (1, 1), "old": (3, 3)}),
        ((3, 0, 3, 3), (2, 0, 2, 2), (), {"new": (2, 2), "old": (3, 3)}),
    ],
    ids=[
        "it is told to shrink",
        "it was told of more",
        "one ends",
        "there is room",
        "of before",
        "both have",
    ],
)
def test_room_is_given_on_when_it_is_free(
    old: tuple[int, int, int, int],
    new: tuple[int, int, int, int],
    others: tuple[tuple[int, int, int, int], ...],
    bounds: dict[str, tuple[int, int]],
) -> None:
    """Serve scales by itself up to what it was told last, and what ends holds its room."""
    found = [standing("old", *old), standing("new", *new), *(standing("gone", *each) for each in others)]
    seen = Observation(ServeState("c", {each.name: each for each in found}))
    given = bounds_of(SHRINKING, RECORD, {}, seen)
    assert {name: (each.least, each.most) for name, each in given.items()} == bounds


def test_nothing_starts_while_something_goes_that_serve_does_not_show() -> None:
    going = ApplicationState("one--gone", "DELETING")
    found = [standing("old", 3, 0, 3, 3), standing("new", 1, 0, 1, 1), going]
    given = bounds_of(
        SHRINKING, RECORD, {}, Observation(ServeState("c", {each.name: each for each in found}))
    )
    assert given["new"].most == 1


def test_without_a_rollout_there_are_no_bounds() -> None:
    assert bounds_of(SHRINKING, ModelRecord("one", 1), {}, Observation(None)) == {}
    over = replace(RECORD, rollout=replace(STATE, phase="Completed"), weights={"new": WHOLE})
    alone = Observation(ServeState("c", {"one--new": standing("new", 4, 0, 4, 4)}))
    assert bounds_of(SHRINKING, over, {}, alone) == {}
    both = {each.name: each for each in (standing("new", 4, 0, 4, 4), standing("old", 1, 0, 1, 1))}
    given = bounds_of(SHRINKING, over, {"old": 3}, Observation(ServeState("c", both)))
    assert (given["new"].most, given["old"].most) == (4, 1)


class TestPool:
    """`cpus` has room for the models and some replicas more, a tenth of a core each."""

    def rolling_at_once(self, extra: int, **rollout: Any) -> Rolling:
        names = ("one", "two", "three")
        plain = {"steps": steps(50, 100), "minRequests": 1, **rollout}
        world = Rolling(*(model(name, rollout=plain) for name in names), cpus=0.1 * (3 + extra) + 0.001)
        world.up(*names)
        world.rates = dict.fromkeys(names, 20)
        world.ticks(5)
        for name in names:
            world.change(name, 2)
        return world

    def test_with_room_for_one_they_go_one_after_the_other(self) -> None:
        world = self.rolling_at_once(1)
        world.tick()
        assert [world.view(name).position for name in ("one", "two", "three")] == [1, 0, 2] or [
            world.view(name).phase for name in ("one", "two", "three")
        ].count("Queued") == 2
        waiting = [world.view(name) for name in ("one", "two", "three") if world.view(name).position]
        assert sorted(view.position for view in waiting) == [1, 2]
        assert {view.phase for view in waiting} == {"Queued"}
        assert world.said(waiting[0].model, "Progressing") == ("True", "RolloutQueued")
        assert f"number {waiting[0].position} in the line" in waiting[0].message
        most = 0
        for _ in range(300):
            world.tick()
            most = max(most, sum(len(each.replicas) for each in world.standing.values()))
            busy = [name for name in ("one", "two", "three") if world.view(name).phase != "Completed"]
            if not busy:
                break
        assert not busy
        assert most == 4

    def test_with_room_for_all_they_go_at_once(self) -> None:
        world = self.rolling_at_once(3)
        world.tick()
        assert [world.view(name).position for name in ("one", "two", "three")] == [0, 0, 0]

    def test_one_that_is_given_up_lets_the_next_go(self) -> None:
        world = self.rolling_at_once(1)
        world.tick()
        first = next(name for name in ("one", "two", "three") if not world.view(name).position)
        world.faults[world.view(first).target] = Fault(load="LoadFailed")
        for _ in range(300):
            world.tick()
        phases = {name: world.view(name).phase for name in ("one", "two", "three")}
        assert phases[first] == "Completed" or phases[first] == "Aborted"
        assert [phase for name, phase in phases.items() if name != first] != ["Queued", "Queued"]

    def test_a_model_that_waits_serves(self) -> None:
        world = self.rolling_at_once(1)
        world.tick()
        for name in ("one", "two", "three"):
            assert world.said(name, "Ready") == ("True", "Serving")
            assert sum(world.entries[name].revisions.values()) == WHOLE


class TestCluster:
    """Models of one GPU each, in a group with some."""

    def rolling_at_once(self, gpus: int, *names: str, **rollout: Any) -> Rolling:
        plain = {"steps": steps(50, 100), "minRequests": 1, **rollout}
        needs = {"gpus": 1, "gpuMemory": "10Gi"}
        world = Rolling(*(model(name, rollout=plain, resources=needs, device="cuda") for name in names))
        world.groups = (Group("l4", gpus, 24 << 30, max_workers=1, cpus=64),)
        world.up(*names)
        world.rates = dict.fromkeys(names, 20)
        world.ticks(5)
        for name in names:
            world.change(name, 2)
        return world

    def test_with_a_gpu_for_one_they_go_one_after_the_other(self) -> None:
        world = self.rolling_at_once(3, "one", "two")
        world.ticks(2)
        phases = {name: world.view(name).phase for name in ("one", "two")}
        assert sorted(phases.values()) == ["Queued", "Warming"]
        most = 0
        for _ in range(120):
            world.tick()
            most = max(most, sum(len(each.replicas) for each in world.standing.values()))
        assert [world.view(name).phase for name in ("one", "two")] == ["Completed", "Completed"]
        assert most == 3

    def test_shares_follow_from_memory(self) -> None:
        """10 GiB of a GPU of 24 are 0.42 of it, and 6 GiB 0.25."""
        plain = {"steps": steps(50, 100), "minRequests": 1, "maxSurgeAccelerators": 0.24}
        world = Rolling(model(rollout=plain, resources={"gpuMemory": "10Gi"}))
        world.groups = (Group("l4", 1, 24 << 30, max_workers=2, cpus=64),)
        world.up()
        world.rates = {"one": 20}
        world.ticks(5)
        world.change("one", 2, resources={"gpuMemory": "6Gi"})
        world.ticks(20)
        assert "1 x 0.42 + 1 x 0.25 = 0.67 of it; raise maxSurgeAccelerators to 0.25" in world.view().message
        assert world.said("one", "Progressing") == ("False", "Settled")
        world.change_rollout("one", maxSurgeAccelerators=0.25)
        world.until("one", "Completed")
        assert world.gpu_peaks["one"] == pytest.approx(0.67)

    def test_one_that_can_never_fit_is_told_the_sum_and_holds_nobody_up(self) -> None:
        world = self.rolling_at_once(1, "one")
        world.ticks(30)
        assert world.view().phase == "Queued"
        assert "of its 1 GPU 1 are taken (its own revision" in world.view().message
        assert world.said("one", "Scheduled") == ("False", "GpusTaken")
        assert world.said("one", "Ready") == ("True", "Serving")
        world.groups = (Group("l4", 2, 24 << 30, max_workers=1, cpus=64),)
        world.until("one", "Completed")

    def test_recreate_needs_no_second_gpu(self) -> None:
        world = self.rolling_at_once(1, "one", strategy="Recreate", steps=steps(100))
        world.until("one", "Completed")
        assert world.peaks["one"] == 1
        world.change("one", 3)
        world.faults[world.change("one", 3)] = Fault(load="LoadFailed")
        world.until("one", "Aborted")
        world.ticks(20)
        assert world.said("one", "Ready") == ("True", "Serving")


GROUP = Group("g", gpus_per_worker=1, gpu_memory_bytes=1, max_workers=2, cpus=4)
WHOLE_GPU = Seat(100, 1000, 0)


@pytest.mark.parametrize(
    ("held", "begun", "extra", "fits"),
    [
        (0, (), 2, True),
        (0, (), 3, False),
        (1, (), 1, True),
        (1, (), 2, False),
        (0, (Coming("g", WHOLE_GPU, 1),), 1, True),
        (0, (Coming("g", WHOLE_GPU, 2),), 1, False),
        (1, (Coming("g", WHOLE_GPU, 1, present=1),), 1, True),
        (0, (Coming("other", WHOLE_GPU, 2),), 2, True),
    ],
)
def test_room_is_counted_with_what_others_will_need(
    held: int, begun: tuple[Coming, ...], extra: int, fits: bool
) -> None:
    standing = [Held("g", WHOLE_GPU, f"n{number}") for number in range(held)]
    assert has_room(Coming("g", WHOLE_GPU, extra), begun, standing, [GROUP]) is fits
    assert not has_room(Coming("nowhere", WHOLE_GPU, 1), begun, standing, [GROUP])
