"""Seats on GPUs: never more than there is, and each refusal with its sum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.control.builders import model
from tidegate.control.observed import Group, SourceState
from tidegate.control.packing import Need, Packing, Placement, place
from tidegate.control.reasons import Reason
from tidegate.control.room import WHOLE

GIB = 1 << 30
GPU = Group("gpu", gpus_per_worker=1, gpu_memory_bytes=24 * GIB, max_workers=1, cpus=8, memory_bytes=32 * GIB)
BIG = Group("big", gpus_per_worker=2, gpu_memory_bytes=80 * GIB, max_workers=1, cpus=8, memory_bytes=64 * GIB)
GPU_TOO = replace(GPU, name="gpu-too")
CPU = Group("cpu", max_workers=2, cpus=4, memory_bytes=8 * GIB)


def need(name: str, *, copies: int = 1, pinned: str = "", is_asleep: bool = False, **resources: Any) -> Need:
    spec = model(name, resources={"cpus": 0.1, **resources}).spec
    return Need((name, "r"), spec, None, copies, pinned, is_asleep)


def refused(packing: Packing, name: str) -> tuple[str, str]:
    assert (name, "r") not in packing.placements
    return packing.refusals[(name, "r")]


def test_two_models_share_a_gpu_and_the_third_is_told_the_sum() -> None:
    packing = place(
        [need("gptq", gpuMemory="9Gi"), need("half", gpuMemory="13Gi"), need("third", gpuMemory="8Gi")],
        [CPU, GPU],
    )
    assert packing.placements[("gptq", "r")] == Placement("gpu", 0.38, 24 * GIB * 38 // 100, 0)
    assert packing.placements[("half", "r")].gpus == 0.55
    assert packing.gpu_load["gpu"] == (93,)
    assert refused(packing, "third") == (
        "GpusTaken",
        "The replica needs 0.34 GPU of group gpu (resources.gpuMemory 8.00 GiB; a GPU has 24.00 GiB), and of "
        "its 1 GPU 0.93 are taken (half 0.55, gptq 0.38): raise maxWorkers of the group, or shrink or delete "
        "a model of the pool 'default'.",
    )


class TestParked:
    def parked(self, name: str, gibibytes: float, **resources: Any) -> Need:
        spec = model(
            name,
            engine={"name": "transformers"},
            source={"uri": "/w"},
            resources={"cpus": 0.1, **resources},
            scaling={"minReplicas": 0, "zero": "Parked"},
        ).spec
        return Need((name, "r"), spec, SourceState("resolved", weights_bytes=int(gibibytes * GIB)), 0)

    def test_weights_get_the_memory_that_replicas_leave(self) -> None:
        needs = [self.parked("a", 3, memory="2Gi"), self.parked("b", 2, memory="2Gi"), self.parked("c", 0.5)]
        packing = place([*needs, need("plain", memory="1Gi")], [replace(CPU, max_workers=1)])
        assert packing.refusals == {}
        assert {name: not why for (name, _), why in packing.parked.items()} == {
            "a": True,
            "b": False,
            "c": False,
        }
        assert packing.parked["b", "r"] == (
            "They take 2.00 GiB, and of the 8.00 GiB of memory that a worker of group cpu has, replicas may "
            "take 5.00 GiB and other parked weights 3.00 GiB: raise the group's memory, or park fewer models."
        )

    def test_what_takes_turns_leaves_nothing_to_park_in(self) -> None:
        needs = [self.parked(name, 1, memory="5Gi") for name in ("a", "b")]
        packing = place(needs, [replace(CPU, max_workers=1)])
        assert all(packing.parked.values())
        assert len(packing.placements) == 2

    def test_memory_that_is_not_counted_is_the_nodes_to_bound(self) -> None:
        assert place([self.parked("a", 900)], [replace(CPU, memory_bytes=0)]).parked == {("a", "r"): ""}

    def test_what_never_sleeps_is_not_parked(self) -> None:
        awake = replace(self.parked("a", 1), copies=1)
        assert place([awake], [CPU]).parked == {}


def test_the_smallest_group_that_holds_it_is_taken() -> None:
    packing = place([need("small", gpuMemory="20Gi"), need("large", gpuMemory="60Gi")], [BIG, GPU])
    assert packing.placements[("small", "r")].group == "gpu"
    assert packing.placements[("large", "r")] == Placement("big", 0.75, 60 * GIB, 0)


def test_a_full_group_gives_way_to_a_larger_one() -> None:
    packing = place([need("a", gpuMemory="20Gi"), need("b", gpuMemory="20Gi")], [BIG, GPU])
    assert packing.placements[("b", "r")].group == "big"


def test_a_named_group_is_taken_and_an_unknown_one_refused() -> None:
    packing = place([need("a", gpuMemory="8Gi", accelerator="big"), need("b", accelerator="tpu")], [BIG, GPU])
    assert packing.placements[("a", "r")] == Placement("big", 0.1, 8 * GIB, 0)
    reason, message = refused(packing, "b")
    assert reason == "NoSuchGroup"
    assert "'tpu'" in message
    assert "big, gpu" in message


def test_what_runs_stays_where_it_runs() -> None:
    needs = [need("new", gpuMemory="20Gi"), need("old", gpuMemory="20Gi", pinned="gpu")]
    packing = place(needs, [GPU])
    assert ("old", "r") in packing.placements
    assert refused(packing, "new")[0] == "GpusTaken"
    assert (
        place([need("old", gpuMemory="8Gi", pinned="big")], [BIG, GPU]).placements[("old", "r")].group
        == "big"
    )


def test_a_group_that_left_the_pool_is_left_for_another() -> None:
    packing = place([need("a", gpuMemory="8Gi", pinned="gone")], [GPU])
    assert packing.placements[("a", "r")].group == "gpu"


def test_more_replicas_than_places_are_told_and_what_runs_stays() -> None:
    packing = place([need("a", gpuMemory="13Gi", copies=3, pinned="gpu")], [GPU])
    assert packing.placements[("a", "r")].group == "gpu"
    reason, message = packing.refusals[("a", "r")]
    assert (reason, "2 of 3 replicas" in message) == ("GpusTaken", True)
    assert refused(place([need("a", gpuMemory="13Gi", copies=3)], [GPU]), "a")[0] == "GpusTaken"


def test_who_is_refused_takes_nothing() -> None:
    packing = place([need("a", gpuMemory="13Gi", copies=3), need("b", gpuMemory="20Gi")], [GPU])
    assert refused(packing, "a")[0] == "GpusTaken"
    assert packing.placements[("b", "r")].group == "gpu"


@pytest.mark.parametrize(
    ("wanted", "reason", "words"),
    [
        (
            {"gpuMemory": "100Gi", "accelerator": "gpu"},
            "TooLittleGpuMemory",
            "100.00 GiB) and a GPU of group gpu has 24.00 GiB",
        ),
        ({"cpus": 99}, "TooFewCpus", "99 CPU cores"),
        ({"memory": "99Gi"}, "TooLittleMemory", "99.00 GiB"),
        ({"gpus": 2, "accelerator": "gpu"}, "TooFewGpus", "asks for 2 GPUs"),
    ],
)
def test_what_can_never_fit(wanted: dict[str, Any], reason: str, words: str) -> None:
    found, message = refused(place([need("a", **wanted)], [CPU, GPU]), "a")
    assert found == reason
    assert words in message


def test_without_gpus_in_the_pool() -> None:
    reason, message = refused(place([need("a", gpuMemory="1Gi")], [CPU]), "a")
    assert (reason, "no group of the pool" in message) == ("NoSuchGroup", True)


def test_a_share_that_is_written_down_stands() -> None:
    packing = place([need("a", gpus=0.5), need("b", gpus=2)], [GPU, BIG])
    assert packing.placements[("a", "r")] == Placement("gpu", 0.5, 12 * GIB, 0)
    assert packing.placements[("b", "r")] == Placement("big", 2, 160 * GIB, 0)


def test_a_share_too_small_for_the_checkpoint_is_refused() -> None:
    wanted = model(
        "a",
        engine={"name": "transformers", "kvCacheBytes": GIB},
        source={"uri": "/w"},
        resources={"gpus": 0.25},
    )
    from tidegate.control.observed import SourceState

    found = SourceState("resolved", "/w", 10 * GIB, "none", "float16")
    reason, message = refused(place([Need(("a", "r"), wanted.spec, found)], [GPU]), "a")
    assert reason == "TooLittleGpuMemory"
    assert "weights 10.50 GiB + KV cache 1.00 GiB + runtime 1.00 GiB = 12.50 GiB" in message
    assert "0.25 GPUs that spec.resources.gpus asks for in group gpu have 6.00 GiB" in message


def test_an_engine_for_one_gpu_gets_no_two() -> None:
    transformers = model(
        "a", engine={"name": "transformers"}, source={"uri": "/w"}, resources={"gpuMemory": "100Gi"}
    )
    assert refused(place([Need(("a", "r"), transformers.spec, None)], [BIG]), "a")[0] == "TooLittleGpuMemory"
    packing = place([need("a", gpuMemory="100Gi")], [BIG])
    assert packing.placements[("a", "r")].gpus == 2


def test_cpu_models_take_cores_and_reserved_memory() -> None:
    packing = place([need(str(number), cpus=3) for number in range(3)], [GPU, CPU])
    assert packing.placements[("0", "r")] == Placement("cpu", 0, 0, 0)
    assert refused(packing, "2")[0] == "CpusTaken"
    packing = place([need(str(number), memory="5Gi") for number in range(3)], [CPU])
    assert packing.placements[("1", "r")] == Placement("cpu", 0, 5 * GIB, 5 * GIB)
    assert refused(packing, "2")[0] == "MemoryTaken"


class TestThoseThatMaySleep:
    def test_they_hold_nothing_and_all_have_a_place(self) -> None:
        packing = place([need(str(number), gpuMemory="16Gi", copies=0) for number in range(9)], [GPU])
        assert {item.gpus for item in packing.placements.values()} == {0.67}
        assert (len(packing.placements), dict(packing.refusals), packing.gpu_load["gpu"]) == (9, {}, ())

    def test_one_must_fit_beside_what_is_always_there(self) -> None:
        fixed = need("fixed", gpuMemory="9Gi")
        packing = place([fixed, need("small", gpuMemory="14Gi", copies=0)], [GPU])
        assert packing.placements[("small", "r")].gpus == 0.59
        packing = place([fixed, need("large", gpuMemory="15Gi", copies=0)], [GPU])
        reason, message = refused(packing, "large")
        assert (reason, "0.38 are taken (fixed 0.38)" in message) == ("GpusTaken", True)

    def test_what_comes_later_leaves_them_room_to_wake(self) -> None:
        sleeper = need("sleeper", cpus=3, copies=0, pinned="cpu", is_asleep=True)
        packing = place([need("one", cpus=2), need("two", cpus=2), need("three", cpus=2), sleeper], [CPU])
        assert {name for name, _ in packing.placements} == {"sleeper", "one", "two"}
        reason, message = refused(packing, "three")
        assert (reason, "beside it sleeper could never wake" in message) == ("CpusTaken", True)

    def test_a_grown_one_that_is_older_takes_the_place_of_one_asleep_but_not_of_one_awake(self) -> None:
        grown = need("grown", cpus=4, copies=2, pinned="cpu")
        asleep = need("sleeper", cpus=1, copies=0, pinned="cpu", is_asleep=True)
        assert refused(place([grown, asleep], [CPU]), "sleeper")[0] == "CpusTaken"
        awake = need("sleeper", cpus=1, copies=0, pinned="cpu")
        packing = place([grown, awake], [CPU])
        assert packing.placements[awake.key].group == "cpu"
        assert packing.refusals[awake.key][0] == "CpusTaken"

    def test_they_spread_over_groups_as_far_as_there_is_room_for_all(self) -> None:
        crowd = [need(str(number), gpuMemory="20Gi", copies=0) for number in range(6)]
        found = [item.group for item in place(crowd, [BIG, GPU]).placements.values()]
        assert found == ["gpu", "big", "big", "big", "big", "big"]
        crowd = [need(str(number), gpuMemory="23Gi", copies=0) for number in range(12)]
        placed = place(crowd, [GPU, GPU_TOO]).placements.values()
        assert sorted(item.group for item in placed) == ["gpu"] * 6 + ["gpu-too"] * 6


groups = st.lists(
    st.builds(
        lambda number, gpus, memory, workers, cpus: Group(
            f"g{number}", gpus, memory * GIB if gpus else 0, workers, 0, cpus, 64 * GIB
        ),
        st.integers(0, 100),
        st.integers(0, 4),
        st.integers(1, 80),
        st.integers(0, 4),
        st.integers(1, 8),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda group: group.name,
)
wishes = st.one_of(
    st.fixed_dictionaries({"gpuMemory": st.integers(1, 200).map(lambda size: f"{size}Gi")}),
    st.fixed_dictionaries({"gpus": st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1, 2, 4])}),
    st.fixed_dictionaries({"memory": st.integers(1, 80).map(lambda size: f"{size}Gi")}),
    st.fixed_dictionaries({"cpus": st.floats(0, 9)}),
)
crowds = st.lists(st.tuples(wishes, st.integers(0, 4), st.booleans()), max_size=14)


@settings(max_examples=300, deadline=None)
@given(groups, crowds)
def test_no_gpu_is_ever_given_twice(there: Sequence[Group], crowd: list[Any]) -> None:
    needs = [
        need(f"m{number}", copies=copies, pinned=there[0].name if is_pinned else "", **wish)
        for number, (wish, copies, is_pinned) in enumerate(crowd)
    ]
    packing = place(needs, there)
    by_name = {group.name: group for group in there}
    for name, load in packing.gpu_load.items():
        group = by_name[name]
        assert all(0 <= taken <= WHOLE for taken in load)
        assert len(load) <= group.max_workers * group.gpus_per_worker
    given_out = sum(sum(load) for load in packing.gpu_load.values())
    seated = [item for item in needs if item.key in packing.placements and item.key not in packing.refusals]
    assert given_out >= sum(round(packing.placements[item.key].gpus * WHOLE) * item.copies for item in seated)
    for item in needs:
        placement, refusal = packing.placements.get(item.key), packing.refusals.get(item.key)
        assert placement is not None or refusal is not None
        if placement is not None and item.spec.resources.gpu_memory:
            assert placement.memory_cap_bytes >= item.spec.resources.gpu_memory_bytes
        if refusal is not None:
            assert refusal[0] in {*Reason}
            assert refusal[0] == "NoSuchGroup" or re.search(r"\d", refusal[1]), "no sum is written out"


@settings(deadline=None)
@given(groups, crowds)
def test_the_same_question_gets_the_same_answer(there: Sequence[Group], crowd: list[Any]) -> None:
    """Who is seated once keeps the seat: asked again with what was found, nothing moves."""
    needs = [need(f"m{number}", copies=copies, **wish) for number, (wish, copies, _) in enumerate(crowd)]
    first = place(needs, there)
    again = [
        Need(item.key, item.spec, None, item.copies, first.placements[item.key].group)
        for item in needs
        if item.key in first.placements
    ]
    second = place(again, there)
    assert dict(second.placements) == dict(first.placements)
    assert not second.refusals
