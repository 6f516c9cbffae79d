"""The decision of the control loop: specs, records and one observation in, everything to do out. Pure.

For each model: resolve its source, decide on a revision, let it prove itself while the old one serves
(`attempts`), move the traffic and let the old one drain (`rollout`). A revision that fails before it has ever
proved itself leaves Serve at once and is tried again later; the old one stays.

In a cluster each revision also needs a place in a group of workers (`seating`); one that finds none never
reaches Serve, and its conditions say so. Where not all fit at once they take turns (`turns`).

A model that is being deleted takes no new requests, finishes those it has within a limit, and is then named
in `PoolPlan.drained`.

The host applies a plan and observes again; nothing lasts but `PoolPlan.records`, so a host that starts anew
goes on where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replace_moment

from msgspec.structs import replace

from tidegate.control.attempts import judged
from tidegate.control.condition_checks import Facts
from tidegate.control.desired import (
    ModelRecord,
    RevisionRecord,
    recorded_spec,
    revision_of,
    spec_on_wire,
    target_of,
)
from tidegate.control.history import HISTORY_LIMIT, cause_of
from tidegate.control.history import kept as history_kept
from tidegate.control.looks import looked, next_look, questions, standing
from tidegate.control.observed import Observation, RevisionKey, SourceState
from tidegate.control.packing import Packing, Refusal
from tidegate.control.reasons import PROGRESSING, Reason
from tidegate.control.resources import Model, PoolSpec
from tidegate.control.rollout import SWITCH_SECONDS, Moment, is_judged, may_stand, moved, moves, retired
from tidegate.control.rollout_actions import acted
from tidegate.control.rollout_line import Asked, Line, line_up
from tidegate.control.rollout_state import Note
from tidegate.control.rollout_view import notes_of, view_of
from tidegate.control.seating import bounded, claim, is_found, places, seated, source_of, suited
from tidegate.control.serve_config import Application
from tidegate.control.sizing import asked_task, misfit
from tidegate.control.status import entry_of
from tidegate.control.surge import Bounds, bounds_of
from tidegate.control.turns import Claim, Turns, take_turns
from tidegate.messages.registry import ModelEntry
from tidegate.messages.rollouts import Action, RolloutView

DRAIN_LIMIT_SECONDS = 300.0  # how long the requests of a deleted model may take to end

PROGRESSING_SECONDS = 0.5
SETTLED_SECONDS = 3.0  # drift is found at the latest after it
TURNS_SECONDS = 1.0  # while some sleep that do not all fit: one that is asked needs a decision to wake


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """All that one decision takes. `models` are in reading order: the first gets its replica first. `records`
    are those of the plan before. `deleting` says since when (unix seconds) models are being deleted, which
    stand in `models` as long as they drain. `refused` says why a newer spec of a model is not what it runs
    with. `actions` are asked of models and not known to be acted on, `drains` are models that should take no
    new requests. `authors` changed the models' specs last, `history` is what the plan before left of it.
    `wave` lowers the pool's bound on unbuilt applications, as on a small machine."""

    models: Sequence[Model]
    pool: PoolSpec
    records: Mapping[str, ModelRecord]
    seen: Observation
    deleting: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    authors: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[str, Sequence[RevisionRecord]] = field(default_factory=dict)
    actions: Mapping[str, Action] = field(default_factory=dict)
    drains: frozenset[str] = frozenset()
    wave: int | None = None


