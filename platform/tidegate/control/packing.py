"""Packing gives each revision a group of workers and a share of a GPU there. Pure.

Ray sees a replica's GPU as a number of whole GPUs or a fraction of one, and knows nothing of GPU memory. So
memory is turned into a fraction here, and what fits is decided here too: a revision that Ray could never
place would wait there for ever without a word.

Revisions are seated one after the other: those that have a group keep it, then the serving ones, then by
age. Each takes as many seats as it has replicas at least (one, if it may sleep). A seat lies within one
worker and a shared one within one GPU; among those that fit, the fullest is taken, as Ray does it. Ray seats
replicas in the order in which they start, so a very fragmented group may still keep one waiting; the
deployment's message, which the status shows, then says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from tidegate.control.observed import Group, RevisionKey, SourceState
from tidegate.control.resources import ModelSpec
from tidegate.control.schema_types import size_bytes
from tidegate.control.sizing import UnknownArchitecture, gib, replica_bytes

Refusal = tuple[str, str]  # (reason, sentence)

WHOLE = 100  # a GPU in hundredths, the steps in which one is shared
MILLI = 1000
NAMED_IN_MESSAGE = 4  # revisions that a sentence names


class Placement(msgspec.Struct, frozen=True):
    """The place of one revision's replicas. `memory_cap_bytes` bounds each engine (GPU memory where `gpus` is
    above 0, else host memory; 0: no bound). `memory_bytes` is host memory that Ray reserves. JSON in the
    records of the host."""

    group: str
    gpus: float = 0.0
    memory_cap_bytes: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Need:
    """The needs of one revision's replicas. `pinned` is the group where they run already."""

    key: RevisionKey
    spec: ModelSpec
    source: SourceState | None
    copies: int = 1
    pinned: str = ""


@dataclass(frozen=True, slots=True)
class Packing:
    """A revision with both a placement and a refusal keeps its place, but not all its replicas find one.

    `gpu_load` gives the hundredths taken of each GPU in use, by group.
    """

    placements: Mapping[RevisionKey, Placement]
    refusals: Mapping[RevisionKey, Refusal]
    gpu_load: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Seat:
    """The share of one worker that a replica takes. `hundredths` above `WHOLE` are whole GPUs."""

    hundredths: int
    cpus_milli: int
    memory_bytes: int
    text: str  # how its accelerator memory adds up


@dataclass(frozen=True, slots=True)
class _Share:
    hundredths: int
    text: str


@dataclass(slots=True)
class _Worker:
    gpus: list[int]  # hundredths taken
    cpus_milli: int = 0
    memory_bytes: int = 0


@dataclass(slots=True)
class _Room:
    """A group while it is being filled. Workers are opened one by one."""

    group: Group
    workers: list[_Worker] = field(default_factory=list)
    holders: dict[RevisionKey, int] = field(default_factory=dict)  # hundredths in all


def place(needs: Sequence[Need], groups: Sequence[Group]) -> Packing:
    """Seat `needs` in their order; those with a group come first."""
    rooms = {group.name: _Room(group) for group in groups}
    placements: dict[RevisionKey, Placement] = {}
    refusals: dict[RevisionKey, Refusal] = {}
    for need in sorted(needs, key=lambda need: not need.pinned):
        found = _seat(need, rooms)
        if found.placement is not None:
            placements[need.key] = found.placement
        if found.refusal is not None:
            refusals[need.key] = found.refusal
    load = {
        name: tuple(taken for worker in room.workers for taken in worker.gpus) for name, room in rooms.items()
    }
    return Packing(placements, refusals, load)


@dataclass(frozen=True, slots=True)
class _Found:
    placement: Placement | None = None
    refusal: Refusal | None = None


def _seat(need: Need, rooms: Mapping[str, _Room]) -> _Found:
    candidates = _candidates(need, rooms)
    if isinstance(candidates, tuple):
        return _Found(refusal=candidates)
    refusals: list[Refusal] = []
    for room in candidates:
        seat = _seat_in(need, room.group)
        if isinstance(seat, tuple):
            refusals.append(seat)
            continue
        is_kept = need.pinned == room.group.name
        refusal = _take(room, need, seat, keep_some=is_kept)
        if refusal is None:
            return _Found(_placement(seat, room.group))
        if is_kept:
            return _Found(_placement(seat, room.group), refusal)
        refusals.append(refusal)
    # The last candidate is the largest: what fails even there says most.
    return _Found(refusal=refusals[-1])


