"""Surge: how many replicas each revision of a rolling model may have, and who of a Pool may roll. Pure.

Both revisions together stay within `scaling.maxReplicas` and `rollout.maxSurge` at every moment, counted in
replicas or in what these take of accelerators. Serve scales a revision by itself up to what it was told last,
so what it was told counts as taken; room that one revision is to give up is given on when Serve has been told
so and its replicas are gone.

A Pool without room for all its rollouts takes them one after the other: each begins where all that it will
need beside its old replicas fits, with what those before it will still need. So none waits half way for
another that waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidegate.control.desired import ModelRecord
from tidegate.control.observed import ApplicationState, Group, Observation, application_name
from tidegate.control.resources import MAX_REPLICAS, ModelSpec
from tidegate.control.rollout import ALL_AT_ONCE, RECREATE, replicas_for
from tidegate.control.rollout_schema import (
    NO_ACCELERATOR,
    RolloutSpec,
    needed_replicas,
    peaks,
    stable_replicas,
    surge_missing,
)
from tidegate.control.rollout_state import RolloutState
from tidegate.control.room import WHOLE, Room, Seat, hundredths
from tidegate.control.serve_config import ordered_gpus, ordered_most


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
    rules, most = rules_of(spec, record), spec.scaling.max_replicas
    wished = {name: Bounds(min(least, most), most) for name, least in least_of(spec, record).items()}
    lead = next(iter(record.serving), None)
    name = application_name(record.name, lead.revision) if lead is not None else ""
    is_alone = all(each.name == name for each in seen.of_model(record.name))
    if not rules.has_surge or (state.has_ended and is_alone):
        return wished
    if lead is not None:
        wished.setdefault(lead.revision, Bounds(spec.scaling.min_replicas, most))
    shared = _within(_budget(rules, most, state, record, seen), wished, state, rules, record, loads, seen)
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
        least[state.stable] = _stable_least(spec, rules_of(spec, record), state)
    return least


def rules_of(spec: ModelSpec, record: ModelRecord) -> RolloutSpec:
    """Return how a model rolls, with what its stable keeps in replicas."""
    return _in_replicas(spec.rollout or RolloutSpec(), _stable_share(record) or 0)


def _stable_share(record: ModelRecord) -> int | None:
    """Return the hundredths of a GPU that a replica of a rollout's stable takes; None: there is no stable."""
    stable = record.revisions.get(record.rollout.stable) if record.rollout is not None else None
    return hundredths(stable.gpus) if stable is not None else None