@dataclass(frozen=True, slots=True)
class RegistryChanges:
    """Gateways should read this other than they do, in this order: models to forget, revisions whose queue
    and report go (with the sentence for whom it concerns), entries to put; then, since no more requests come
    there, queues to empty into others (from, to, and whether what has begun may go on there), and rollouts
    whose counts are of no use any more, with the queues that have some. All may be repeated."""

    delete: tuple[str, ...] = ()
    drop: tuple[tuple[RevisionKey, str], ...] = ()
    put: tuple[ModelEntry, ...] = ()
    move: tuple[tuple[RevisionKey, RevisionKey, bool], ...] = ()
    forget_outcomes: tuple[tuple[tuple[RevisionKey, ...], str], ...] = ()


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Everything to do, in this order. Records come first: a crash after them repeats a step and forgets
    none. Then what gateways read, so that traffic has moved, and a model that goes is refused, before
    `applications` (the whole set that Serve should hold) takes replicas away.

    `entries` is all that the registry should hold of these models. `resolve` are those of
    `looks.questions` that nobody looks at yet, `drained` models being deleted of which nothing is left.
    `next_at` is when time alone changes something (unix seconds; None: it does not); `is_settled` False:
    decide again soon. `history` is all that should be stored of it. `rollouts` are for people and programs to
    read, `notes` what was decided about them in this round.
    """

    records: Mapping[str, ModelRecord]
    entries: Mapping[str, ModelEntry]
    registry: RegistryChanges
    resolve: tuple[RevisionKey, ...]
    applications: tuple[Application, ...]
    drained: tuple[str, ...]
    is_settled: bool
    next_at: float | None
    history: Mapping[str, Sequence[RevisionRecord]] = field(default_factory=dict)
    rollouts: Mapping[str, RolloutView] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def pause_seconds(self, now: float, other_at: float | None = None) -> float:
        """Return how long the pool can wait for its next decision; `other_at` is when time changes something
        that the plan does not know of."""
        if not self.is_settled:
            return PROGRESSING_SECONDS
        pauses = [at - now for at in (self.next_at, other_at) if at is not None]
        return max(PROGRESSING_SECONDS, min([SETTLED_SECONDS, *pauses]))


@dataclass(frozen=True, slots=True)
class _Step:
    """One model's part. `live` are its revisions that should stand, those with traffic first; `misfit` says
    why the target finds no place; `dropped` are revisions that go, each with the message for its requests;
    `bounds` are a rollout's, of the replicas of its revisions; `position` is its place in the Pool's line."""

    model: Model
    record: ModelRecord
    target: str
    source: SourceState | None
    misfit: Refusal | None
    live: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    position: int = 0
    notes: tuple[Note, ...] = ()
    deleting_since: float | None = None

    @property
    def name(self) -> str:
        return self.model.name


def plan_pool(snapshot: PoolSnapshot, now: float) -> PoolPlan:
    seen = snapshot.seen
    line = line_up([_asked(model, snapshot, now) for model in snapshot.models], seen, now)
    steps = [
        _drain(each, line, seen) if each.deleting_since is not None else _step(each, line, snapshot, now)
        for each in line.asked
    ]
    drained = tuple(step.name for step in steps if _is_drained(step, seen, now))
    steps = [step for step in steps if step.name not in drained]

    claims = [each for step in steps for each in _claims(step, seen, now)]
    # What holds room is Serve's to say; while it is silent nothing is written to it either.
    turns = take_turns(claims, places(seen), now) if seen.serve is not None else Turns()
    admitted, waiting = _admit(steps, snapshot, turns)
    records = {step.name: _begun(step, admitted, turns, now) for step in steps}
    facts = (_facts(step, records[step.name], waiting, snapshot, line.packing) for step in steps)
    entries = {each.model.name: entry_of(each, now) for each in facts}
    forgotten = dict.fromkeys(name for name in (*snapshot.records, *seen.entries) if name not in records)
    return PoolPlan(
        records=records,
        entries=entries,
        registry=RegistryChanges(
            delete=tuple(forgotten),
            drop=tuple(((step.name, revision), why) for step in steps for revision, why in step.dropped),
            put=tuple(entry for name, entry in entries.items() if entry != seen.entries.get(name)),
            move=tuple(move for step in steps for move in _moves(step, seen)),
            forget_outcomes=tuple(_forgotten(steps, snapshot.records)),
        ),
        resolve=tuple(
            key
            for key in questions(snapshot.models, records)
            if key[0] in records and key[0] not in snapshot.deleting and _is_unanswered(key, seen)
        ),
        applications=tuple(app for step in steps for app in _applications(step, admitted, turns)),
        drained=drained,
        is_settled=all(map(_is_settled, entries.values())) and seen.serve is not None,
        next_at=_next_at(steps, claims, turns, now),
        history={
            step.name: history_kept(
                snapshot.history.get(step.name, ()), records[step.name], _history_limit(step.model)
            )
            for step in steps
        },
        rollouts=_views(steps, records, seen, now),
        notes=tuple(note for step in steps for note in step.notes),
    )


def _put_down(model: Model, snapshot: PoolSnapshot) -> Model:
    """Return the model as it should run: one that drains takes no new requests, so once its own have ended it
    needs no replica."""
    if model.name not in snapshot.drains:
        return model
    scaling = model.spec.scaling.model_copy(update={"min_replicas": 0, "idle_seconds": 0.0})
    return model.model_copy(update={"spec": model.spec.model_copy(update={"scaling": scaling})})


def queues_of(models: Iterable[Model], records: Mapping[str, ModelRecord]) -> list[RevisionKey]:
    """Return the revisions whose depths and reports a decision may need: the recorded and the newest."""
    recorded = [(name, revision) for name, record in records.items() for revision in record.revisions]
    return list(dict.fromkeys([*recorded, *((model.name, revision_of(model.spec)) for model in models)]))


def compared_of(records: Mapping[str, ModelRecord]) -> list[RevisionKey]:
    """Return the revisions whose outcomes a decision may need: those of rollouts that are under way."""
    rolling = {name: record.rollout for name, record in records.items() if record.rollout is not None}
    return [
        (name, revision)
        for name, state in rolling.items()
        if is_judged(state)
        for revision in (state.target, state.stable)
        if revision
    ]


def _asked(model: Model, snapshot: PoolSnapshot, now: float) -> Asked:
    """Return what is asked of a model: by its spec, or by a person who undid that, and by other actions."""
    seen, name = snapshot.seen, model.name
    record = snapshot.records.get(name) or ModelRecord(name=name, created=int(now))
    record, refusal = looked(model, record, seen, now), ""
    since, action = snapshot.deleting.get(name), snapshot.actions.get(name)
    if since is None and action is not None:
        record, refusal = acted(record, model, action, snapshot.history.get(name, ()), now)
    elif record.acted is not None:
        record = replace(record, acted=None)  # the next one may be the same again
    model = _put_down(standing(model, record), snapshot)
    target = target_of(model, record, seen.sources) or revision_of(model.spec)
    source = source_of(model, record, target, seen)
    too_big = misfit(model.spec, source, seen.capacity) if not seen.groups else None
    fits = is_found(model, source) and too_big is None
    moment = Moment(model.spec, record, target, seen, now, is_found=fits)
    return Asked(model, moment, source, too_big, refusal, since)


def _step(asked: Asked, line: Line, snapshot: PoolSnapshot, now: float) -> _Step:
    model, target, source, seen = asked.model, asked.target, asked.source, snapshot.seen
    record, packing, too_big = asked.record, line.packing, asked.misfit
    if packing is not None and too_big is None:
        too_big = packing.refusals.get((model.name, target))
    is_refused = record.rollout is not None and record.rollout.refuses(target)
    # In a cluster also what finds no place is recorded: its source need not be resolved again.
    if asked.moment.is_found and not is_refused:
        author = snapshot.authors.get(model.name, "")
        record = record.with_target(_wanted(model, record, target, source, author, now))
    record, failed = judged(record, seen, now)
    record = moved(replace_moment(asked.moment, record=record))
    abort_seconds = asked.moment.rules.abort_scale_down_seconds
    record, gone = retired(record, target, seen, now)
    record = seated(record, packing, line.left_out)
    live = [
        revision
        for revision, kept in record.revisions.items()
        if (kept.is_proved or revision == target)
        and now >= kept.retry_at
        and (packing is None or kept.placement is not None)
        and may_stand(record, revision, seen, now, abort_seconds)
    ]
    live.sort(key=lambda revision: (revision not in record.weights, revision != target))
    before = snapshot.records.get(model.name) or ModelRecord(name=model.name, created=record.created)
    return _Step(
        model,
        record,
        target,
        source,
        too_big,
        tuple(live),
        (*failed, *gone),
        bounds=bounds_of(model.spec, record, _loads(model, record, seen), seen),
        position=line.positions.get(model.name, 0),
        notes=tuple(notes_of(before, record, asked.refusal)),
    )


def _loads(model: Model, record: ModelRecord, seen: Observation) -> dict[str, int]:
    return {
        revision: suited(kept, model.spec, seen.depths.get((record.name, revision)))
        for revision, kept in record.revisions.items()
    }


def _wanted(
    model: Model, record: ModelRecord, target: str, source: SourceState | None, author: str, now: float
) -> RevisionRecord:
    """Return the target as it should be recorded. Scaling and queue change in place: what runs while a later
    spec is refused is the last valid one."""
    spec = spec_on_wire(model.spec)
    known = record.revisions.get(target)
    if known is None:
        known = RevisionRecord(
            revision=target,
            spec=spec,
            spec_hash=revision_of(model.spec),
            created=now,
            cause=cause_of(record, spec),
            author=author,
        )
    if not known.checkpoint:
        known = known.with_source(source or SourceState("resolved"))
    if not known.is_proved:  # other probes are other replicas
        known = replace(known, probes=model.spec.rollout.asked if model.spec.rollout is not None else [])
    return replace(known, spec=spec, retired_at=0.0)


def _drain(asked: Asked, line: Line, seen: Observation) -> _Step:
    """A model being deleted keeps what stands, or has served, until its requests have ended."""
    model, packing = asked.model, line.packing
    record = seated(asked.record, packing)
    live = [
        revision
        for revision, kept in record.revisions.items()
        if (kept.is_proved or seen.application(model.name, revision) is not None)
        and (packing is None or kept.placement is not None)
    ]
    live.sort(key=lambda revision: revision not in record.weights)
    target = record.serving[0].revision if record.serving else asked.target
    source = source_of(model, record, target, seen)
    return _Step(model, record, target, source, None, tuple(live), deleting_since=asked.deleting_since)


def _is_drained(step: _Step, seen: Observation, now: float) -> bool:
    """Tell whether nothing is left to wait for, or the limit is over."""
    if step.deleting_since is None:
        return False
    age_seconds, revisions = now - step.deleting_since, step.record.revisions
    if not revisions or age_seconds >= DRAIN_LIMIT_SECONDS:
        return True
    return age_seconds >= SWITCH_SECONDS and seen.unfinished(step.name, revisions) == 0


def _claims(step: _Step, seen: Observation, now: float) -> Iterator[Claim]:
    is_deleting = step.deleting_since is not None
    for revision in step.live:
        kept = step.record.revisions[revision]
        spec = bounded(recorded_spec(kept, step.model.spec), step.bounds.get(revision))
        yield claim(step.record, kept, spec, seen, now, is_deleting=is_deleting)


def _admit(
    steps: Sequence[_Step], snapshot: PoolSnapshot, turns: Turns
) -> tuple[set[RevisionKey], dict[RevisionKey, Refusal]]:
    """Choose the live revisions that may stand in Serve now, and say why others wait, or lack a replica.

    What stands already stays. Revisions with traffic come before new ones, each in reading order.
    """
    pool, seen = snapshot.pool, snapshot.seen
    max_unbuilt = min(pool.max_unbuilt, snapshot.wave or pool.max_unbuilt)
    wanted = [
        ((step.name, revision), revision in step.record.weights) for step in steps for revision in step.live
    ]
    standing = {key: state for key, _ in wanted if (state := seen.application(*key)) is not None}
    admitted = set(standing)
    unbuilt = sum(not state.is_built for state in standing.values())
    waiting: dict[RevisionKey, Refusal] = {
        key: (Reason.WaitingForRoom, why) for key, why in turns.waiting.items()
    }
    unproved = {
        (step.name, name) for step in steps for name in step.live if not step.record.revisions[name].is_proved
    }
    for key, _ in sorted((item for item in wanted if item[0] not in standing), key=lambda item: not item[1]):
        if key in unproved and turns.granted.get(key) == 0:
            continue  # nothing could prove it
        if len(admitted) >= pool.max_live_revisions:
            waiting[key] = (Reason.PoolFull, "")
        elif unbuilt >= max_unbuilt:
            waiting[key] = (Reason.Queued, "")
        else:
            admitted.add(key)
            unbuilt += 1
    return admitted, waiting


def _begun(step: _Step, admitted: set[RevisionKey], turns: Turns, now: float) -> ModelRecord:
    """Return the step's record with the attempts, and the waits for room, that begin or end now."""
    record = step.record
    for revision, kept in record.revisions.items():
        key = (step.name, revision)
        begins = key in admitted and revision in step.live and not kept.attempt_at
        kept = replace(
            kept,
            attempt_at=now if begins else kept.attempt_at,
            waits_since=(kept.waits_since or now) if key in turns.waiting else 0.0,
        )
        record = record.with_revision(kept)
    return record


