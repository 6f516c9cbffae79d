"""What people ask of rollouts: each action is taken up once, or refused with a sentence. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from tidegate.control.desired import WHOLE, ModelRecord, RevisionRecord
from tidegate.control.looks import recheck, undo
from tidegate.control.reasons import Reason
from tidegate.control.resources import Model
from tidegate.control.rollout import aborted
from tidegate.control.rollout_state import RolloutState
from tidegate.messages.rollouts import Action

History = Sequence[RevisionRecord]
Step = Callable[[ModelRecord, RolloutState, Action, float], ModelRecord | str]


def acted(
    record: ModelRecord, model: Model, action: Action, history: History, now: float
) -> tuple[ModelRecord, str]:
    """Return the record after `action` and, where it was refused, why. One that was taken up already changes
    nothing."""
    if record.acted == action:
        return record, ""
    if action.verb == "undo":
        found = _undone(record, model, action, history, now)
    elif action.verb == "restart":
        found = _restarted(record, now)
    elif action.verb == "recheck":
        found = recheck(record, model, action.author, now)
    else:
        found = _on(record, action, now)
    refusal = f"{action.verb} was refused: {found}" if isinstance(found, str) else ""
    taken = record if isinstance(found, str) else found
    if taken.rollout is not None:
        taken = replace(taken, rollout=replace(taken.rollout, note=refusal))
    return replace(taken, acted=action), refusal


def _restarted(record: ModelRecord, now: float) -> ModelRecord:
    fresh = {name: replace(kept, restarted=now) for name, kept in record.revisions.items()}
    return replace(record, revisions=fresh)


def _on(record: ModelRecord, action: Action, now: float) -> ModelRecord | str:
    if action.verb not in VERBS:
        return "a rollout knows no such action."
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
    return _with_refusal_lifted(record, state)


def _with_refusal_lifted(record: ModelRecord, state: RolloutState) -> ModelRecord:
    kept = record.revisions.get(state.target)
    if kept is not None:
        kept = replace(kept, attempt_at=0.0, failures=0, retry_at=0.0, reason="", message="", retired_at=0.0)
        record = record.with_revision(kept)
    return replace(record, rollout=replace(state, is_refused=False))


VERBS: Mapping[str, Step] = {
    "pause": _pause,
    "resume": _resume,
    "promote": _promote,
    "abort": _abort,
    "retry": _retry,
}


def _undone(
    record: ModelRecord, model: Model, action: Action, history: History, now: float
) -> ModelRecord | str:
    """Make the goal what is asked for. The rollout to it, or back to what stands, begins as any other."""
    known = {each.revision: each for each in (*record.revisions.values(), *history)}
    goal = action.revision or _before(record, history)
    if not goal:
        return "no revision is known from before."
    if goal not in known:
        return f"revision {goal!r} is not known; known are {', '.join(known) or 'none'}."
    state = record.rollout
    is_under_way = state is not None and not state.has_ended
    if record.weights == {goal: WHOLE} and not is_under_way:
        return f"revision {goal} has all the traffic."
    if state is not None and state.refuses(goal):
        record = _with_refusal_lifted(record, state)
    return undo(record, model, known[goal], action.author, now)


def _before(record: ModelRecord, history: History) -> str:
    """Return the revision before the one that takes over, or else before the one with the traffic; one that
    was given up is none."""
    state = record.rollout
    if state is not None and not state.has_ended and state.stable:
        return state.stable
    lead = next(iter(record.serving), None)
    if lead is None:
        return ""
    served: dict[str, bool] = {}
    for each in (*history, *record.revisions.values()):
        served[each.revision] = served.get(each.revision, False) or each.is_proved
    names = [name for name, has_served in served.items() if has_served or name == lead.revision]
    names = [name for name in names if state is None or not state.refuses(name)]
    earlier = names[: names.index(lead.revision)]
    return earlier[-1] if earlier else ""
