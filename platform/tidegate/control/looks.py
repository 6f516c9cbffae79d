"""Looks at sources after the first: whether other content lies there, or still that of an old revision. Pure.

A first look is asked for by the spec's hash, and its answer is recorded with the revision. A later one is a
`Look` in the record, asked for by a key of its own: a person asks for it (`recheck`, `undo`), it is due
(`spec.source.recheckSeconds`), or a replica has found other content than its revision's. The hosts resolve
what `questions` says, and `looked` takes the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from tidegate.control.desired import (
    UNCHANGED,
    Look,
    ModelRecord,
    Pin,
    RevisionRecord,
    fitting,
    named,
    recorded_spec,
    revision_of,
    spec_on_wire,
    target_of,
)
from tidegate.control.history import CONTENT_CHANGED, unborn
from tidegate.control.observed import Observation, RevisionKey, SourceState
from tidegate.control.reasons import Reason
from tidegate.control.resources import STORED, Model, ModelSpec
from tidegate.control.sizing import misfit

SUPERSEDED = "The spec has changed meanwhile."


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a source. `model` has the spec that names it; without a `look` it is the first."""

    model: Model
    look: Look | None = None

    @property
    def uri(self) -> str:
        return self.model.spec.source.uri if self.model.spec.source is not None else ""

    @property
    def identity(self) -> str:
        """Equal where one answer serves: first looks at one source."""
        return f"{self.model.name}--{self.look.key}" if self.look is not None else self.uri

    @property
    def arguments(self) -> list[str]:
        """What `python -m tidegate.sources resolve` is told of it."""
        goal = self.look.goal if self.look is not None else None
        if goal is None:
            return [self.uri]
        pins = {"--commit": goal.commit, "--digest": goal.digest}
        since = ["--since", str(int(goal.created))] if goal.created else []
        return [self.uri, *(part for pin in pins.items() if pin[1] for part in pin), *since]


def questions(models: Sequence[Model], records: Mapping[str, ModelRecord]) -> dict[RevisionKey, Question]:
    """Return all that is to be known of sources now, by the keys of `Observation.sources`."""
    asked: dict[RevisionKey, Question] = {}
    for each in models:
        record = records.get(each.name) or ModelRecord(each.name, 0)
        model = standing(each, record)
        spec_hash, look = revision_of(model.spec), record.look
        if look is not None and not look.ended:
            goal = look.goal
            of = (
                each
                if goal is None
                else _with_spec(each, ModelSpec.model_validate(goal.spec, context=STORED))
            )
            asked[each.name, look.key] = Question(of, look)
        recorded = any(kept.is_of(spec_hash) and kept.checkpoint for kept in record.revisions.values())
        if model.spec.source is not None and not recorded:
            asked[model.name, spec_hash] = Question(model)
    return asked


def standing(model: Model, record: ModelRecord) -> Model:
    """Return the model as it should run: with the spec of the revision that an undo holds, where one does."""
    pin = record.pinned
    kept = record.revisions.get(pin.revision) if pin is not None else None
    if pin is None or kept is None or pin.spec_hash != revision_of(model.spec):
        return model
    return _with_spec(model, recorded_spec(kept, model.spec))


def recheck(record: ModelRecord, model: Model, author: str, now: float) -> ModelRecord:
    """Begin a look at what the source of the spec holds now. Without a source there is nothing to look at."""
    spec_hash = revision_of(model.spec)
    look = Look(spec_hash, now, author=author)
    if model.spec.source is None:
        look = replace(look, ended=now, message="The model has no source to look at.")
    return replace(record, look=look)


def undo(record: ModelRecord, model: Model, goal: RevisionRecord, author: str, now: float) -> ModelRecord:
    """Bring a revision of the history back. One that still stands is the target at once, and so is one
    without a source; else its source is looked at first, and nothing moves before the answer."""
    if (kept := record.revisions.get(goal.revision)) is not None:
        return _pinned(record, model, replace(kept, number=goal.number), author)
    if goal.spec.get("source") is None:
        return _pinned(record, model, unborn(goal), author)
    return replace(record, look=Look(revision_of(model.spec), now, unborn(goal), author))


