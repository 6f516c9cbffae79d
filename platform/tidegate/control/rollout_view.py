"""A rollout as people and programs see it, and what is worth telling of a round. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from tidegate.control.desired import ModelRecord
from tidegate.control.observed import Observation
from tidegate.control.reasons import Reason
from tidegate.control.rollout_state import Note, RolloutState
from tidegate.messages.outcomes import cohort_of
from tidegate.messages.rollouts import Phase, RolloutView, UndoState

REFUSED = "ActionRefused"  # a note's reason


def view_of(record: ModelRecord, seen: Observation, position: int, now: float) -> RolloutView | None:
    """Return the rollout that is under way, or the last one; None: nothing was ever rolled out."""
    state = record.rollout
    if state is None:
        return None
    return RolloutView(
        model=record.name,
        id=state.id,
        strategy=state.strategy,
        phase=phase_of(state),
        stable=state.stable,
        target=state.target,
        weight=state.weight,
        step=state.step,
        steps=state.steps,
        reason=state.reason,
        message=f"{state.message} {state.note}".strip(),
        gates=state.gates,
        clean_requests=state.clean_requests,
        needed_requests=state.needed_requests,
        started=state.started,
        step_since=state.step_since,
        ended=state.ended,
        ends_at=_ends_at(state, now),
        position=position if state.phase == "Queued" else 0,
        replicas={name: _replicas(record.name, name, seen) for name in record.revisions},
        undo=_undo(record, state),
    )


def _undo(record: ModelRecord, state: RolloutState) -> UndoState:
    """What was asked since, or has begun since, takes the refusal's place in the note."""
    look = record.look
    if look is None or look.goal is None:
        return ""
    if not look.ended:
        return "LookedAt"
    return "Refused" if look.reason and look.message == state.note else ""


def phase_of(state: RolloutState) -> Phase:
    if state.has_ended:
        return state.phase
    return "Paused" if state.is_paused or state.reason == Reason.RolloutPaused else state.phase


def label_of(state: RolloutState | None) -> str:
    """Return the cohort of requests that are admitted now; empty: none are compared."""
    if state is None or state.strategy == "AllAtOnce" or state.phase not in ("Shadow", "Progressing"):
        return ""
    return cohort_of(state.id, state.weight)


def notes_of(before: ModelRecord, after: ModelRecord, refusal: str) -> Iterator[Note]:
    """Tell what a round has decided: how a rollout went on, what was refused, and what a look has found."""
    if refusal:
        yield Note(after.name, REFUSED, refusal, is_trouble=True)
    if (look := after.look) is not None and look.ended and look != before.look and look.is_news:
        yield Note(after.name, look.reason or "SourceLookedAt", look.message, is_trouble=bool(look.reason))
    old, new = before.rollout, after.rollout
    if new is None or (old is None and new.has_ended):
        return
    if old is None or _position(old) != _position(new):
        yield Note(after.name, new.reason, f"{phase_of(new)}: {new.message}", new.phase == "Aborted")


def _position(state: RolloutState) -> tuple[str, Phase, int, int]:
    return state.id, phase_of(state), state.step, state.weight


def _replicas(model: str, revision: str, seen: Observation) -> str:
    state = seen.application(model, revision)
    wanted = state.wanted_replicas if state is not None else 0
    return f"{seen.ready_replicas(model, revision)}/{wanted}"


def _ends_at(state: RolloutState, now: float) -> float:
    """Predict the end from the times that are left and the rate of good requests so far; 0 where a person, a
    load or more requests than come decide it."""
    if state.has_ended or state.phase != "Progressing" or state.is_paused:
        return 0.0
    left = state.steps[state.step :]
    if any(step.pause for step in left[1:]) or (left[0].pause and state.released < state.step):
        return 0.0
    at = max(now, state.step_since + left[0].hold_seconds)
    missing = state.needed_requests - state.clean_requests
    if missing > 0:
        if not state.clean_requests:
            return 0.0
        so_far = now - (state.step_since if state.step == 0 else state.started)
        at = max(at, now + missing * so_far / state.clean_requests)
    return at + sum(step.hold_seconds for step in left[1:])
