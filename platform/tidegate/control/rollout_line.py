"""Who of a Pool's models may roll out now, and who waits for whom. Pure.

Where not all find room they go one after the other, in the order in which they were asked for. One that would
find none though nobody else rolls is refused with the sum, and holds nobody up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from msgspec.structs import replace as struct_replace

from tidegate.control.desired import ModelRecord, RevisionRecord, recorded_spec
from tidegate.control.observed import Observation, RevisionKey, SourceState, application_name
from tidegate.control.packing import Packing, Placement, Refusal
from tidegate.control.reasons import Reason
from tidegate.control.resources import Model
from tidegate.control.rollout import ALL_AT_ONCE, Moment, begun, may_stand, must_line_up
from tidegate.control.seating import pack, places, seat_at
from tidegate.control.surge import Held, Rolling, extra_replicas, has_room, surge_refusal


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of one model now. `model` is as it should run: with the spec of an undo's goal in the
    place of its own. `moment` has the record with what people asked for; `refusal` says why an action was
    refused."""

    model: Model
    moment: Moment
    source: SourceState | None
    misfit: Refusal | None = None
    refusal: str = ""
    deleting_since: float | None = None

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def record(self) -> ModelRecord:
        return self.moment.record

    @property
    def target(self) -> str:
        return self.moment.target

    def at(self, position: int, refusal: str = "") -> Asked:
        """Return it with its rollout begun, or at this place of the line."""
        moment = replace(self.moment, position=position, refusal=refusal)
        return replace(self, moment=replace(moment, record=begun(moment)))


@dataclass(frozen=True, slots=True)
class Line:
    """`asked` with their rollouts begun or in the line. `packing` seats what may stand (None: on one
    machine); what is `left_out` of it keeps the place that it has. `positions` are those in the line, from
    1."""

    asked: Sequence[Asked]
    packing: Packing | None
    left_out: frozenset[RevisionKey]
    positions: Mapping[str, int] = field(default_factory=dict)


def line_up(asked: Sequence[Asked], seen: Observation, now: float) -> Line:
    found = {each.name: each if each.deleting_since is not None else each.at(1) for each in asked}
    for name, each in found.items():
        if each.deleting_since is None and not must_line_up(each.record):
            found[name] = each.at(0)
    positions: dict[str, int] = {}
    for name in _waiting(found.values()):
        trial = {**found, name: found[name].at(0)}
        packing = _packed(trial, seen, now, _left_out(trial.values(), seen, now))
        key = (name, trial[name].target)
        refusal = packing.refusals.get(key) if packing is not None else None
        coming = _rolling(trial[name], seen, packing.placements.get(key) if packing is not None else None)
        others = list(_begun(found.values(), seen))
        missing = _surge_refusal(trial[name], coming) if refusal is None else ""
        if missing:
            found[name] = replace(found[name].at(0, missing), misfit=(Reason.SurgeTooSmall, missing))
        elif refusal is not None and not others:
            found[name] = replace(found[name].at(0, refusal[1]), misfit=refusal)
        elif positions or refusal is not None or not _fits(coming, others, found, seen):
            positions[name] = len(positions) + 1
            found[name] = found[name].at(positions[name])
        else:
            found = trial
    for name, each in found.items():
        if _is_under_way(each) and (missing := _surge_refusal(each, _rolling(each, seen))):
            found[name] = replace(each, misfit=(Reason.SurgeTooSmall, missing))
    left_out = _left_out(found.values(), seen, now)
    return Line(list(found.values()), _packed(found, seen, now, left_out), left_out, positions)


def _waiting(asked: Collection[Asked]) -> list[str]:
    waiting = [each for each in asked if each.deleting_since is None and must_line_up(each.record)]
    return [each.name for each in sorted(waiting, key=_since)]


def _since(each: Asked) -> tuple[float, str]:
    state = each.record.rollout
    return (state.started if state is not None else 0.0), each.name


def _packed(
    found: Mapping[str, Asked], seen: Observation, now: float, left_out: Collection[RevisionKey]
) -> Packing | None:
    return pack(
        [each.model for each in found.values()],
        {name: each.record for name, each in found.items()},
        {name: each.target for name, each in found.items()},
        seen,
        now,
        {name: each.deleting_since for name, each in found.items() if each.deleting_since is not None},
        left_out,
    )


def _left_out(asked: Collection[Asked], seen: Observation, now: float) -> frozenset[RevisionKey]:
    return frozenset(
        key for each in asked if each.deleting_since is None for key in _resting(each, seen, now)
    )


def _resting(each: Asked, seen: Observation, now: float) -> Iterator[RevisionKey]:
    """The revisions that the rollout lets have no replicas now."""
    record, seconds = each.record, each.moment.rules.abort_scale_down_seconds
    for revision in record.revisions:
        if not may_stand(record, revision, seen, now, seconds):
            yield each.name, revision
    state = record.rollout
    if each.target in record.revisions or state is None or state.target != each.target:
        return
    if state.is_refused or state.phase == "Queued":
        yield each.name, each.target


def _fits(coming: Rolling, others: Sequence[Rolling], found: Mapping[str, Asked], seen: Observation) -> bool:
    """One before whom there is nobody begins: `packing` and `turns` say what is amiss, and make room. What a
    rollout has left behind is still before it."""
    is_first = not others and not any(_leaves_some(each, seen) for each in found.values())
    return is_first or has_room(coming, others, _held(found.values(), seen), places(seen))


def _leaves_some(each: Asked, seen: Observation) -> bool:
    if each.model.spec.rollout is None or each.deleting_since is not None:
        return False
    serving = {application_name(each.name, revision) for revision in each.record.weights}
    return any(state.name not in serving for state in seen.of_model(each.name))


def _begun(asked: Collection[Asked], seen: Observation) -> Iterator[Rolling]:
    return (_rolling(each, seen) for each in asked if _is_under_way(each))


def _is_under_way(each: Asked) -> bool:
    """Tell whether its rollout has begun, and needs room beside what serves."""
    state = each.record.rollout
    if state is None or state.has_ended or state.phase == "Queued":
        return False
    return bool(state.stable) and state.strategy != ALL_AT_ONCE


def _surge_refusal(each: Asked, coming: Rolling) -> str:
    return surge_refusal(each.model.spec, each.record, coming.seat.hundredths)


def _rolling(each: Asked, seen: Observation, placement: Placement | None = None) -> Rolling:
    state = each.record.rollout
    assert state is not None
    kept = each.record.revisions.get(each.target) or RevisionRecord(each.target, {})
    if placement is not None:
        kept = struct_replace(kept, placement=placement)
    seat = seat_at(each.model.spec, kept)
    return Rolling(
        kept.group,
        seat,
        extra_replicas(each.model.spec, each.record, state.size, seat.hundredths),
        seen.ready_replicas(each.name, each.target),
    )


def _held(asked: Collection[Asked], seen: Observation) -> Iterator[Held]:
    """What is not recorded any more is taken for one like those that are. Of what goes Serve does not say how
    many replicas are still ending; they may be all."""
    for each in asked:
        for application in seen.of_model(each.name):
            revision = application.name.rpartition("--")[2]
            kept = each.record.revisions.get(revision) or each.record.lead
            if kept is None:
                continue
            seat = seat_at(recorded_spec(kept, each.model.spec), kept)
            nodes = [replica.node for replica in application.replicas]
            if application.status == "DELETING":
                nodes = [""] * each.model.spec.scaling.max_replicas
            yield from (Held(kept.group, seat, node) for node in nodes)