def looked(model: Model, record: ModelRecord, seen: Observation, now: float) -> ModelRecord:
    """Return the record after what the source has answered, and with the look that is due."""
    spec_hash, look = revision_of(model.spec), record.look
    if record.pinned is not None and record.pinned.spec_hash != spec_hash:
        record = replace(record, pinned=None)
    if look is None or look.ended:
        is_due = now >= (next_look(model, record) or now + 1)
        return recheck(record, model, "", now) if is_due or _is_amiss(model, record, seen) else record
    if look.spec_hash != spec_hash:
        return _ended(record, look, now, "Superseded", SUPERSEDED)
    answer = seen.sources.get((model.name, look.key))
    if answer is None or answer.state == "resolving":
        return record
    if look.goal is not None:
        return _undone(record, model, look, look.goal, answer, now)
    return _rechecked(record, model, look, answer, seen, now)


def next_look(model: Model, record: ModelRecord) -> float | None:
    """Return when the source is due to be looked at again (unix seconds); None: never, or it is not known
    yet, or an undo holds another."""
    source, look = model.spec.source, record.look
    if source is None or not source.recheck_seconds or record.pinned is not None:
        return None
    name = target_of(model, record, {})
    if name is None or (look is not None and not look.ended):
        return None
    last = look.ended if look is not None and look.spec_hash == revision_of(model.spec) else 0.0
    return max(last, record.revisions[name].created) + source.recheck_seconds


def _is_amiss(model: Model, record: ModelRecord, seen: Observation) -> bool:
    """Tell whether a replica of the target has found other content since the last look. An undo holds what
    it was asked for: it is not given up for what lies there now."""
    name = target_of(model, record, {})
    report = seen.reports.get((model.name, name)) if name is not None else None
    if report is None or report.reason != Reason.SourceChanged or record.pinned is not None:
        return False
    return not report.proved and report.at > (record.look.ended if record.look is not None else 0.0)


def _rechecked(
    record: ModelRecord, model: Model, look: Look, answer: SourceState, seen: Observation, now: float
) -> ModelRecord:
    found = fitting(model.spec, answer)
    assert found is not None
    if found.state == "failed":
        return _ended(record, look, now, found.reason, found.message)
    own = [kept for kept in record.revisions.values() if kept.is_of(look.spec_hash)]
    known = next((kept for kept in reversed(own) if kept.digest in ("", found.digest)), None)
    name = known.revision if known is not None else named(model.spec, found)
    overruled = record.pinned is not None and name in (record.pinned.instead, record.pinned.revision)
    if overruled or (known is not None and known is own[-1]):
        if known is not None and not known.digest:
            record = record.with_revision(replace(known, commit=found.commit, digest=found.digest))
        return _ended(record, look, now, "", UNCHANGED)
    # In a cluster the packing says what finds no place.
    if not seen.groups and (too_big := misfit(model.spec, found, seen.capacity)) is not None:
        return _ended(record, look, now, *too_big)
    new = known or RevisionRecord(
        name,
        spec_on_wire(model.spec),
        spec_hash=look.spec_hash,
        created=now,
        cause=CONTENT_CHANGED,
        author=look.author,
    ).with_source(found)
    record = replace(record.with_target(replace(new, retired_at=0.0)), pinned=None)
    return _ended(record, look, now, "", f"The source has changed: revision {name}.")


def _undone(
    record: ModelRecord, model: Model, look: Look, goal: RevisionRecord, answer: SourceState, now: float
) -> ModelRecord:
    if answer.state == "failed":
        why = f"Revision {goal.number} ({goal.revision}) cannot come back: {answer.message}"
        return _ended(record, look, now, answer.reason, why)
    record = _pinned(record, model, goal.with_source(answer), look.author)
    unsure = "" if goal.digest else " Its content may be another: the version before did not record it."
    return _ended(record, look, now, "", f"Revision {goal.number} ({goal.revision}) comes back.{unsure}")


def _pinned(record: ModelRecord, model: Model, goal: RevisionRecord, author: str) -> ModelRecord:
    """Make the goal the target, as it stands or as its source was found."""
    spec_hash, pin = revision_of(model.spec), record.pinned
    instead = pin.instead if pin is not None else target_of(model, record, {}) or spec_hash
    goal = replace(goal, cause=f"undo to {goal.number}", author=author, retired_at=0.0)
    pinned = Pin(goal.revision, spec_hash, instead) if goal.revision != instead else None
    return replace(record.with_target(goal), pinned=pinned)


def _ended(record: ModelRecord, look: Look, now: float, reason: str, message: str) -> ModelRecord:
    if reason and record.rollout is not None:
        record = replace(record, rollout=replace(record.rollout, note=message))
    return replace(record, look=replace(look, ended=now, reason=reason, message=message))


def _with_spec(model: Model, spec: ModelSpec) -> Model:
    return model.model_copy(update={"spec": spec})
