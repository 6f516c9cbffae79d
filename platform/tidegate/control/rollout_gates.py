"""The gates of a rollout: what judges its target at one moment. Pure.

Hard gates need no statistics, the others are `evidence`'s. All of them judge from the first request, or the
first failure, to the end, whoever or whatever the rollout waits for meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from tidegate.control.desired import WHOLE, ModelRecord
from tidegate.control.evidence import Limits, More, Thresholds, freeze, hard_gates, judge
from tidegate.control.observed import Observation
from tidegate.control.rollout_schema import RolloutLimits, RolloutSpec
from tidegate.control.rollout_state import RolloutState
from tidegate.messages.outcomes import Outcomes, Tally
from tidegate.messages.rollouts import GateView

NO_OUTCOMES: Mapping[str, Tally] = {}
MEASURED_SECONDS = 3.0
SELF_CHECK, PROBE = "SelfCheckFailed", "ProbeFailed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`failure` says which gates failed, with their numbers; empty: none did. `missing` says which evidence
    a step still waits for."""

    gates: list[GateView]
    failure: str
    missing: str
    clean_requests: int = 0
    needed_requests: int = 0


def verdict_of(
    record: ModelRecord,
    state: RolloutState,
    spec: RolloutSpec,
    least: int,
    seen: Observation,
    *,
    is_undo: bool = False,
) -> Verdict:
    """Judge the target by all gates; `least` is how many requests must have ended well. What an undo leaves
    is no measure of where it goes: only `limits` and the hard gates judge that."""
    target = seen.outcomes.get((record.name, state.target), NO_OUTCOMES)
    is_compared = bool(state.stable) and not is_undo
    stable = seen.outcomes.get((record.name, state.stable), NO_OUTCOMES) if is_compared else None
    hard = _hard(record, state, target, seen)
    # Once the stable has no requests there is nothing to wait for beside it.
    more: More = "alone" if state.weight == WHOLE else "beside"
    found = judge(
        stable,
        target,
        state.id,
        state.thresholds,
        _limits(spec.limits),
        least_requests=least,
        excess=spec.margin,
        more=more if least and spec.min_requests is None else "",
        slowdown=spec.allowed_slowdown,
    )
    failed = " ".join(gate.message for gate in hard if gate.state == "fails")
    return Verdict(
        [*hard, *found.gates],
        failed or (found.message if found.verdict == "fails" else ""),
        found.message if found.verdict == "waits" else "",
        found.clean,
        found.needed_clean,
    )


def first_look(record: ModelRecord, state: RolloutState, seen: Observation, now: float) -> RolloutState:
    """Remember how many requests the stable had ended when its rate begins to be measured."""
    if 0.0 < state.looked_at <= now or (record.name, state.stable) not in seen.outcomes:
        return state
    return replace(state, looked_at=now, looked_ended=_before_rollouts(record, state, seen).finished)


def baseline(record: ModelRecord, state: RolloutState, seen: Observation, now: float) -> Thresholds:
    """Return the stable's latencies as they were outside of rollouts, and its requests a second since the
    first look."""
    tally, seconds = _before_rollouts(record, state, seen), now - state.looked_at
    ended = max(0, tally.finished - state.looked_ended)
    return freeze(tally, ended / seconds if is_measured(state, now) else 0.0)


def is_measured(state: RolloutState, now: float) -> bool:
    """Tell whether the stable's rate is known: its requests have been counted for a while."""
    return bool(state.looked_at) and now - state.looked_at >= MEASURED_SECONDS


def _before_rollouts(record: ModelRecord, state: RolloutState, seen: Observation) -> Tally:
    return seen.outcomes.get((record.name, state.stable), NO_OUTCOMES).get("", Tally())


def shadowed(record: ModelRecord, state: RolloutState, seen: Observation) -> int:
    """Count the shadowed requests that the target has ended well."""
    return sum(
        count
        for revision in (state.stable, state.target)
        for cohort, tally in seen.outcomes.get((record.name, revision), NO_OUTCOMES).items()
        if cohort.rpartition(".")[0] == state.id
        for ends, count in tally.pairs.items()
        if ends.endswith("0")
    )


def _hard(record: ModelRecord, state: RolloutState, target: Outcomes, seen: Observation) -> list[GateView]:
    failed, text = _failed_start(record, state, seen)
    lost = sum(
        tally.ends.get("lost", 0) for cohort, tally in target.items() if cohort.rpartition(".")[0] == state.id
    )
    said = f"{failed}: {text}" if failed else ""
    return hard_gates(
        load_error=said if failed not in (SELF_CHECK, PROBE) else "",
        failed_check=said if failed == SELF_CHECK else "",
        failed_probe=said if failed == PROBE else "",
        lost_replicas=lost,
    )


def _failed_start(record: ModelRecord, state: RolloutState, seen: Observation) -> tuple[str, str]:
    """Return the reason and the sentence of a start of the target that failed; empty: none did. The report of
    a replica that served and then ended has its figures; that one counts among those lost."""
    kept, report = record.revisions.get(state.target), seen.reports.get((record.name, state.target))
    if kept is not None and kept.failures:
        return kept.reason, kept.message
    is_newer = report is not None and kept is not None and kept.is_proved and report.at >= state.started
    if report is None or not is_newer or report.proved or report.slots:
        return "", ""
    return report.reason, report.message


def _limits(limits: RolloutLimits) -> Limits:
    return Limits(limits.error_rate, limits.first_token_seconds, limits.between_tokens_seconds)