def _applications(step: _Step, admitted: set[RevisionKey], turns: Turns) -> Iterator[Application]:
    for revision in step.live:
        if (step.name, revision) not in admitted:
            continue
        kept = step.record.revisions[revision]
        spec = recorded_spec(kept, step.model.spec)
        yield Application(
            step.name,
            revision,
            bounded(spec, step.bounds.get(revision)),
            kept.checkpoint,
            keep_awake=not kept.is_proved and step.deleting_since is None,
            placement=kept.placement,
            granted=turns.granted.get((step.name, revision)),
            leaves=(step.name, revision) in turns.leaving,
            restarted=kept.restarted,
            probes=tuple(kept.probes),
            commit=kept.commit if kept.is_named_by_content else "",
            digest=kept.digest if kept.is_named_by_content else "",
            task=asked_task(spec, kept.source),
        )


def _moves(step: _Step, seen: Observation) -> Iterator[tuple[RevisionKey, RevisionKey, bool]]:
    for source, goal, may_continue in moves(step.record, seen) if step.deleting_since is None else ():
        yield (step.name, source), (step.name, goal), may_continue


def _forgotten(
    steps: Sequence[_Step], before: Mapping[str, ModelRecord]
) -> Iterator[tuple[tuple[RevisionKey, ...], str]]:
    """The rollouts in whose place another has begun."""
    for step in steps:
        past = before[step.name].rollout if step.name in before else None
        if past is not None and step.record.rollout is not None and past.id != step.record.rollout.id:
            yield tuple((step.name, revision) for revision in step.record.revisions), past.id


