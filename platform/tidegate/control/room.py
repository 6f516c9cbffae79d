"""A room is a group of workers while it is filled with replicas: which worker and GPU a seat takes. Pure.

A seat lies within one worker and a shared one within one GPU. Where a replica runs is known; for one to come
the fullest that fits is taken, though Ray may choose another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from tidegate.control.observed import Group

WHOLE = 100  # a GPU in hundredths, the steps in which one is shared
MILLI = 1000


@dataclass(frozen=True, slots=True)
class Seat:
    """The share of one worker that a replica takes. `hundredths` above `WHOLE` are whole GPUs; `text` says
    how their memory adds up."""

    hundredths: int
    cpus_milli: int
    memory_bytes: int
    text: str = field(default="", compare=False)


def seat_of(gpus: float, cpus: float, memory_bytes: int, text: str = "") -> Seat:
    """Return the seat of these amounts, rounded up."""
    return Seat(hundredths(gpus), math.ceil(round(cpus * MILLI, 6)), memory_bytes, text=text)


def hundredths(gpus: float) -> int:
    """Return the share of a GPU, or the GPUs, in the steps in which one is shared, rounded up."""
    return math.ceil(round(gpus * WHOLE, 6))


@dataclass(slots=True, eq=False)
class Worker:
    gpus: list[int]  # hundredths taken
    node: str = ""  # where it runs, as far as known
    cpus_milli: int = 0
    memory_bytes: int = 0


Spot = tuple[Worker, list[int]]  # and the numbers of its GPUs


class Room:
    """Workers are opened one by one; those on `nodes` are there from the start."""

    def __init__(self, group: Group, nodes: Iterable[str] = ()) -> None:
        self.group = group
        self.workers: list[Worker] = []
        for node in nodes:
            if (worker := self._fresh(node)) is not None:
                self.workers.append(worker)

    def take(self, seat: Seat, copies: int = 1) -> list[Spot] | None:
        """Take seats for all copies, or none."""
        taken: list[Spot] = []
        for _ in range(copies):
            spot = self._spot(seat)
            if spot is None:
                self.give_back(seat, taken)
                return None
            self.put(seat, spot)
            taken.append(spot)
        return taken

    def take_on(self, node: str, seat: Seat) -> Spot | None:
        """Take a seat on the worker of this node, which is opened where it is not."""
        worker = next((each for each in self.workers if each.node == node), None)
        spot = self._on(worker or self._fresh(node), seat)
        if spot is not None:
            self.put(seat, spot)
        return spot

    def put(self, seat: Seat, spot: Spot) -> None:
        """Take a spot that is known to be free."""
        if spot[0] not in self.workers:
            self.workers.append(spot[0])
        _fill(spot, seat, 1)

    def give_back(self, seat: Seat, spots: list[Spot]) -> None:
        for spot in spots:
            _fill(spot, seat, -1)

    def fits(self, seat: Seat) -> bool:
        return self._spot(seat) is not None

    def _spot(self, seat: Seat) -> Spot | None:
        """The fullest worker and GPU that `seat` fits; a new worker where none does and there may be one."""
        best: tuple[int, Spot] | None = None
        for worker in self.workers:
            spot = self._on(worker, seat)
            if spot is None:
                continue
            left = sum(WHOLE - taken for taken in worker.gpus) if seat.hundredths > WHOLE else 0
            if len(spot[1]) == 1:
                left = WHOLE - worker.gpus[spot[1][0]]
            if best is None or left < best[0]:
                best = (left, spot)
        return best[1] if best is not None else self._on(self._fresh(), seat)

    def _fresh(self, node: str = "") -> Worker | None:
        is_full = len(self.workers) >= self.group.max_workers
        return None if is_full else Worker([0] * self.group.gpus_per_worker, node)

    def _on(self, worker: Worker | None, seat: Seat) -> Spot | None:
        if worker is None or not self._has_host_room(worker, seat):
            return None
        gpus = _fitting_gpus(worker, seat)
        return (worker, gpus) if gpus is not None else None

    def _has_host_room(self, worker: Worker, seat: Seat) -> bool:
        memory = worker.memory_bytes + seat.memory_bytes
        return worker.cpus_milli + seat.cpus_milli <= self.group.cpus * MILLI and (
            not self.group.memory_bytes or memory <= self.group.memory_bytes
        )


def _fitting_gpus(worker: Worker, seat: Seat) -> list[int] | None:
    """Return the GPUs of `worker` that `seat` fits, the fullest where it shares one; None where there are not
    enough."""
    if not seat.hundredths:
        return []
    if seat.hundredths > WHOLE:
        free = [index for index, taken in enumerate(worker.gpus) if not taken]
        count = seat.hundredths // WHOLE
        return free[:count] if len(free) >= count else None
    open_gpus = [index for index, taken in enumerate(worker.gpus) if taken + seat.hundredths <= WHOLE]
    return [max(open_gpus, key=lambda index: worker.gpus[index])] if open_gpus else None


def _fill(spot: Spot, seat: Seat, sign: int) -> None:
    worker, gpus = spot
    for index in gpus:
        worker.gpus[index] += sign * min(seat.hundredths, WHOLE)
    worker.cpus_milli += sign * seat.cpus_milli
    worker.memory_bytes += sign * seat.memory_bytes