def _candidates(need: Need, rooms: Mapping[str, _Room]) -> list[_Room] | Refusal:
    """Groups to try, best first; never an empty list."""
    wanted = need.spec.resources.accelerator
    names = ", ".join(rooms) or "none"
    if wanted:
        if wanted not in rooms:
            return (
                "NoSuchGroup",
                f"spec.resources.accelerator names the group {wanted!r}, but the pool {need.spec.pool!r} "
                f"has: {names}.",
            )
        return [rooms[wanted]]
    with_gpus = sorted(
        (room for room in rooms.values() if room.group.gpus_per_worker),
        key=lambda room: room.group.gpu_memory_bytes,
    )
    if wants_gpu(need.spec):
        if not with_gpus:
            return (
                "NoSuchGroup",
                f"One replica asks for a GPU, but no group of the pool {need.spec.pool!r} has any "
                f"(groups: {names}); add one with gpus, or set device to cpu.",
            )
        found = with_gpus
    else:
        found = [room for room in rooms.values() if not room.group.gpus_per_worker] or with_gpus
        if not found:
            return "NoSuchGroup", f"The pool {need.spec.pool!r} has no group of workers; add one."
    kept = [room for room in found if room.group.name == need.pinned]
    # A group that no longer fits, as after a change of the pool, is left for another.
    return kept if kept and not isinstance(_seat_in(need, kept[0].group), tuple) else found


def wants_gpu(spec: ModelSpec) -> bool:
    """True where the spec wants a GPU, whatever group it gets."""
    if spec.device == "auto":
        return spec.resources.gpus > 0 or bool(spec.resources.gpu_memory)
    return spec.device == "cuda"


def _seat_in(need: Need, group: Group) -> _Seat | Refusal:
    """Return what one replica takes of a worker of `group`, or why it can never fit one."""
    wanted = need.spec.resources
    memory = size_bytes(wanted.memory)
    if wanted.cpus > group.cpus:
        return (
            "TooFewCpus",
            f"One replica asks for {wanted.cpus:g} CPU cores and a worker of group {group.name} has "
            f"{group.cpus:g}; lower spec.resources.cpus or raise the group's cpus.",
        )
    if memory and group.memory_bytes and memory > group.memory_bytes:
        return (
            "TooLittleMemory",
            f"One replica reserves {gib(memory)} of memory (spec.resources.memory) and a worker of group "
            f"{group.name} has {gib(group.memory_bytes)} for replicas; raise the group's memory.",
        )
    hundredths, text = 0, ""
    if wants_gpu(need.spec) or (wanted.accelerator and group.gpus_per_worker and need.spec.device != "cpu"):
        share = _gpu_share(need, group)
        if isinstance(share, tuple):
            return share
        hundredths, text = share.hundredths, share.text
    return _Seat(hundredths, math.ceil(round(wanted.cpus * MILLI, 6)), memory, text)


def _gpu_share(need: Need, group: Group) -> _Share | Refusal:
    """The part of a GPU of `group` that one replica takes."""
    spec, each = need.spec, group.gpu_memory_bytes
    if not group.gpus_per_worker or not each:
        return "NoSuchGroup", f"One replica asks for a GPU, but the group {group.name} has none."
    try:
        memory = replica_bytes(spec, need.source)
    except UnknownArchitecture as error:
        return "MemoryUnknown", f"{error} Set spec.resources.gpuMemory."
    asked = spec.resources.gpus
    if asked > group.gpus_per_worker:
        return (
            "TooFewGpus",
            f"One replica asks for {asked:g} GPUs and a worker of group {group.name} has "
            f"{group.gpus_per_worker}; lower spec.resources.gpus.",
        )
    given = math.ceil(round(asked * WHOLE, 6))
    computed = max(1, math.ceil(memory.bytes * WHOLE / each))
    if computed > WHOLE:
        computed = math.ceil(computed / WHOLE) * WHOLE
    # A share that the user wrote down stands as it is, unless a memory was written beside it.
    stands = bool(given) and not spec.resources.gpu_memory
    share = given if stands else max(given, computed)
    # The transformers engine holds a model on one GPU.
    most = max(given, WHOLE) if spec.engine.name == "transformers" else WHOLE * group.gpus_per_worker
    if computed <= share <= most:
        return _Share(share, memory.text)
    if stands:
        where = f"the {asked:g} GPUs that spec.resources.gpus asks for in group {group.name} have"
    else:
        whole = most // WHOLE
        where = (
            f"{whole} GPUs of group {group.name} have" if whole > 1 else f"a GPU of group {group.name} has"
        )
    return (
        "TooLittleGpuMemory",
        f"One replica needs {gib(memory.bytes)} of GPU memory ({memory.text}) and {where} "
        f"{gib(each * min(share, most) // WHOLE)}; use a quantized checkpoint, a shorter contextLength, "
        "fewer maxSlots, or a group with more GPU memory.",
    )


def _take(room: _Room, need: Need, seat: _Seat, *, keep_some: bool) -> Refusal | None:
    """Seat all copies, or say what is missing. Those that found a place keep it only with `keep_some`."""
    taken: list[tuple[_Worker, list[int]]] = []
    while len(taken) < need.copies:
        spot = _best_spot(room, seat)
        if spot is None:
            break
        worker, gpus = spot
        _fill(worker, gpus, seat, 1)
        taken.append(spot)
    room.holders[need.key] = seat.hundredths * len(taken)
    if len(taken) == need.copies:
        return None
    refusal = _no_room(need, seat, room, need.copies - len(taken))
    if not keep_some:
        del room.holders[need.key]
        for worker, gpus in taken:
            _fill(worker, gpus, seat, -1)
    return refusal


