"""A model's entry in the registry, with its conditions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidegate.control.condition_checks import Facts, conditions, wake_seconds
from tidegate.control.conditions import condition, settle
from tidegate.control.desired import WHOLE
from tidegate.control.reasons import DEGRADED, PROGRESSING, READY
from tidegate.control.rollout_view import label_of
from tidegate.control.sizing import asked_task
from tidegate.messages.queue import QueueLimits
from tidegate.messages.registry import Condition, ModelEntry


def entry_of(facts: Facts, now: float) -> ModelEntry:
    """Return the registry's entry. Replicas are summed over the revisions that are shown; what is said of one
    replica is said of the revision with the largest share."""
    record, spec, source = facts.record, facts.model.spec, facts.source
    past = facts.seen.entries.get(facts.model.name)
    settled = settle(conditions(facts), past.conditions if past is not None else [], now)
    by_type = {item.type: item for item in settled}
    ready = by_type[READY]
    # A revision on its first way up takes requests already: they wait for it in its queue.
    may_accept = bool(facts.serving) or by_type[PROGRESSING].status == "True"
    accepts = bool(facts.placed) and may_accept and not (facts.is_deleting or facts.is_drained)
    proof = facts.proof
    on_disk = source.weights_bytes if source is not None else 0
    return ModelEntry(
        name=facts.model.name,
        created=record.created,
        task=asked_task(spec, source),
        engine=spec.engine.name,
        precision=_precision(facts),
        quantization=_quantization(facts),
        revisions=_traffic(facts) if accepts else {},
        accepts=accepts,
        ready=ready.status == "True",
        reason=ready.reason,
        message=ready.message,
        context_length=proof.context_length if proof else spec.context_length,
        limits=QueueLimits(spec.queue.max_requests, spec.queue.max_bytes, spec.queue.max_wait_seconds),
        replicas_ready=facts.replicas_ready,
        replicas_wanted=facts.replicas_wanted,
        weights_bytes=(proof.weights_bytes if proof else 0) or on_disk,
        wake_seconds=wake_seconds(proof) if proof else 0.0,
        slots=proof.slots if proof else 0,
        conditions=settled,
        parks=[revision for revision, why_not in facts.parks.items() if not why_not],
        cohort=label_of(record.rollout),
        **_shadow(facts),
    )


def _traffic(facts: Facts) -> dict[str, int]:
    """Return the shares of those that have a place, the target's first."""
    placed = sorted(facts.placed, key=lambda kept: kept.revision != facts.target)
    return {kept.revision: facts.record.weights.get(kept.revision, WHOLE) for kept in placed}


def _shadow(facts: Facts) -> dict[str, Any]:
    state, rules = facts.record.rollout, facts.model.spec.rollout
    if state is None or state.phase != "Shadow" or rules is None or rules.shadow is None:
        return {}
    return {"shadow": state.target, "shadow_share": rules.shadow.share}


def outage(past: Sequence[Condition], reason: str, message: str, now: float) -> list[Condition]:
    """Return a model's conditions while no plan can be made at all, as without Redis: what was known stays,
    but it is neither ready nor sound."""
    stale = {item.type: item for item in past}
    stale[READY] = condition(READY, "False", reason, message)
    stale[DEGRADED] = condition(DEGRADED, "True", reason, message)
    return settle(stale.values(), past, now)


def _precision(facts: Facts) -> str:
    """As loaded, else as on disk, else as wanted; empty while nobody knows."""
    if facts.proof is not None and facts.proof.precision:
        return facts.proof.precision
    if facts.source is not None and facts.source.precision:
        return facts.source.precision
    wanted = facts.model.spec.precision
    return "" if wanted == "auto" else wanted


def _quantization(facts: Facts) -> str:
    wanted = facts.model.spec.quantization
    if wanted != "auto":
        return wanted
    return facts.source.quantization if facts.source is not None and facts.source.quantization else "none"
