"""Surge: how many replicas each revision of a rolling model may have, and who of a Pool may roll. Pure.

Both revisions together stay within `scaling.maxReplicas` and `rollout.maxSurge` at every moment. Serve scales
a revision by itself up to what it was told last, so what it was told counts as taken; room that one revision
is to give up is given on when Serve has been told so and its replicas are gone.

A Pool without room for all its rollouts takes them one after the other: each begins where all that it will
need beside its old replicas fits, with what those before it will still need. So none waits half way for
another that waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidegate.control.desired import ModelRecord
from tidegate.control.observed import ApplicationState, Group, Observation
from tidegate.control.resources import ModelSpec
from tidegate.control.rollout import ALL_AT_ONCE, RECREATE, replicas_for
from tidegate.control.rollout_schema import RolloutSpec, needed_replicas, peak_replicas, stable_replicas
from tidegate.control.rollout_state import RolloutState
from tidegate.control.room import Room, Seat
from tidegate.control.serve_config import ordered_most


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many replicas one revision keeps at least, and may have at most."""

    least: int
    most: int


def bounds_of(
    spec: ModelSpec, record: ModelRecord, loads: Mapping[str, int], seen: Observation
) -> dict[str, Bounds]:
    """Return the bounds of a model's revisions where a rollout sets some; `loads` says how many replicas suit
    the requests that each has now. What a rollout leaves behind counts until it has gone."""
    state = record.rollout
    if state is None or state.strategy == ALL_AT_ONCE:
        return {}
    rules, most = spec.rollout or RolloutSpec(), spec.scaling.max_replicas
    wished = {name: Bounds(min(least, most), most) for name, least in least_of(spec, record).items()}
    if rules.max_surge is None or (state.has_ended and len(record.revisions) < 2):
        return wished
    if (lead := next(iter(record.serving), None)) is not None:
        wished.setdefault(lead.revision, Bounds(spec.scaling.min_replicas, most))
    shared = _within(most + rules.max_surge, wished, state, rules, record, loads, seen)
    if not spec.scaling.min_replicas:
        return shared
    # Serve has nothing to choose: one that it stopped would hold its room while it starts another instead.
    return {name: Bounds(each.most, each.most) if name in wished else each for name, each in shared.items()}


def least_of(spec: ModelSpec, record: ModelRecord) -> dict[str, int]:
    """Return how many replicas the revisions of a rollout that is under way keep at least."""
    state = record.rollout
    if state is None or state.has_ended or state.strategy == ALL_AT_ONCE or state.phase == "Queued":
        return {}
    least = {state.target: _target_least(spec, state)}
    if state.stable in record.revisions:
        least[state.stable] = _stable_least(spec, spec.rollout or RolloutSpec(), state)
    return least


def _target_least(spec: ModelSpec, state: RolloutState) -> int:
    """Its share of what always stands, and what is to be ready before it gets more."""
    always = needed_replicas(spec.scaling.min_replicas, state.weight) if spec.scaling.min_replicas else 0
    return max(always, replicas_for(spec, state, state.ready_for) if state.ready_for > state.weight else 0)


def _stable_least(spec: ModelSpec, rules: RolloutSpec, state: RolloutState) -> int:
    """One that may sleep does so as ever."""
    if not spec.scaling.min_replicas:
        return rules.min_available
    return stable_replicas(rules, max(state.size, spec.scaling.min_replicas), state.weight)


def _within(
    budget: int,
    wished: Mapping[str, Bounds],
    state: RolloutState,
    rules: RolloutSpec,
    record: ModelRecord,
    loads: Mapping[str, int],
    seen: Observation,
) -> dict[str, Bounds]:
    """Share the budget out: what is there stays, the target's coming share is made room for, and who needs
    more gets it from what is left."""
    standing = {name: seen.application(record.name, name) for name in record.revisions}
    present = {name: _present(each) for name, each in standing.items()}
    room = budget - sum(map(_taken, seen.of_model(record.name)))
    found: dict[str, Bounds] = {}
    for name in sorted(record.revisions, key=lambda name: (name != state.target, name != state.stable)):
        # What is left behind gets what it needs to finish its requests.
        wish = wished.get(name, Bounds(0, max(present[name], min(1, loads.get(name, 0)))))
        gives_up = name == state.stable and rules.stable_scales_down and not state.has_ended
        kept = 0 if gives_up else present[name]
        most = min(wish.most, max(wish.least, kept, loads.get(name, 0)))
        if name == state.stable:
            coming = wished.get(state.target, Bounds(0, 0)).least
            reserved = max(coming, present.get(state.target, 0))
            most = max(wish.least, min(most, budget - reserved))
        had = _taken(standing[name]) - _ending(standing[name])
        if most > had:
            more = max(0, min(most - had, room))
            room, most = room - more, had + more
        found[name] = Bounds(min(wish.least, most), most)
    return found


def _present(state: ApplicationState | None) -> int:
    if state is None:
        return 0
    return max(sum(each.state != "STOPPING" for each in state.replicas), state.wanted_replicas)


def _ending(state: ApplicationState | None) -> int:
    return sum(each.state == "STOPPING" for each in state.replicas) if state is not None else 0


def _taken(state: ApplicationState | None) -> int:
    """Count what is there, or may come before Serve is told otherwise."""
    if state is None:
        return 0
    return max(_present(state), ordered_most(state.config)) + _ending(state)


# The Pool's line ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rolling:
    """A rollout that needs room in a group. `extra` is how many replicas it needs at its peak beside those of
    the stable, `present` how many of its target stand."""

    group: str
    seat: Seat
    extra: int
    present: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """A replica that stands, or ends."""

    group: str
    seat: Seat
    node: str


def extra_replicas(spec: ModelSpec, size: int) -> int:
    """Return how many replicas a rollout needs at its peak beside the stable's `size`."""
    rules = spec.rollout
    if rules is None or rules.strategy == RECREATE:
        return 0
    size = min(max(1, size), spec.scaling.max_replicas)
    return max(1, peak_replicas(rules, size) - size)


def has_room(
    coming: Rolling, begun: Iterable[Rolling], held: Iterable[Held], groups: Iterable[Group]
) -> bool:
    """Tell whether a rollout finds room beside all that stands and what others will still need."""
    group = next((each for each in groups if each.name == coming.group), None)
    if group is None:
        return False
    room = Room(group)
    for each in held:
        if each.group == group.name and room.take_on(each.node, each.seat) is None:
            room.take(each.seat)
    for other in begun:
        if other.group == group.name:
            for _ in range(max(0, other.extra - other.present)):
                room.take(other.seat)
    return room.take(coming.seat, coming.extra) is not None
