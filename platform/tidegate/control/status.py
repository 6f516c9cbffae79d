"""What is told about one model: its entry in the registry, with conditions. Pure."""

from __future__ import annotations

from tidegate.control.conditions import condition, last_lines, settle
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.control.observed import ApplicationState, Observation, SourceState
from tidegate.control.reasons import (
    CONFIG_VALID,
    DEGRADED,
    PROGRESSING,
    READY,
    REASONS,
    SCHEDULED,
    WEIGHTS_AVAILABLE,
)
from tidegate.control.resources import Model
from tidegate.control.serve_config import application_name
from tidegate.messages import Condition, ModelEntry, QueueLimits, RevisionReport

SERVE_DECISION_SECONDS = 1.0  # until Serve has seen a waiting request and asked Ray for a replica


def entry_of(
    model: Model,
    record: ModelRecord,
    target: str,
    source: SourceState | None,
    misfit: tuple[str, str] | None,
    waiting: str | None,
    seen: Observation,
    now: float,
) -> ModelEntry:
    """The registry's entry. `waiting` says why the target is not in Serve though it should be."""
    spec = model.spec
    shown = record.revisions.get(record.serving) or record.revisions.get(target)
    proof = shown.proof if shown is not None else None
    replicas = [
        stats
        for stats in seen.replicas
        if stats.model == model.name
        and shown is not None
        and stats.revision == shown.revision
        and not stats.draining
    ]
    state = _application(model.name, shown.revision if shown else "", seen)
    weights = _weights(source, uses_weights=spec.source is not None)
    scheduled = _scheduled(source, misfit, uses_weights=spec.source is not None)
    progressing = _progressing(record, target, weights, scheduled, waiting, seen)
    degraded = _degraded(model.name, record, target, seen)
    may_sleep = spec.scaling.min_replicas == 0 and (state is None or state.wanted_replicas == 0)
    ready = _ready(record, len(replicas), weights, scheduled, progressing, degraded, may_sleep=may_sleep)
    past = seen.entries.get(model.name)
    conditions = settle(
        [ready, condition(CONFIG_VALID, "True", "Valid"), weights, scheduled, progressing, degraded],
        past.conditions if past is not None else [],
        now,
    )
    # A revision on its first way up takes requests already: they wait for it in its queue.
    accepts = shown is not None and (bool(record.serving) or progressing.status == "True")
    return ModelEntry(
        name=model.name,
        created=record.created,
        task=spec.task,
        engine=spec.engine.name,
        precision=_precision(spec.precision, proof, source),
        quantization=_quantization(spec.quantization, source),
        revisions={shown.revision: 100} if shown is not None and accepts else {},
        accepts=accepts,
        ready=ready.status == "True",
        reason=ready.reason,
        message=ready.message,
        context_length=proof.context_length if proof else spec.context_length,
        limits=QueueLimits(spec.queue.max_requests, spec.queue.max_bytes, spec.queue.max_wait_seconds),
        replicas_ready=len(replicas),
        replicas_wanted=state.wanted_replicas if state is not None else 0,
        weights_bytes=proof.weights_bytes
        if proof and proof.weights_bytes
        else (source.weights_bytes if source else 0),
        wake_seconds=wake_seconds(proof) if proof else 0.0,
        slots=proof.slots if proof else 0,
        conditions=conditions,
    )


def _precision(wanted: str, proof: RevisionReport | None, source: SourceState | None) -> str:
    """As loaded, else as on disk, else as wanted; empty while nobody knows."""
    if proof is not None and proof.precision:
        return proof.precision
    if source is not None and source.precision:
        return source.precision
    return "" if wanted == "auto" else wanted


def _quantization(wanted: str, source: SourceState | None) -> str:
    if wanted != "auto":
        return wanted
    return source.quantization if source is not None and source.quantization else "none"


def _weights(source: SourceState | None, *, uses_weights: bool) -> Condition:
    if not uses_weights:
        return condition(WEIGHTS_AVAILABLE, "True", "NotNeeded")
    if source is None or source.state == "resolving":
        return condition(WEIGHTS_AVAILABLE, "Unknown", "Resolving", source.message if source else "")
    if source.state == "failed":
        reason = source.reason if source.reason in REASONS else "SourceUnavailable"
        return condition(WEIGHTS_AVAILABLE, "False", reason, source.message)
    return condition(WEIGHTS_AVAILABLE, "True", "Resolved", f"The checkpoint is in {source.checkpoint}.")