def _history_limit(model: Model) -> int:
    return model.spec.rollout.history_limit if model.spec.rollout is not None else HISTORY_LIMIT


def _views(
    steps: Sequence[_Step], records: Mapping[str, ModelRecord], seen: Observation, now: float
) -> dict[str, RolloutView]:
    found = {step.name: view_of(records[step.name], seen, step.position, now) for step in steps}
    return {name: view for name, view in found.items() if view is not None}


def _facts(
    step: _Step,
    record: ModelRecord,
    waiting: Mapping[RevisionKey, Refusal],
    snapshot: PoolSnapshot,
    packing: Packing | None,
) -> Facts:
    return Facts(
        model=step.model,
        record=record,
        target=step.target,
        source=step.source,
        misfit=step.misfit,
        waiting={
            revision: waiting[step.name, revision]
            for revision in record.revisions
            if (step.name, revision) in waiting
        },
        seen=snapshot.seen,
        is_deleting=step.deleting_since is not None,
        is_drained=step.name in snapshot.drains,
        refused=snapshot.refused.get(step.name),
        parks=_parks(step, packing),
    )


def _parks(step: _Step, packing: Packing | None) -> dict[str, str]:
    """The revisions whose weights should stay in host memory while they sleep, each with why they cannot. On
    one machine the one that holds them decides what fits."""
    scaling = step.model.spec.scaling
    if scaling.zero != "Parked" or scaling.min_replicas or step.deleting_since is not None:
        return {}
    if packing is None:
        return dict.fromkeys(step.live, "")
    return {
        each: packing.parked[step.name, each] for each in step.live if (step.name, each) in packing.parked
    }


def _is_unanswered(key: RevisionKey, seen: Observation) -> bool:
    known = seen.sources.get(key)
    return known is None or known.is_unasked


def _next_at(steps: Sequence[_Step], claims: Sequence[Claim], turns: Turns, now: float) -> float | None:
    times = [kept.retry_at for step in steps for kept in step.record.revisions.values()]
    for step in steps:
        if (at := next_look(step.model, step.record)) is not None:
            times.append(at)
        if step.deleting_since is not None:
            times += [step.deleting_since + SWITCH_SECONDS, step.deleting_since + DRAIN_LIMIT_SECONDS]
    if any(turns.granted.get(each.key, each.most) < each.most for each in claims):
        times.append(now + TURNS_SECONDS)
    return min((at for at in times if at > now), default=None)


def _is_settled(entry: ModelEntry) -> bool:
    return not any(item.type == PROGRESSING and item.status != "False" for item in entry.conditions)