def _best_spot(room: _Room, seat: _Seat) -> tuple[_Worker, list[int]] | None:
    """The fullest worker and GPU that `seat` fits; a new worker where none does and there may be one."""
    best: tuple[int, _Worker, list[int]] | None = None
    for worker in room.workers:
        gpus = _fitting_gpus(worker, seat)
        if gpus is None or not _has_host_room(room.group, worker, seat):
            continue
        left = sum(WHOLE - taken for taken in worker.gpus) if seat.hundredths > WHOLE else 0
        if len(gpus) == 1:
            left = WHOLE - worker.gpus[gpus[0]]
        if best is None or left < best[0]:
            best = (left, worker, gpus)
    if best is not None:
        return best[1], best[2]
    if len(room.workers) >= room.group.max_workers:
        return None
    fresh = _Worker([0] * room.group.gpus_per_worker)
    room.workers.append(fresh)
    gpus = _fitting_gpus(fresh, seat)
    return (fresh, gpus) if gpus is not None else None


def _fitting_gpus(worker: _Worker, seat: _Seat) -> list[int] | None:
    """Indices of the GPUs that `seat` would lie on; an empty list where it needs none."""
    if not seat.hundredths:
        return []
    if seat.hundredths > WHOLE:
        free = [index for index, taken in enumerate(worker.gpus) if not taken]
        count = seat.hundredths // WHOLE
        return free[:count] if len(free) >= count else None
    open_gpus = [index for index, taken in enumerate(worker.gpus) if taken + seat.hundredths <= WHOLE]
    return [max(open_gpus, key=lambda index: worker.gpus[index])] if open_gpus else None


def _has_host_room(group: Group, worker: _Worker, seat: _Seat) -> bool:
    memory = worker.memory_bytes + seat.memory_bytes
    return worker.cpus_milli + seat.cpus_milli <= group.cpus * MILLI and (
        not group.memory_bytes or memory <= group.memory_bytes
    )


def _fill(worker: _Worker, gpus: list[int], seat: _Seat, sign: int) -> None:
    for index in gpus:
        worker.gpus[index] += sign * min(seat.hundredths, WHOLE)
    worker.cpus_milli += sign * seat.cpus_milli
    worker.memory_bytes += sign * seat.memory_bytes


def _no_room(need: Need, seat: _Seat, room: _Room, missing: int) -> Refusal:
    """Say what is taken of the group, and by whom."""
    group, count = room.group, need.copies
    whose = "The replica needs" if count == 1 else f"{missing} of {count} replicas find no place; each needs"
    remedy = f"raise maxWorkers of the group, or shrink or delete a model of the pool {need.spec.pool!r}."
    if seat.hundredths and all(_fitting_gpus(worker, seat) is None for worker in room.workers):
        total = group.max_workers * group.gpus_per_worker
        taken = sum(taken for worker in room.workers for taken in worker.gpus)
        holders = _holders(room, need.key)
        return (
            "GpusTaken",
            f"{whose} {seat.hundredths / WHOLE:g} GPU of group {group.name} ({seat.text}; a GPU has "
            f"{gib(group.gpu_memory_bytes)}), and of its {total} GPU{'s' if total > 1 else ''} "
            f"{taken / WHOLE:g} are taken ({holders}): {remedy}",
        )
    memory = sum(worker.memory_bytes for worker in room.workers)
    if (
        seat.memory_bytes
        and group.memory_bytes
        and all(worker.memory_bytes + seat.memory_bytes > group.memory_bytes for worker in room.workers)
    ):
        return (
            "MemoryTaken",
            f"{whose} {gib(seat.memory_bytes)} of memory in group {group.name}, and of its "
            f"{gib(group.max_workers * group.memory_bytes)} {gib(memory)} are taken: {remedy}",
        )
    cpus = sum(worker.cpus_milli for worker in room.workers) / MILLI
    return (
        "CpusTaken",
        f"{whose} {need.spec.resources.cpus:g} CPU cores in group {group.name}, and of its "
        f"{group.max_workers * group.cpus:g} {cpus:g} are taken: {remedy}",
    )


def _holders(room: _Room, asking: RevisionKey) -> str:
    largest = sorted((item for item in room.holders.items() if item[1]), key=lambda item: -item[1])
    named = [f"{_named(key, asking)} {taken / WHOLE:g}" for key, taken in largest[:NAMED_IN_MESSAGE]]
    more = len(largest) - len(named)
    return (", ".join(named) or "none by a model") + (f" and {more} more" if more > 0 else "")


def _named(key: RevisionKey, asking: RevisionKey) -> str:
    if key == asking:
        return "its other replicas"
    return f"its own revision {key[1]}" if key[0] == asking[0] else key[0]


def _placement(seat: _Seat, group: Group) -> Placement:
    gpu_bytes = group.gpu_memory_bytes * seat.hundredths // WHOLE
    return Placement(group.name, seat.hundredths / WHOLE, gpu_bytes or seat.memory_bytes, seat.memory_bytes)
