"""Packing gives each revision a group of workers and a share of a GPU there. Pure.

Ray sees a replica's GPU as a number of whole GPUs or a fraction of one, and knows nothing of GPU memory. So
memory is turned into a fraction here, and what fits is decided here too: a revision that Ray could never
place would wait there for ever without a word.

Revisions are seated one after the other: those that have a group keep it, then the serving ones, then by
age. Each takes as many seats as it has replicas at least. One that may sleep takes none: it needs a group
where one replica fits beside all those that are always there, which later ones must leave room for. Whose
turn it is to have replicas there is decided in `turns`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from tidegate.control.observed import Group, RevisionKey, SourceState
from tidegate.control.resources import ModelSpec
from tidegate.control.room import MILLI, WHOLE, Room, Seat, Spot, seat_of
from tidegate.control.schema_types import size_bytes
from tidegate.control.sizing import UnknownArchitecture, gib, replica_bytes

Refusal = tuple[str, str]  # (reason, sentence)

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
    """The needs of one revision's replicas. `copies` are always there (0: it may sleep). `pinned` is the
    group that it has already; one that sleeps (`is_asleep`) loses it where it could not wake any more."""

    key: RevisionKey
    spec: ModelSpec
    source: SourceState | None
    copies: int = 1
    pinned: str = ""
    is_asleep: bool = False


@dataclass(frozen=True, slots=True)
class Packing:
    """A revision with both a placement and a refusal keeps its place, but not all its replicas find one.

    `gpu_load` gives the hundredths of each GPU in use that are always taken, by group. `parked` says of each
    revision whose weights should stay in host memory why there is no room for them; empty: there is.
    """

    placements: Mapping[RevisionKey, Placement]
    refusals: Mapping[RevisionKey, Refusal]
    gpu_load: Mapping[str, tuple[int, ...]]
    parked: Mapping[RevisionKey, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Share:
    hundredths: int
    text: str


@dataclass(slots=True)
class _Hall:
    """A group while it is being filled. `room` holds what is always there and `crowd` also one replica of
    each revision that may sleep, as far as they find room together."""

    room: Room
    crowd: Room
    holders: dict[RevisionKey, int] = field(default_factory=dict)  # hundredths in all
    sleepers: dict[RevisionKey, Seat] = field(default_factory=dict)
    sleepers_outside: list[Seat] = field(default_factory=list)  # those of them that `crowd` had no room for

    @property
    def group(self) -> Group:
        return self.room.group

    @property
    def least_free_bytes(self) -> int | None:
        """Host memory of a worker that is left when all are awake; None: it is not counted."""
        total = self.group.memory_bytes
        if not total:
            return None
        largest = max((worker.memory_bytes for worker in self.crowd.workers), default=0)
        waiting = sum(seat.memory_bytes for seat in self.sleepers_outside)
        return max(0, total - largest - waiting)


def place(needs: Sequence[Need], groups: Sequence[Group]) -> Packing:
    """Seat `needs` in their order; those with a group come first."""
    halls = {group.name: _Hall(Room(group), Room(group)) for group in groups}
    placements: dict[RevisionKey, Placement] = {}
    refusals: dict[RevisionKey, Refusal] = {}
    for need in sorted(needs, key=lambda need: not need.pinned):
        found = _seat(need, halls)
        if found.placement is not None:
            placements[need.key] = found.placement
        if found.refusal is not None:
            refusals[need.key] = found.refusal
    load = {
        name: tuple(taken for worker in hall.room.workers for taken in worker.gpus)
        for name, hall in halls.items()
    }
    return Packing(placements, refusals, load, _park(needs, placements, halls))


def _park(
    needs: Sequence[Need], placements: Mapping[RevisionKey, Placement], halls: Mapping[str, _Hall]
) -> dict[RevisionKey, str]:
    """Give the memory that all replicas together leave to weights that stay while their models sleep. Which
    worker will hold them nobody knows, so each must have room for all of them; replicas come first."""
    found: dict[RevisionKey, str] = {}
    held: dict[str, int] = {}
    for need in needs:
        if need.spec.scaling.zero != "Parked" or need.copies or need.key not in placements:
            continue
        hall = halls[placements[need.key].group]
        size = need.source.weights_bytes if need.source is not None else 0
        least = hall.least_free_bytes
        if least is None or held.get(hall.group.name, 0) + size <= least:
            held[hall.group.name] = held.get(hall.group.name, 0) + size
            found[need.key] = ""
            continue
        parked = held.get(hall.group.name, 0)
        found[need.key] = (
            f"They take {gib(size)}, and of the {gib(hall.group.memory_bytes)} of memory that a worker of "
            f"group {hall.group.name} has, replicas may take {gib(hall.group.memory_bytes - least)} and "
            f"other parked weights {gib(parked)}: raise the group's memory, or park fewer models."
        )
    return found


@dataclass(frozen=True, slots=True)
class _Found:
    placement: Placement | None = None
    refusal: Refusal | None = None


def _seat(need: Need, halls: Mapping[str, _Hall]) -> _Found:
    candidates = _candidates(need, halls)
    if isinstance(candidates, tuple):
        return _Found(refusal=candidates)
    refusals: list[Refusal] = []
    seats: list[tuple[_Hall, Seat]] = []
    for hall in candidates:
        seat = _seat_in(need, hall.group)
        if isinstance(seat, Seat):
            seats.append((hall, seat))
        else:
            refusals.append(seat)
    for hall, seat in seats if need.copies else sorted(seats, key=_crowding):
        is_kept = need.pinned == hall.group.name and not need.is_asleep
        refusal = _take(hall, need, seat, keep_some=is_kept)
        if refusal is None or is_kept:
            return _Found(_placement(seat, hall.group), refusal)
        refusals.append(refusal)
    # The last candidate is the largest: what fails even there says most.
    return _Found(refusal=refusals[-1])


def _crowding(item: tuple[_Hall, Seat]) -> float:
    """Sort groups where all could be awake together first, then those with the fewest sleepers a worker."""
    hall, seat = item
    return 0.0 if hall.crowd.fits(seat) else 1 + len(hall.sleepers) / max(1, hall.group.max_workers)


def _candidates(need: Need, halls: Mapping[str, _Hall]) -> list[_Hall] | Refusal:
    """Groups to try, best first; never an empty list."""
    wanted = need.spec.resources.accelerator
    names = ", ".join(halls) or "none"
    if wanted:
        if wanted not in halls:
            return (
                "NoSuchGroup",
                f"spec.resources.accelerator names the group {wanted!r}, but the pool {need.spec.pool!r} "
                f"has: {names}.",
            )
        return [halls[wanted]]
    with_gpus = sorted(
        (hall for hall in halls.values() if hall.group.gpus_per_worker),
        key=lambda hall: hall.group.gpu_memory_bytes,
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
        found = [hall for hall in halls.values() if not hall.group.gpus_per_worker] or with_gpus
        if not found:
            return "NoSuchGroup", f"The pool {need.spec.pool!r} has no group of workers; add one."
    kept = [hall for hall in found if hall.group.name == need.pinned]
    # A group that no longer fits, as after a change of the pool, is left for another.
    return kept if kept and not isinstance(_seat_in(need, kept[0].group), tuple) else found


def wants_gpu(spec: ModelSpec) -> bool:
    """True where the spec wants a GPU, whatever group it gets."""
    if spec.device == "auto":
        return spec.resources.gpus > 0 or bool(spec.resources.gpu_memory)
    return spec.device == "cuda"


def _seat_in(need: Need, group: Group) -> Seat | Refusal:
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
    share = _Share(0, "")
    if wants_gpu(need.spec) or (wanted.accelerator and group.gpus_per_worker and need.spec.device != "cpu"):
        found = _gpu_share(need, group)
        if isinstance(found, tuple):
            return found
        share = found
    return seat_of(share.hundredths / WHOLE, wanted.cpus, memory, share.text)


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
        "a smaller engine.kvCacheBytes, or a group with more GPU memory.",
    )


def _take(hall: _Hall, need: Need, seat: Seat, *, keep_some: bool) -> Refusal | None:
    """Seat all copies, or say what is missing. Those that found a place keep it only with `keep_some`."""
    if not need.copies:
        return _take_a_turn(hall, need, seat)
    taken: list[Spot] = []
    while len(taken) < need.copies and (spot := _beside_sleepers(hall, seat)) is not None:
        taken += spot
    if len(taken) == need.copies or keep_some:
        hall.holders[need.key] = seat.hundredths * len(taken)
        hall.crowd.take(seat, len(taken))
    if len(taken) == need.copies:
        return None
    refusal = _no_room(need, seat, hall, need.copies - len(taken))
    if not keep_some:
        hall.room.give_back(seat, taken)
    return refusal


def _take_a_turn(hall: _Hall, need: Need, seat: Seat) -> Refusal | None:
    """One replica must fit beside what is always there."""
    if not hall.room.fits(seat):
        return _no_room(need, seat, hall, 1)
    hall.sleepers[need.key] = seat
    if hall.crowd.take(seat) is None:
        hall.sleepers_outside.append(seat)
    return None


def _beside_sleepers(hall: _Hall, seat: Seat) -> list[Spot] | None:
    """Seat one copy where each that may sleep could still wake."""
    taken = hall.room.take(seat)
    if taken is None or all(hall.room.fits(other) for other in {*hall.sleepers.values()}):
        return taken
    hall.room.give_back(seat, taken)
    return None


def _no_room(need: Need, seat: Seat, hall: _Hall, missing: int) -> Refusal:
    """Say what is taken of the group, and by whom."""
    group, workers, count = hall.group, hall.room.workers, need.copies
    whose = "The replica needs" if count < 2 else f"{missing} of {count} replicas find no place; each needs"
    remedy = f"raise maxWorkers of the group, or shrink or delete a model of the pool {need.spec.pool!r}."
    locks_out = hall.room.fits(seat)
    if locks_out:
        names = sorted({name for name, _ in hall.sleepers})
        remedy = f"beside it {listed(names)} could never wake: {remedy}"
    if seat.hundredths and (locks_out or not hall.room.fits(replace(seat, cpus_milli=0, memory_bytes=0))):
        total = group.max_workers * group.gpus_per_worker
        taken = sum(taken for worker in workers for taken in worker.gpus)
        return (
            "GpusTaken",
            f"{whose} {seat.hundredths / WHOLE:g} GPU of group {group.name} ({seat.text}; a GPU has "
            f"{gib(group.gpu_memory_bytes)}), and of its {total} GPU{'s' if total > 1 else ''} "
            f"{taken / WHOLE:g} are taken ({_holders(hall, need.key)}): {remedy}",
        )
    memory = sum(worker.memory_bytes for worker in workers)
    if seat.memory_bytes and not hall.room.fits(replace(seat, cpus_milli=0, hundredths=0)):
        return (
            "MemoryTaken",
            f"{whose} {gib(seat.memory_bytes)} of memory in group {group.name}, and of its "
            f"{gib(group.max_workers * group.memory_bytes)} {gib(memory)} are taken: {remedy}",
        )
    cpus = sum(worker.cpus_milli for worker in workers) / MILLI
    return (
        "CpusTaken",
        f"{whose} {need.spec.resources.cpus:g} CPU cores in group {group.name}, and of its "
        f"{group.max_workers * group.cpus:g} {cpus:g} are taken: {remedy}",
    )


def _holders(hall: _Hall, asking: RevisionKey) -> str:
    largest = sorted((item for item in hall.holders.items() if item[1]), key=lambda item: -item[1])
    named = [f"{_named(key, asking)} {taken / WHOLE:g}" for key, taken in largest[:NAMED_IN_MESSAGE]]
    more = len(largest) - len(named)
    return (", ".join(named) or "none by a model") + (f" and {more} more" if more > 0 else "")


def listed(names: Sequence[str]) -> str:
    """Return the first names in a sentence's words."""
    more = len(names) - NAMED_IN_MESSAGE
    if more > 0:
        return ", ".join(names[:NAMED_IN_MESSAGE]) + f" and {more} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _named(key: RevisionKey, asking: RevisionKey) -> str:
    if key == asking:
        return "its other replicas"
    return f"its own revision {key[1]}" if key[0] == asking[0] else key[0]


def _placement(seat: Seat, group: Group) -> Placement:
    gpu_bytes = group.gpu_memory_bytes * seat.hundredths // WHOLE
    return Placement(group.name, seat.hundredths / WHOLE, gpu_bytes or seat.memory_bytes, seat.memory_bytes)