def _in_replicas(rules: RolloutSpec, share: int) -> RolloutSpec:
    if not rules.min_available_accelerators or not share:
        return rules
    count = -(-hundredths(rules.min_available_accelerators) // share)
    return rules.model_copy(update={"min_available": count})


def _target_least(spec: ModelSpec, state: RolloutState) -> int:
    """Its share of what always stands, and what is to be ready before it gets more."""
    always = needed_replicas(spec.scaling.min_replicas, state.weight) if spec.scaling.min_replicas else 0
    return max(always, replicas_for(spec, state, state.ready_for) if state.ready_for > state.weight else 0)


def _stable_least(spec: ModelSpec, rules: RolloutSpec, state: RolloutState) -> int:
    """One that may sleep does so as ever."""
    if not spec.scaling.min_replicas:
        return rules.min_available
    return stable_replicas(rules, max(state.size, spec.scaling.min_replicas), state.weight)


@dataclass(frozen=True, slots=True)
class _Budget:
    """What all replicas of a model may take together, and what one of each application takes."""

    total: int
    each: Mapping[str, int]

    def taken(self, states: Iterable[ApplicationState]) -> int:
        return sum(_taken(state) * self.each[state.name] for state in states)

    def replicas(self, room: int, name: str) -> int:
        """Return how many replicas find this room. What takes none of it is not bounded by it."""
        share = self.each[name]
        return max(0, room // share) if share else MAX_REPLICAS


def _budget(
    rules: RolloutSpec, most: int, state: RolloutState, record: ModelRecord, seen: Observation
) -> _Budget:
    names = {application_name(record.name, revision): kept for revision, kept in record.revisions.items()}
    standing = {each.name: each for each in seen.of_model(record.name)}
    if rules.max_surge is not None:
        return _Budget(most + rules.max_surge, dict.fromkeys([*names, *standing], 1))
    # What stands takes what Ray was told, whatever its record says now.
    each = {name: hundredths(kept.gpus) for name, kept in names.items()}
    for name, application in standing.items():
        each[name] = max(each.get(name, 0), hundredths(ordered_gpus(application.config)))
    rolling = (application_name(record.name, revision) for revision in (state.stable, state.target))
    shares = [each.get(name, 0) for name in rolling]
    return _Budget(_total(rules.max_surge_accelerators or 0.0, most, shares), each)


def _within(
    budget: _Budget,
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
    all_standing = seen.of_model(record.name)
    room = budget.total - budget.taken(all_standing)
    if any(each.status == "DELETING" for each in all_standing):
        room = min(room, 0)  # Serve does not say any more which replicas of it are still ending
    found: dict[str, Bounds] = {}
    for name in sorted(record.revisions, key=lambda name: (name != state.target, name != state.stable)):
        application = application_name(record.name, name)
        # What is left behind gets what it needs to finish its requests.
        wish = wished.get(name, Bounds(0, max(present[name], min(1, loads.get(name, 0)))))
        gives_up = name == state.stable and rules.stable_scales_down and not state.has_ended
        kept = 0 if gives_up else present[name]
        most = min(wish.most, max(wish.least, kept, loads.get(name, 0)))
        if name == state.stable:
            coming = wished.get(state.target, Bounds(0, 0)).least
            reserved = max(coming, present.get(state.target, 0))
            reserved *= budget.each.get(application_name(record.name, state.target), 0)
            most = max(wish.least, min(most, budget.replicas(budget.total - reserved, application)))
        had = _taken(standing[name]) - _ending(standing[name])
        if most > had:
            more = min(most - had, budget.replicas(room, application))
            room, most = room - more * budget.each[application], had + more
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


def surge_refusal(spec: ModelSpec, record: ModelRecord, target: int) -> str:
    """Return why a rollout cannot keep to its bounds where a replica of its target takes so many hundredths
    of an accelerator, with the sum; empty: it can, or nothing of it is counted in accelerators."""
    stable, most = _stable_share(record), spec.scaling.max_replicas
    if stable is None or spec.rollout is None or not spec.rollout.counts_accelerators:
        return ""
    shares = (stable, target)
    kept, rules = spec.rollout.min_available_accelerators, _in_replicas(spec.rollout, shares[0])
    if not any(shares) or (kept and not shares[0]):
        return f"rollout counts accelerators, and {NO_ACCELERATOR}"
    if rules.min_available > most:
        return (
            f"rollout.minAvailableAccelerators is {kept:g}: that is {rules.min_available} replicas of "
            f"{_gpu(shares[0])}, above scaling.maxReplicas ({most}); lower it"
        )
    if rules.max_surge_accelerators is None:
        return surge_missing(rules, most)
    total = _total(rules.max_surge_accelerators, most, shares)
    counts = [(old, new, size) for size in range(1, most + 1) for old, new in peaks(rules, size)]
    old, new, size = max(counts, key=lambda each: each[0] * shares[0] + each[1] * shares[1])
    peak = old * shares[0] + new * shares[1]
    if peak <= total:
        return ""
    return (
        f"rollout.maxSurgeAccelerators is {rules.max_surge_accelerators:g}: with scaling.maxReplicas {most} "
        f"both revisions may take {_gpu(total)} together, and the rollout of {size} needs "
        f"{old} x {shares[0] / WHOLE:g} + {new} x {shares[1] / WHOLE:g} = {peak / WHOLE:g} of it; raise "
        f"maxSurgeAccelerators to {(peak - most * max(shares)) / WHOLE:g}, use stableScalesDown with more "
        "and smaller steps, or strategy Recreate"
    )


def _total(surge: float, most: int, shares: Iterable[int]) -> int:
    """Return the hundredths that both revisions may take: as much as the larger one may alone, so that a
    rollout that fits has an undo that can, and the surge."""
    return most * max(shares) + math.floor(round(surge * WHOLE, 6))


def _gpu(share: int) -> str:
    return f"{share / WHOLE:g} GPU"


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


def extra_replicas(spec: ModelSpec, record: ModelRecord, size: int, target: int) -> int:
    """Return how many replicas of the target, which take so many hundredths each, a rollout needs room for at
    its peak beside the stable's `size`."""
    if spec.rollout is None or spec.rollout.strategy == RECREATE:
        return 0
    rules, stable = rules_of(spec, record), _stable_share(record) or 0
    size = min(max(1, size), spec.scaling.max_replicas)
    # Where both take none of a GPU, they are alike.
    old_share, share = (stable, target) if target else (1, 1)
    more = max(old * old_share + new * share for old, new in peaks(rules, size)) - size * old_share
    return max(1, -(-more // share))


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
