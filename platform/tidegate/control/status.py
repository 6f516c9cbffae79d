"""What is told about one model: its entry in the registry, with conditions. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.control.conditions import condition, last_lines, settle
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.control.observed import ApplicationState, Observation, PodProblem, SourceState
from tidegate.control.packing import Placement
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
from tidegate.control.serve_words import why_given_up
from tidegate.control.sizing import gib
from tidegate.messages.queue import QueueLimits
from tidegate.messages.registry import Condition, ModelEntry, RevisionReport

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
    *,
    is_deleting: bool = False,
) -> ModelEntry:
    """The registry's entry. `misfit` says why the target, or one of its replicas, finds no place; `waiting`
    why the target is not in Serve though it should be."""
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
    problem = _pod_problem(record, target, spec.scaling.min_replicas, seen)
    weights = _weights(source, uses_weights=spec.source is not None)
    scheduled = _scheduled(source, misfit, problem, record.revisions.get(target), spec.source is not None)
    if is_deleting:
        progressing = condition(PROGRESSING, "True", "Draining", _left(record, seen))
    else:
        progressing = _progressing(record, target, weights, misfit, waiting, seen)
    degraded = _degraded(model.name, record, target, problem, seen)
    may_sleep = spec.scaling.min_replicas == 0 and (state is None or state.wanted_replicas == 0)
    # A revision whose group is gone from the pool has served, but can no longer.
    is_placed = not seen.groups or shown is None or shown.placement is not None
    if is_deleting:
        ready = condition(READY, "False", "Deleting")
    elif not is_placed and scheduled.status == "False":
        ready = condition(READY, "False", scheduled.reason, scheduled.message)
    else:
        ready = _ready(record, len(replicas), weights, scheduled, progressing, degraded, may_sleep=may_sleep)
    past = seen.entries.get(model.name)
    conditions = settle(
        [ready, condition(CONFIG_VALID, "True", "Valid"), weights, scheduled, progressing, degraded],
        past.conditions if past is not None else [],
        now,
    )
    # A revision on its first way up takes requests already: they wait for it in its queue.
    may_accept = bool(record.serving) or progressing.status == "True"
    accepts = shown is not None and is_placed and may_accept and not is_deleting
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


def outage(past: Sequence[Condition], reason: str, message: str, now: float) -> list[Condition]:
    """A model's conditions while no plan can be made at all, as without Redis: what was known stays, but
    it is neither ready nor sound."""
    stale = {item.type: item for item in past}
    stale[READY] = condition(READY, "False", reason, message)
    stale[DEGRADED] = condition(DEGRADED, "True", reason, message)
    return settle(stale.values(), past, now)


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
    source: SourceState | None,
    misfit: tuple[str, str] | None,
    problem: PodProblem | None,
    kept: RevisionRecord | None,
    uses_weights: bool,
) -> Condition:
    if misfit is not None:
        return condition(SCHEDULED, "False", *misfit)
    if uses_weights and (source is None or source.state != "resolved"):
        return condition(SCHEDULED, "Unknown", "NotChecked")
    if problem is not None and problem.reason == "Unschedulable":
        return condition(SCHEDULED, "False", problem.reason, problem.message)
    place = kept.placement if kept is not None else None
    return condition(SCHEDULED, "True", "Placed", _place(place) if place is not None else "")


def _place(placement: Placement) -> str:
    cap = f", {gib(placement.memory_cap_bytes)} of memory" if placement.memory_cap_bytes else ""
    share = f"{placement.gpus:g} GPU{cap}" if placement.gpus else f"no share of a GPU{cap}"
    return f"Each replica runs in group {placement.group} with {share}."


def _pod_problem(record: ModelRecord, target: str, min_replicas: int, seen: Observation) -> PodProblem | None:
    """The first problem of a pod that keeps this model from a replica it should have."""
    for revision in (target, record.serving):
        kept = record.revisions.get(revision)
        if kept is None or kept.placement is None or not _lacks_replica(record, kept, min_replicas, seen):
            continue
        for problem in seen.pod_problems:
            if problem.group in ("", kept.placement.group):
                return problem
    return None


def _lacks_replica(record: ModelRecord, kept: RevisionRecord, min_replicas: int, seen: Observation) -> bool:
    state = _application(record.name, kept.revision, seen)
    wanted = state.wanted_replicas if state is not None else min_replicas
    if not kept.is_proved:
        wanted = max(1, wanted)
    ready = sum(
        stats.model == record.name and stats.revision == kept.revision and not stats.draining
        for stats in seen.replicas
    )
    return ready < wanted


def _progressing(
    record: ModelRecord,
    target: str,
    weights: Condition,
    misfit: tuple[str, str] | None,
    waiting: str | None,
    seen: Observation,
) -> Condition:
    kept = record.revisions.get(target)
    if weights.status == "Unknown":
        return condition(PROGRESSING, "True", "Resolving", weights.message)
    if weights.status == "False" and kept is None:
        return condition(PROGRESSING, "False", "WaitingToRetry", f"Tried again by itself. {weights.message}")
    if kept is None or (misfit is not None and seen.groups and kept.placement is None):
        return condition(PROGRESSING, "False", "Settled", misfit[1] if misfit is not None else "")
    if not kept.is_proved and kept.retry_at and not kept.attempt_at:
        return condition(
            PROGRESSING, "False", "WaitingToRetry", f"Try {kept.failures} failed: {kept.message}"
        )
    if waiting is not None:
        return condition(PROGRESSING, "True", waiting)
    if seen.serve is None and seen.groups:
        return condition(PROGRESSING, "True", "ClusterStarting")
    state = _application(record.name, target, seen)
    if not kept.is_proved:
        # Ray's own words where a replica waits for room or a process for long.
        slow = last_lines(state.deployment_message) if state and state.deployment_message else ""
        if state is None or not state.replicas:
            return condition(PROGRESSING, "True", "Building", slow)
        return condition(PROGRESSING, "True", "Loading", slow)
    if state is None or not state.is_built:
        return condition(PROGRESSING, "True", "Building")
    if len(record.revisions) > 1:
        return condition(PROGRESSING, "True", "Draining")
    return condition(PROGRESSING, "False", "Settled")


def _left(record: ModelRecord, seen: Observation) -> str:
    depths = [seen.depths.get((record.name, revision)) for revision in record.revisions]
    known = [depth for depth in depths if depth is not None]
    if len(known) < len(depths):
        return ""
    return f"{sum(depth.waiting + depth.running for depth in known)} requests are left."


def _degraded(
    model: str, record: ModelRecord, target: str, problem: PodProblem | None, seen: Observation
) -> Condition:
    kept = record.revisions.get(target)
    if kept is not None and kept.failures and not kept.is_proved:
        return condition(DEGRADED, "True", "RevisionFailed", f"{kept.reason}: {kept.message}")
    if seen.serve_problem is not None:
        return condition(DEGRADED, "True", *seen.serve_problem)
    if problem is not None:
        return condition(DEGRADED, "True", problem.reason, problem.message)
    refused = seen.rejected.get(application_name(model, target))
    if refused is not None:
        return condition(DEGRADED, "True", "ServeRejected", refused)
    serving = record.revisions.get(record.serving)
    if serving is not None:
        report = seen.reports.get((model, serving.revision))
        if report is not None and not report.proved:
            return condition(DEGRADED, "True", "ReplicaFailed", f"{report.reason}: {report.message}")
        state = _application(model, serving.revision, seen)
        if state is not None and state.status == "DEPLOY_FAILED":
            group = serving.placement.group if serving.placement is not None else ""
            return condition(DEGRADED, "True", *why_given_up(state, group, seen.workers))
        if state is not None and state.status == "UNHEALTHY":
            told = last_lines(state.deployment_message or state.message)
            return condition(DEGRADED, "True", "Unhealthy", told)
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
