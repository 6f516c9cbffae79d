"""What people ask of rollouts: each action is taken up once, or refused with a sentence. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from tidegate.control.desired import ModelRecord, RevisionRecord, revision_of
from tidegate.control.reasons import Reason
from tidegate.control.resources import ModelSpec
from tidegate.control.rollout import aborted
from tidegate.control.rollout_state import Pin, RolloutState
from tidegate.messages.rollouts import Action

History = Sequence[RevisionRecord]


def acted(
    record: ModelRecord, spec: ModelSpec, asked: str, action: Action, history: History, now: float
) -> tuple[ModelRecord, str]:
    """Return the record after `action` and, where it was refused, why. `asked` is the revision that the spec
    itself asks for. One that was taken up already, or is none of a rollout, changes nothing."""
    if record.acted == action or action.verb not in VERBS:
        return record, ""
    found = (
        _undone(record, spec, asked, action, history) if action.verb == "undo" else _on(record, action, now)
    )
    taken, refusal = (
        (record, f"{action.verb} was refused: {found}") if isinstance(found, str) else (found, "")
    )
    if taken.rollout is not None:
        taken = replace(taken, rollout=replace(taken.rollout, note=refusal))
    return replace(taken, acted=action), refusal


def unpinned(record: ModelRecord, spec: ModelSpec) -> ModelRecord:
    """End an undo once the spec is another."""
    if record.pinned is None or record.pinned.spec_hash == revision_of(spec):
        return record
    return replace(record, pinned=None)


Verb = Callable[[ModelRecord, RolloutState, Action, float], ModelRecord | str]


def _on(record: ModelRecord, action: Action, now: float) -> ModelRecord | str:
    if (state := record.rollout) is None:
        return "there has been no rollout yet."
    if state.has_ended and action.verb != "retry":
        return f"no rollout is under way; the last one, to revision {state.target}, is {state.phase.lower()}."
    return VERBS[action.verb](record, state, action, now)


def _pause(record: ModelRecord, state: RolloutState, _: Action, __: float) -> ModelRecord | str:
    if state.is_paused:
        return "the rollout is paused already."
    return replace(record, rollout=replace(state, is_paused=True))


def _resume(record: ModelRecord, state: RolloutState, _: Action, __: float) -> ModelRecord | str:
    if state.is_paused:
        return replace(record, rollout=replace(state, is_paused=False))
    if state.reason == Reason.RolloutPaused:
        return replace(record, rollout=replace(state, released=state.step))
    return "the rollout is not paused."


def _promote(record: ModelRecord, state: RolloutState, _: Action, __: float) -> ModelRecord | str:
    """End all that the step waits for but replicas and gates."""
    if state.phase not in ("Shadow", "Progressing"):
        return f"the rollout is {state.phase.lower()}: its new revision has to be ready first."
    return replace(record, rollout=replace(state, is_paused=False, skipped=state.step))


def _abort(record: ModelRecord, state: RolloutState, action: Action, now: float) -> ModelRecord | str:
    if not state.stable:
        return f"revision {state.target} is the model's first; there is none to go back to."
    by = f" by {action.author}" if action.author else ""
    return aborted(record, state, f"It was aborted{by}.", now)


def _retry(record: ModelRecord, state: RolloutState, _: Action, __: float) -> ModelRecord | str:
    if not state.is_refused:
        return f"revision {state.target} was not given up."
    kept = record.revisions.get(state.target)
    if kept is not None:
        kept = replace(kept, attempt_at=0.0, failures=0, retry_at=0.0, reason="", message="", retired_at=0.0)
        record = record.with_revision(kept)
    return replace(record, rollout=replace(state, is_refused=False))


VERBS: Mapping[str, Verb] = {
    "pause": _pause,
    "resume": _resume,
    "promote": _promote,
    "abort": _abort,
    "retry": _retry,
    "undo": _abort,  # has its own way: see `acted`
}


def _undone(
    record: ModelRecord, spec: ModelSpec, asked: str, action: Action, history: History
) -> ModelRecord | str:
    """Pin the goal. The rollout to it, or back to what stands, begins as any other."""
    known = {kept.revision: kept for kept in (*history, *record.revisions.values())}
    goal = action.revision or _before(record, history)
    if not goal:
        return "no revision is known from before."
    if goal not in known:
        return f"revision {goal!r} is not known; known are {', '.join(known) or 'none'}."
    state = record.rollout
    is_under_way = state is not None and not state.has_ended
    if record.weights == {goal: 100} and not is_under_way:
        return f"revision {goal} has all the traffic."
    if state is not None and state.refuses(goal):
        state = replace(state, is_refused=False)
    restored = record.revisions.get(goal) or replace(
        known[goal], proof=None, attempt_at=0.0, failures=0, retry_at=0.0, retired_at=0.0, placement=None
    )
    pinned = None if goal == asked else Pin(goal, revision_of(spec))
    return replace(record.with_revision(restored), rollout=state, pinned=pinned)


def _before(record: ModelRecord, history: History) -> str:
    """Return the revision before the one that takes over, or else before the one with the traffic."""
    state = record.rollout
    if state is not None and not state.has_ended and state.stable:
        return state.stable
    lead = next(iter(record.serving), None)
    names = list(dict.fromkeys(kept.revision for kept in (*history, *record.revisions.values())))
    if lead is None or lead.revision not in names:
        return ""
    earlier = names[: names.index(lead.revision)]
    return earlier[-1] if earlier else ""
