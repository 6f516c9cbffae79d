"""Turns: how many replicas each revision may have now, and who gives way to whom. Pure.

Room is held by what stands or was ordered from Serve. What must have a replica and has none (a request waits,
a new revision is to prove itself, `minReplicas` grew) stands in one line per group, the longest wait first.
Whoever works keeps what it has; of those that are idle and may sleep, the ones idle longest leave where the
line needs their room, and come back through the line like everybody else.

A place in the line cannot be lost to those behind: who comes later gets room only where all before it would
still fit once everybody has left who may. So a large model gets its turn when each of the small ones has been
idle once, not all of them at the same moment; and a small one need not wait where it hinders nobody.

Room is given out twice at no time: a leaver's share is given on when its replicas are gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tidegate.control.observed import Group, RevisionKey
from tidegate.control.packing import listed
from tidegate.control.room import MILLI, WHOLE, Room, Seat, Spot
from tidegate.control.sizing import gib


@dataclass(frozen=True, slots=True)
class Claim:
    """One revision at one moment. `staying` and `ending` are the nodes of its replicas that have one, and
    `present` counts those that stay or were ordered; `least` are always there, `due` it must have now,
    `wanted` suit its load, `most` are allowed.

    `waits_since` is when it came into the line (unix seconds; 0: not at all), `is_entitled` says that its
    first replica was granted already, `is_proof` that it starts only to prove itself, `tried_at` when it last
    began to. `idle_since` is given where it may leave (unix seconds): it has no request, has rested, and may
    sleep."""

    key: RevisionKey
    group: str
    seat: Seat
    staying: Sequence[str]
    ending: Sequence[str]
    present: int
    least: int
    due: int
    wanted: int
    most: int
    created: float = 0.0
    waits_since: float = 0.0
    is_entitled: bool = False
    is_proof: bool = False
    tried_at: float = 0.0
    idle_since: float | None = None

    @property
    def seated(self) -> int:
        return len(self.staying)

    @property
    def is_waiting(self) -> bool:
        return self.seated < self.due


@dataclass(frozen=True, slots=True)
class Turns:
    """`granted` says how many replicas each revision may have, `leaving` who goes to zero as soon as it can
    though its `idleSeconds` are not over, `waiting` why a revision lacks a replica that it must have."""

    granted: Mapping[RevisionKey, int] = field(default_factory=dict)
    leaving: frozenset[RevisionKey] = frozenset()
    waiting: Mapping[RevisionKey, str] = field(default_factory=dict)


def take_turns(claims: Sequence[Claim], groups: Iterable[Group], now: float) -> Turns:
    granted: dict[RevisionKey, int] = {}
    leaving: set[RevisionKey] = set()
    waiting: dict[RevisionKey, str] = {}
    for group in groups:
        found = _in_group(group, [claim for claim in claims if claim.group == group.name], now)
        granted |= found.granted
        leaving |= found.leaving
        waiting |= found.waiting
    return Turns(granted, frozenset(leaving), waiting)


def _in_group(group: Group, claims: Sequence[Claim], now: float) -> Turns:
    """`held` is the room as it is, `later` without those that may leave now, `at_last` with nobody but the
    line and those that never leave."""
    given = {claim.key: claim.present for claim in claims}
    counted = {claim.key: claim.seated for claim in claims}  # those that `held` has
    nodes = sorted({node for claim in claims for node in claim.staying})
    held, later, at_last = Room(group, nodes), Room(group, nodes), Room(group)
    is_sound = True
    for claim in sorted(claims, key=_size, reverse=True):
        # What does not fit here was seated otherwise by Ray; until it has gone, more would be a guess.
        is_sound &= all(_seat(held, node, claim.seat) for node in (*claim.staying, *claim.ending))
        for node in claim.staying if claim.idle_since is None else ():
            _seat(later, node, claim.seat)
        for _ in range(claim.least):
            at_last.take(claim.seat)
    lacking: list[Claim] = []
    reserved: list[tuple[Seat, Spot]] = []
    for claim in _line(claims, now):
        if claim.least <= claim.seated and at_last.take(claim.seat) is None:
            lacking.append(claim)
            continue
        for count in range(claim.seated + 1, claim.due + 1):
            spots = later.take(claim.seat)
            reserved += [(claim.seat, spot) for spot in spots or ()]
            if spots is None or not is_sound or held.take(claim.seat) is None:
                lacking.append(claim)
                break
            counted[claim.key] = count
            given[claim.key] = max(given[claim.key], count)
    leaving = _leaving(claims, later, at_last, reserved) if lacking else frozenset()
    if is_sound:
        for claim in claims:
            for _ in range(claim.present - counted[claim.key]):
                held.take(claim.seat)
        rooms = (held, later, at_last) if lacking else (held,)
        _give_the_rest([claim for claim in claims if claim.key not in leaving], given, rooms)
    waiting = {claim.key: _why(claim, claims, leaving, group) for claim in lacking}
    return Turns(given, leaving, waiting)


def _seat(room: Room, node: str, seat: Seat) -> bool:
    """Seat a replica where it runs, or somewhere: what is known of a group may be older than its workers."""
    return room.take_on(node, seat) is not None or room.take(seat) is not None


def _line(claims: Sequence[Claim], now: float) -> list[Claim]:
    """Who must have a replica and has none: what was granted already first, then the longest wait. Of those
    that only prove themselves one stands in the line, since the last one began, and the others behind it: so
    a request waits for one of them at most beside the one that runs, however many there are."""
    last_try = max((claim.tried_at for claim in claims), default=0.0)

    def rank(claim: Claim) -> tuple[bool, float, float]:
        since = claim.waits_since or now
        return not claim.is_entitled, max(since, last_try) if claim.is_proof else since, claim.created

    line = sorted((claim for claim in claims if claim.is_waiting), key=rank)
    first = next((claim for claim in line if claim.is_proof), None)
    return sorted(line, key=lambda claim: claim.is_proof and claim is not first)


def _leaving(
    claims: Sequence[Claim], later: Room, at_last: Room, reserved: list[tuple[Seat, Spot]]
) -> frozenset[RevisionKey]:
    """Those that are idle and stand in the way of the line, for which spots of `later` are `reserved`; the
    ones used last stay where they can."""
    idle = [claim for claim in claims if claim.idle_since is not None and claim.staying]
    idle.sort(key=lambda claim: -(claim.idle_since or 0.0))
    return frozenset(claim.key for claim in idle if not _can_stay(claim, later, at_last, reserved))


def _can_stay(claim: Claim, later: Room, at_last: Room, reserved: list[tuple[Seat, Spot]]) -> bool:
    """Seat its replicas where they run; what is reserved there moves elsewhere, or they cannot."""
    kept = at_last.take(claim.seat, claim.seated)
    if kept is None:
        return False
    taken: list[Spot] = []
    for node in claim.staying:
        moved = [each for each in reserved if each[1][0].node == node]
        spot = later.take_on(node, claim.seat)
        if spot is None:
            for seat, old in moved:
                later.give_back(seat, [old])
            spot = later.take_on(node, claim.seat)
            found = [(seat, later.take(seat)) for seat, _ in moved] if spot is not None else []
            if spot is None or any(new is None for _, new in found):
                for seat, new in found:
                    later.give_back(seat, new or [])
                later.give_back(claim.seat, [*taken, *([spot] if spot is not None else [])])
                for seat, old in moved:
                    later.put(seat, old)
                at_last.give_back(claim.seat, kept)
                return False
            reserved[:] = [each for each in reserved if each not in moved]
            reserved += [(seat, new[0]) for seat, new in found if new is not None]
        taken.append(spot)
    return True


def _give_the_rest(claims: Sequence[Claim], given: dict[RevisionKey, int], rooms: Sequence[Room]) -> None:
    """What load asks for, then one replica for each that sleeps, so that it wakes without being asked after,
    then what may come."""
    may_have = [claim for claim in claims if not claim.is_waiting or given[claim.key] >= claim.due]
    goals = [(claim, claim.wanted) for claim in may_have]
    goals += [(claim, min(1, claim.most)) for claim in may_have]
    goals += [(claim, claim.most) for claim in may_have]
    for claim, goal in goals:
        while given[claim.key] < goal and _take_in_all(rooms, claim.seat, 1):
            given[claim.key] += 1


def _take_in_all(rooms: Sequence[Room], seat: Seat, copies: int) -> bool:
    taken: list[tuple[Room, list[Spot]]] = []
    for room in rooms:
        spots = room.take(seat, copies)
        if spots is None:
            for other, held in taken:
                other.give_back(seat, held)
            return False
        taken.append((room, spots))
    return True


def _size(claim: Claim) -> tuple[int, int, int]:
    return claim.seat.hundredths, claim.seat.cpus_milli, claim.seat.memory_bytes


def _why(claim: Claim, claims: Sequence[Claim], leaving: frozenset[RevisionKey], group: Group) -> str:
    """Say what is asked for, who holds it, and what has to happen."""
    others = [other for other in claims if (other.staying or other.ending) and other.key != claim.key]
    goers = sorted({key[0] for key in leaving})
    names = listed(sorted({_named(other, claim) for other in others}))
    text = f"A replica needs {_amounts(claim.seat)}{f' of group {claim.group}' if claim.group else ''}"
    if not Room(group).fits(claim.seat):
        return f"{text}, which is more than there is."
    if goers:
        return f"{text}; {listed(goers)} {'makes' if len(goers) == 1 else 'make'} room now."
    if not others:
        return f"{text}; others that wait longer come before it."
    if all(other.least for other in others):
        return f"{text}, which is held by {names}: none of them may sleep (minReplicas)."
    return f"{text}, which is held by {names}: it starts when one that may sleep has no request left."


def _named(other: Claim, asking: Claim) -> str:
    return f"its own revision {other.key[1]}" if other.key[0] == asking.key[0] else other.key[0]


def _amounts(seat: Seat) -> str:
    cpus = seat.cpus_milli / MILLI
    parts = [f"{seat.hundredths / WHOLE:g} GPU"] if seat.hundredths else []
    if cpus:
        parts.append(f"{cpus:g} CPU core{'' if math.isclose(cpus, 1) else 's'}")
    if seat.memory_bytes:
        parts.append(f"{gib(seat.memory_bytes)} of memory")
    return " and ".join(parts) or "room"