def _scheduled(
    source: SourceState | None, misfit: tuple[str, str] | None, *, uses_weights: bool
) -> Condition:
    if misfit is not None:
        return condition(SCHEDULED, "False", *misfit)
    if uses_weights and (source is None or source.state != "resolved"):
        return condition(SCHEDULED, "Unknown", "NotChecked")
    return condition(SCHEDULED, "True", "Placed")


def _progressing(
    record: ModelRecord,
    target: str,
    weights: Condition,
    scheduled: Condition,
    waiting: str | None,
    seen: Observation,
) -> Condition:
    kept = record.revisions.get(target)
    if weights.status == "Unknown":
        return condition(PROGRESSING, "True", "Resolving", weights.message)
    if weights.status == "False" and kept is None:
        return condition(PROGRESSING, "False", "WaitingToRetry", f"Tried again by itself. {weights.message}")
    if kept is None:
        return condition(PROGRESSING, "False", "Settled", scheduled.message)
    if not kept.is_proved and kept.retry_at and not kept.attempt_at:
        return condition(
            PROGRESSING, "False", "WaitingToRetry", f"Try {kept.failures} failed: {kept.message}"
        )
    if waiting is not None:
        return condition(PROGRESSING, "True", waiting)
    state = _application(record.name, target, seen)
    if not kept.is_proved:
        if state is None or not state.replicas:
            return condition(PROGRESSING, "True", "Building")
        return condition(PROGRESSING, "True", "Loading")
    if state is None or not state.is_built:
        return condition(PROGRESSING, "True", "Building")
    if len(record.revisions) > 1:
        return condition(PROGRESSING, "True", "Draining")
    return condition(PROGRESSING, "False", "Settled")


def _degraded(model: str, record: ModelRecord, target: str, seen: Observation) -> Condition:
    kept = record.revisions.get(target)
    if kept is not None and kept.failures and not kept.is_proved:
        return condition(DEGRADED, "True", "RevisionFailed", f"{kept.reason}: {kept.message}")
    if seen.serve_problem is not None:
        return condition(DEGRADED, "True", *seen.serve_problem)
    serving = record.revisions.get(record.serving)
    if serving is not None:
        report = seen.reports.get((model, serving.revision))
        if report is not None and not report.proved:
            return condition(DEGRADED, "True", "ReplicaFailed", f"{report.reason}: {report.message}")
        state = _application(model, serving.revision, seen)
        if state is not None and state.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            reason = "Unhealthy" if state.status == "UNHEALTHY" else "DeployFailed"
            return condition(DEGRADED, "True", reason, last_lines(state.deployment_message or state.message))
        if serving.failures:
            return condition(DEGRADED, "True", serving.reason, serving.message)
        notes = (serving.proof or _NO_REPORT).notes
        return condition(DEGRADED, "False", "Healthy", " ".join(notes))
    return condition(DEGRADED, "False", "Healthy")


def _ready(
    record: ModelRecord,
    replicas: int,
    weights: Condition,
    scheduled: Condition,
    progressing: Condition,
    degraded: Condition,
    *,
    may_sleep: bool,
) -> Condition:
    serving = record.revisions.get(record.serving)
    if serving is None:
        return condition(READY, "False", *_why_unproven(weights, scheduled, progressing, degraded))
    if replicas:
        return condition(READY, "True", "Serving")
    if degraded.status == "True":
        return condition(READY, "False", degraded.reason, degraded.message)
    if may_sleep:
        return condition(READY, "True", "Asleep")
    return condition(READY, "False", "Waking", _waking(serving))


def _why_unproven(
    weights: Condition, scheduled: Condition, progressing: Condition, degraded: Condition
) -> tuple[str, str]:
    for blocker in (weights, scheduled):
        if blocker.status == "False":
            return blocker.reason, blocker.message
    if degraded.status == "True":
        return degraded.reason, degraded.message
    if progressing.status == "True":
        return progressing.reason, progressing.message
    return "Unproven", REASONS["Unproven"]


def _waking(serving: RevisionRecord) -> str:
    known = wake_seconds(serving.proof) if serving.proof is not None else 0.0
    return f"A replica is starting (that took {known:.0f} s the last time)." if known else ""


def wake_seconds(proof: RevisionReport) -> float:
    """How long a sleeping revision takes to serve: Serve's decision, the process, the load."""
    return SERVE_DECISION_SECONDS + proof.process_seconds + proof.load_seconds


def _application(model: str, revision: str, seen: Observation) -> ApplicationState | None:
    if seen.serve is None or not revision:
        return None
    return seen.serve.applications.get(application_name(model, revision))


_NO_REPORT = RevisionReport(model="", revision="", at=0.0, proved=False)
