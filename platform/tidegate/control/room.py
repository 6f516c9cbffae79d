"""A room is a group of workers while it is filled with replicas: which worker and GPU a seat takes. Pure.

A seat lies within one worker and a shared one within one GPU; among those that fit, the fullest is taken, as
Ray does it. Ray seats replicas in the order in which they start, so a very fragmented group may still keep
one waiting.
"""

from __future__ import annotations

import math
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
    return Seat(math.ceil(round(gpus * WHOLE, 6)), math.ceil(round(cpus * MILLI, 6)), memory_bytes, text=text)


@dataclass(slots=True, eq=False)
class Worker:
    gpus: list[int]  # hundredths taken
    cpus_milli: int = 0
    memory_bytes: int = 0


Spot = tuple[Worker, list[int]]  # and the numbers of its GPUs


class Room:
    """Workers are opened one by one."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.workers: list[Worker] = []

    def take(self, seat: Seat, copies: int = 1) -> list[Spot] | None:
        """Take seats for all copies, or none."""
        taken: list[Spot] = []
        for _ in range(copies):
            spot = self._spot(seat)
            if spot is None:
                self.give_back(seat, taken)
                return None
            if spot[0] not in self.workers:
                self.workers.append(spot[0])
            _fill(spot, seat, 1)
            taken.append(spot)
        return taken

    def give_back(self, seat: Seat, spots: list[Spot]) -> None:
        for spot in spots:
            _fill(spot, seat, -1)

    def fits(self, seat: Seat) -> bool:
        return self._spot(seat) is not None

    def _spot(self, seat: Seat) -> Spot | None:
        """The fullest worker and GPU that `seat` fits; a new worker where none does and there may be one."""
        best: tuple[int, Spot] | None = None
        for worker in self.workers:
            gpus = _fitting_gpus(worker, seat)
            if gpus is None or not self._has_host_room(worker, seat):
                continue
            left = sum(WHOLE - taken for taken in worker.gpus) if seat.hundredths > WHOLE else 0
            if len(gpus) == 1:
                left = WHOLE - worker.gpus[gpus[0]]
            if best is None or left < best[0]:
                best = (left, (worker, gpus))
        if best is not None:
            return best[1]
        if len(self.workers) >= self.group.max_workers:
            return None
        fresh = Worker([0] * self.group.gpus_per_worker)
        gpus = _fitting_gpus(fresh, seat)
        return (fresh, gpus) if gpus is not None and self._has_host_room(fresh, seat) else None

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
