"""A rollout moves a model's traffic from one revision to the next. Pure.

It begins when the revision that is asked for has not all the traffic, and ends in one of two ways:
*Completed*, the target has it all and the stable goes; or *Aborted*, the stable has it all and the target
goes, is refused and never comes back by itself. Each round makes one step at most:

    Queued ── its turn in the Pool ──> Warming ── ready ──> (Shadow) ──> Progressing, by steps ──> Completed
       └──────────────────┴── a gate fails, or a person says so ──┴───────────┴──────────────────> Aborted

At all times the weights sum to `WHOLE`; one is raised only where no gate fails, nothing is missing and the
replicas for it are ready; and all that decides is in the record, so a host that starts anew goes on as if
nothing had been.

A model without `spec.rollout` has one step and no gates (`ALL_AT_ONCE`): its revision takes everything once
it has proved itself, and is tried again for ever where it fails.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from tidegate.control.desired import WHOLE, ModelRecord, RevisionRecord
from tidegate.control.observed import Observation
from tidegate.control.reasons import Reason
from tidegate.control.resources import ModelSpec
from tidegate.control.rollout_gates import Verdict, baseline, first_look, is_measured, shadowed, verdict_of
from tidegate.control.rollout_schema import RolloutSpec, needed_replicas
from tidegate.control.rollout_state import RolloutState
from tidegate.messages.rollouts import StepView

# Gateways follow the registry within a second; an old revision may get requests until then.
SWITCH_SECONDS = 3.0
ALL_AT_ONCE = "AllAtOnce"
RECREATE = "Recreate"


@dataclass(frozen=True, slots=True)
class Moment:
    """One model at one moment. `target` is the revision that is asked for; `is_found` says that its source is
    resolved and that it may have a place. `position` is its place in the Pool's line (0: it need not wait);
    `refusal` says why it fits nowhere, though nobody is before it."""

    spec: ModelSpec
    record: ModelRecord
    target: str
    seen: Observation
    now: float
    is_found: bool = True
    position: int = 0
    refusal: str = ""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def rules(self) -> RolloutSpec:
        """How it rolls; the defaults where the field was taken away under way."""
        return self.spec.rollout or RolloutSpec()

    @property
    def is_undo(self) -> bool:
        return self.record.pinned is not None and self.record.pinned.revision == self.target


def begun(moment: Moment) -> ModelRecord:
    """Return the record with the rollout to what is asked for: the one under way, or one that begins now in
    its place. What was given up does not begin again."""
    record = _without_replaced(moment)
    state = record.rollout
    if state is not None and not state.has_ended:
        return _with_its_turn(record, state, moment)
    if record.weights == {moment.target: WHOLE}:
        is_known = state is not None and state.target == moment.target
        return record if is_known else replace(record, rollout=_standing(moment, record))
    if not moment.is_found or (state is not None and state.refuses(moment.target)):
        return record
    if moment.seen.serve is None and moment.spec.rollout is not None:
        return record  # how many replicas the stable has is Serve's to say
    return _with_its_turn(record, _first_state(moment, record), moment)


def moved(moment: Moment) -> ModelRecord:
    """Return the record one step further."""
    record, state = moment.record, moment.record.rollout
    if state is None or state.has_ended or state.phase == "Queued":
        return record
    if state.strategy == ALL_AT_ONCE:
        return _all_at_once(moment, state)
    least = _least_requests(moment, state)
    found = verdict_of(record, state, moment.rules, least, moment.seen, is_undo=moment.is_undo)
    state = replace(
        state,
        gates=found.gates,
        clean_requests=found.clean_requests,
        needed_requests=found.needed_requests,
    )
    if found.failure and (state.stable or state.phase == "Progressing"):
        return aborted(record, state, found.failure, moment.now)
    match state.phase:
        case "Warming":
            return _warming(moment, state)
        case "Shadow":
            return _shadow(moment, state)
        case _:
            return _progressing(moment, state, found)


def aborted(record: ModelRecord, state: RolloutState, message: str, now: float) -> ModelRecord:
    """Give the target up: the stable has everything at once. A model's first revision has none before it and
    goes on serving, as nothing else could."""
    ended = replace(
        state, phase="Aborted", reason=Reason.RolloutAborted, message=message, ended=now, is_paused=False
    )
    if not state.stable:
        return replace(record, rollout=ended)
    return _back_to_stable(record, replace(ended, is_refused=True))


# Its begin ------------------------------------------------------------------------------------------------


def _without_replaced(moment: Moment) -> ModelRecord:
    """End a rollout to something that is not asked for any more. What stands takes everything back."""
    record, state = moment.record, moment.record.rollout
    if state is None or state.has_ended or state.target == moment.target:
        return record
    text = f"Revision {moment.target} is asked for now, in the place of {state.target}."
    ended = replace(
        state, phase="Aborted", reason=Reason.RolloutReplaced, message=text, ended=moment.now, is_paused=False
    )
    return _back_to_stable(record, ended) if state.stable else replace(record, rollout=ended)


def _back_to_stable(record: ModelRecord, ended: RolloutState) -> ModelRecord:
    ended = replace(ended, weight=0, ready_for=0, leaving=[*ended.leaving, ended.target])
    return replace(record, rollout=ended, weights={ended.stable: WHOLE})


def _with_its_turn(record: ModelRecord, state: RolloutState, moment: Moment) -> ModelRecord:
    if state.phase == "Queued" and (moment.position or moment.refusal):
        line = f"Other rollouts of the Pool come first; this one is number {moment.position} in the line."
        text = moment.refusal or line
        state = replace(state, reason=Reason.RolloutQueued, message=text)
    elif state.phase == "Queued":
        state = replace(state, phase="Warming", reason=Reason.RollingOut, message="")
    return replace(record, rollout=state)


def _first_state(moment: Moment, record: ModelRecord) -> RolloutState:
    stable = next((kept.revision for kept in record.serving), "")
    strategy = moment.spec.rollout.strategy if moment.spec.rollout is not None else ALL_AT_ONCE
    steps = _steps(moment, strategy, is_first=not stable)
    past, standing = record.rollout, moment.seen.application(moment.name, stable)
    left = past.leaving if past is not None else []
    return RolloutState(
        id=_new_id(past, moment.now),
        target=moment.target,
        stable=stable,
        strategy=strategy,
        phase="Queued",
        started=moment.now,
        steps=steps,
        ready_for=steps[0].weight,
        size=standing.wanted_replicas if standing is not None else 0,
        leaving=[name for name in left if name in record.revisions and name not in (stable, moment.target)],
        author=asked.author if (asked := record.revisions.get(moment.target)) is not None else "",
    )


def _steps(moment: Moment, strategy: str, *, is_first: bool) -> list[StepView]:
    """An undo is asked for by a person who saw why: it is held nowhere, and has steps only where no more
    replicas may stand at a time. A first revision has nothing beside it, and is held only to see whether it
    keeps its limits."""
    if strategy == ALL_AT_ONCE or (moment.is_undo and not moment.rules.has_surge):
        return [StepView(WHOLE)]
    if moment.is_undo:
        return [StepView(step.weight) for step in moment.rules.all_steps]
    steps = [StepView(step.weight, step.hold_seconds, step.pause) for step in moment.rules.all_steps]
    if is_first:
        return [StepView(WHOLE, steps[-1].hold_seconds if moment.rules.has_limits else 0.0)]
    return steps


def _new_id(past: RolloutState | None, now: float) -> str:
    """Name it after its second. No two of a model are named alike, or they would share their counts."""
    return f"{max(int(now), int(past.id, 16) + 1 if past is not None else 0):x}"


def _standing(moment: Moment, record: ModelRecord) -> RolloutState:
    """What is asked for has all the traffic: as ever, or because a change was taken back."""
    state, past = _first_state(moment, record), record.rollout
    text = f"Revision {moment.target} takes all traffic."
    if past is not None:
        text = f"Revision {moment.target} is asked for again, and has stood all the time."
    return replace(
        state,
        stable="",
        phase="Completed",
        reason=Reason.Settled,
        message=text,
        step=len(state.steps) - 1,
        weight=WHOLE,
        ended=moment.now,
    )


# Its steps ------------------------------------------------------------------------------------------------


def _all_at_once(moment: Moment, state: RolloutState) -> ModelRecord:
    if missing := not_proved(moment) or not_answering(moment) or _held(state):
        return _waiting(moment, state, Reason.RollingOut, missing)
    record = _with_weight(moment, state, 0)
    return _completed(record, moment, "")


def _warming(moment: Moment, state: RolloutState) -> ModelRecord:
    state = first_look(moment.record, state, moment.seen, moment.now)
    if missing := not_proved(moment) or not_answering(moment) or _too_few(moment, state):
        return _waiting(moment, state, Reason.RollingOut, missing)
    if held := _held(state):
        return _waiting(moment, state, Reason.RolloutPaused, held)
    if _is_compared(moment, state) and not is_measured(state, moment.now):
        return _waiting(moment, state, Reason.RollingOut, "The requests of the stable are being counted.")
    state = replace(state, thresholds=baseline(moment.record, state, moment.seen, moment.now))
    if moment.rules.shadow is not None and state.stable and not moment.is_undo:
        state = replace(state, phase="Shadow", step_since=moment.now)
        return _waiting(moment, state, Reason.RollingOut, "Requests run on the new revision as well.")
    return _with_weight(moment, state, 0)


def _shadow(moment: Moment, state: RolloutState) -> ModelRecord:
    state, rules = _since(state, moment.now), moment.rules.shadow
    if held := _held(state):
        return _waiting(moment, state, Reason.RolloutPaused, held)
    if rules is not None and state.skipped != state.step:
        if left := _hold_left(state, rules.hold_seconds, moment.now):
            return _waiting(moment, state, Reason.RollingOut, left)
        count = shadowed(moment.record, state, moment.seen)
        if count < rules.requests:
            text = f"{count} of {rules.requests} shadowed requests ended well: it waits for more."
            return _waiting(moment, state, Reason.WaitingForEvidence, text)
    if missing := not_answering(moment) or _too_few(moment, state):
        return _waiting(moment, state, Reason.RollingOut, missing)
    return _with_weight(moment, state, 0)


def _progressing(moment: Moment, state: RolloutState, found: Verdict) -> ModelRecord:
    """Go on to the next step once this one is over and the replicas for the next are ready."""
    state = _since(state, moment.now)
    if missing := _step_missing(moment, state, found):
        return _waiting(moment, state, *missing)
    if state.step + 1 == len(state.steps):
        by_clock = "" if _least_requests(moment, state) or state.skipped == state.step else _by_clock(state)
        return _completed(replace(moment.record, rollout=state), moment, by_clock)
    state = replace(state, ready_for=state.steps[state.step + 1].weight)
    if missing_replicas := not_answering(moment) or _too_few(moment, state):
        return _waiting(moment, state, Reason.RollingOut, missing_replicas)
    return _with_weight(moment, state, state.step + 1)


def _step_missing(moment: Moment, state: RolloutState, found: Verdict) -> tuple[str, str] | None:
    """Return the reason and the sentence of what keeps the step from its end."""
    step = state.steps[state.step]
    if held := _held(state):
        return Reason.RolloutPaused, held
    if state.skipped == state.step:
        return None
    if left := _hold_left(state, step.hold_seconds, moment.now):
        return Reason.RollingOut, left
    if found.missing:
        return Reason.WaitingForEvidence, found.missing
    if step.pause and state.released < state.step:
        return Reason.RolloutPaused, f"The step of {step.weight} % has a pause: a person ends it with resume."
    return None


def _with_weight(moment: Moment, state: RolloutState, index: int) -> ModelRecord:
    """Begin a step. The target stands first: who was once in its share stays there while it grows."""
    weight = state.steps[index].weight
    shares = {state.target: weight, state.stable: WHOLE - weight}
    text = f"Revision {state.target} takes {weight} % of the requests."
    state = replace(
        state,
        phase="Progressing",
        step=index,
        weight=weight,
        ready_for=weight,
        step_since=moment.now,
        reason=Reason.RollingOut,
        message=text,
        leaving=[*state.leaving, state.stable] if state.strategy == RECREATE else state.leaving,
    )
    return replace(
        moment.record, rollout=state, weights={name: share for name, share in shares.items() if share}
    )


def _completed(record: ModelRecord, moment: Moment, remark: str) -> ModelRecord:
    state = record.rollout
    assert state is not None
    text = f"Revision {state.target} takes all traffic.{remark}"
    ended = replace(state, phase="Completed", reason=Reason.Settled, message=text, ended=moment.now)
    return replace(record, rollout=ended)


def _waiting(moment: Moment, state: RolloutState, reason: str, message: str) -> ModelRecord:
    return replace(moment.record, rollout=replace(state, reason=reason, message=message))


# What a step may wait for ---------------------------------------------------------------------------------


def not_proved(moment: Moment) -> str:
    """Hold until a replica of the target has loaded and proved itself."""
    kept = moment.record.revisions.get(moment.target)
    is_proved = kept is not None and kept.is_proved
    return "" if is_proved else f"Revision {moment.target} has not proved itself yet."


def not_answering(moment: Moment) -> str:
    """Hold while the target's replica, whose proof is in, does not say yet that it takes requests, and those
    of the revisions before it do: the model would not be ready for that moment."""
    name, seen = moment.name, moment.seen
    state = seen.application(name, moment.target)
    is_asleep = state is not None and state.wanted_replicas == 0
    others = [revision for revision in moment.record.weights if revision != moment.target]
    if seen.ready_replicas(name, moment.target) or is_asleep:
        return ""
    is_any_ready = any(seen.ready_replicas(name, revision) for revision in others)
    return f"Revision {moment.target} takes no requests yet." if is_any_ready else ""


def _too_few(moment: Moment, state: RolloutState) -> str:
    """Hold until as many replicas are ready as the coming share needs of those that the stable had."""
    needed = replicas_for(moment.spec, state, state.ready_for)
    ready = moment.seen.ready_replicas(moment.name, state.target)
    if ready >= needed:
        return ""
    return f"{ready} of {needed} replicas are ready for {state.ready_for} % of the requests."


def replicas_for(spec: ModelSpec, state: RolloutState, weight: int) -> int:
    """Return how many replicas of the target the share `weight` needs: one at least."""
    return needed_replicas(min(max(1, state.size), spec.scaling.max_replicas), weight)


def _is_compared(moment: Moment, state: RolloutState) -> bool:
    """Tell whether both revisions will have requests at a time."""
    return bool(state.stable) and state.strategy != RECREATE and not moment.is_undo


def _least_requests(moment: Moment, state: RolloutState) -> int:
    is_asked = not moment.is_undo and (bool(state.stable) or moment.rules.has_limits)
    return moment.rules.least_requests if is_asked else 0


def _held(state: RolloutState) -> str:
    return "It is paused; resume ends that." if state.is_paused else ""


def _hold_left(state: RolloutState, hold_seconds: float, now: float) -> str:
    left = state.step_since + hold_seconds - now
    return f"The step of {state.weight} % is held for {left:.0f} s more." if left > 0 else ""


def _since(state: RolloutState, now: float) -> RolloutState:
    """A clock that was set back does not make a step longer than it has to be."""
    return replace(state, step_since=now) if now < state.step_since else state


def _by_clock(state: RolloutState) -> str:
    if not any(step.hold_seconds for step in state.steps):
        return ""
    ended = f"{state.clean_requests} ended well"
    return f" It went by the clock: no requests were asked for (minRequests: 0), {ended}."


def is_judged(state: RolloutState) -> bool:
    """Tell whether gates look at its revisions."""
    return not state.has_ended and state.strategy != ALL_AT_ONCE


# What follows for revisions -------------------------------------------------------------------------------


def retired(
    record: ModelRecord, target: str, seen: Observation, now: float
) -> tuple[ModelRecord, tuple[tuple[str, str], ...]]:
    """Return the record with the revisions marked that lost their traffic, and without those that have
    drained or never proved themselves; and which went, each with the message for its requests. The stable of
    a rollout stays to its end, and one that was given up stays recorded, so that it is known when it is asked
    for again."""
    gone: dict[str, str] = {}
    revisions, state = dict(record.revisions), record.rollout
    for revision, kept in record.revisions.items():
        is_refused = state is not None and state.refuses(revision)
        is_stable = state is not None and not state.has_ended and state.stable == revision
        if revision in record.weights or is_stable or (revision == target and not is_refused):
            continue
        is_marked = 0.0 < kept.retired_at <= now  # else the clock was set back
        if not is_marked and (kept.is_proved or is_refused):
            revisions[revision] = replace(kept, retired_at=now)
        elif is_refused:
            continue
        elif not kept.is_proved:
            gone[revision] = "A newer revision of the model took its place."
        elif now >= kept.retired_at + SWITCH_SECONDS and seen.unfinished(record.name, [revision]) == 0:
            gone[revision] = "The revision has drained."
    left = {revision: kept for revision, kept in revisions.items() if revision not in gone}
    return replace(record, revisions=left), tuple(gone.items())


def must_line_up(record: ModelRecord) -> bool:
    """Tell whether its rollout waits for its turn: one that needs room beside what serves."""
    state = record.rollout
    if state is None or state.phase != "Queued" or not state.stable:
        return False
    return state.strategy not in (ALL_AT_ONCE, RECREATE)


def may_stand(
    record: ModelRecord, revision: str, seen: Observation, now: float, abort_seconds: float
) -> bool:
    """Tell whether the rollout lets a recorded revision have replicas now."""
    state, kept = record.rollout, record.revisions[revision]
    if state is None:
        return True
    if state.refuses(revision):
        is_over = bool(kept.retired_at) and now >= kept.retired_at + abort_seconds
        return state.strategy != RECREATE and not is_over and kept.is_proved
    if state.phase == "Queued":
        return revision != state.target
    if state.strategy != RECREATE:
        return True
    if revision != (state.stable if state.phase == "Aborted" else state.target):
        return False
    return not seen.of_model(record.name) or seen.application(record.name, revision) is not None


def moves(record: ModelRecord, seen: Observation) -> list[tuple[str, str, bool]]:
    """Return which queues are to be emptied into which: from, to, whether what has begun may go on there.
    Gateways may send one more request until they follow, so this is said as long as there is any."""
    state, lead = record.rollout, next(iter(record.serving), None)
    if state is None or lead is None:
        return []
    return [
        (revision, lead.revision, _answers_alike(record.revisions[revision], lead))
        for revision in dict.fromkeys(state.leaving)
        if revision in record.revisions
        and revision not in record.weights
        and seen.unfinished(record.name, [revision]) != 0
    ]


def _answers_alike(one: RevisionRecord, other: RevisionRecord) -> bool:
    """Tell whether an answer begun on one may go on on the other: both have the same weights and tokenizer,
    or none at all."""
    is_same_content = bool(one.digest) and one.digest == other.digest
    return is_same_content or not (one.checkpoint or other.checkpoint)
