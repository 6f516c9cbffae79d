"""Seats on workers and GPUs."""

from __future__ import annotations

from tidegate.control.observed import Group
from tidegate.control.room import Room, seat_of

GROUP = Group("g", gpus_per_worker=2, gpu_memory_bytes=1, max_workers=2, cpus=4, memory_bytes=8)


def test_the_fullest_gpu_is_shared_and_a_worker_is_opened_where_none_has_room() -> None:
    room = Room(GROUP)
    for gpus in (0.3, 0.6, 0.6, 1):
        assert room.take(seat_of(gpus, 0.1, 0)) is not None
    assert [worker.gpus for worker in room.workers] == [[90, 60], [100, 0]]
    assert room.fits(seat_of(0.4, 0, 0))
    assert not room.fits(seat_of(2, 0, 0))


def test_all_copies_are_seated_or_none() -> None:
    room = Room(GROUP)
    assert room.take(seat_of(0, 3, 0), 3) is None
    assert room.take(seat_of(0, 4, 8), 2) is not None
    assert not room.fits(seat_of(0, 0.1, 0))
    assert room.fits(seat_of(0.5, 0, 0))


def test_what_runs_is_seated_where_it_runs() -> None:
    room = Room(GROUP, ["a", "b", "too-many"])
    assert [worker.node for worker in room.workers] == ["a", "b"]
    assert room.take_on("b", seat_of(0, 3, 0)) is not None
    assert room.take_on("b", seat_of(0, 3, 0)) is None
    assert room.take_on("c", seat_of(0, 1, 0)) is None, "there may be no third worker"
    spot = room.take_on("a", seat_of(0, 3, 0))
    assert spot is not None
    room.give_back(seat_of(0, 3, 0), [spot])
    assert room.fits(seat_of(2, 4, 8))


def test_parts_are_rounded_up_but_not_what_floats_add() -> None:
    assert seat_of(0.005, 0.1 + 0.2, 0) == seat_of(0.01, 0.3, 0)
