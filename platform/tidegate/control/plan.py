"""The decision of the control loop: specs, records and one observation in, everything to do out. Pure.

For each model: look at its source, decide on a revision, let it prove itself while the old one serves, move
the traffic, let the old one drain, take it away. A revision that fails before it has ever proved itself
leaves Serve at once and is tried again later, ever more rarely; the old one stays.

The host applies a plan and looks again; nothing is remembered but what `Plan.records` holds, so a host that
starts anew goes on where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from tidegate.control.conditions import last_lines
from tidegate.control.desired import ModelRecord, RevisionRecord, recorded_spec, revision_of, spec_on_wire
from tidegate.control.observed import Observation, RevisionKey, SourceState
from tidegate.control.resources import Model, PoolSpec
from tidegate.control.serve_config import Application, application_name
from tidegate.control.sizing import misfit
from tidegate.control.status import entry_of
from tidegate.messages import ModelEntry

FIRST_RETRY_SECONDS = 60.0
LONGEST_RETRY_SECONDS = 3600.0
FIRST_REBUILD_SECONDS = 5.0  # before an application that has served is put back into Serve
# Gateways follow the registry within a second; an old revision may get requests until then.
SWITCH_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """`applications` is the whole set that Serve should hold now. `resolve` names sources to look at,
    `drop` revisions whose queue and report go, `delete` models to forget. `next_look_at` is when time
    alone changes something (unix seconds; None: only news do); `is_settled` False: look again soon."""

    applications: tuple[Application, ...]
    entries: Mapping[str, ModelEntry]
    records: Mapping[str, ModelRecord]
    resolve: tuple[str, ...]
    drop: tuple[tuple[RevisionKey, str], ...]
    delete: tuple[str, ...]
    is_settled: bool
    next_look_at: float | None


@dataclass(frozen=True, slots=True)
class _Step:
    """One model's part. `live` are its revisions that should stand, the serving one first."""

    record: ModelRecord
    live: tuple[str, ...]
    source: SourceState | None
    target: str
    misfit: tuple[str, str] | None
    dropped: tuple[tuple[str, str], ...] = ()


def make_plan(
    models: Sequence[Model],
    pool: PoolSpec,
    records: Mapping[str, ModelRecord],
    seen: Observation,
    now: float,
    wave: int | None = None,
) -> Plan:
    """Decide. `models` in reading order: the first gets its replica first. `wave` lowers the pool's bound
    on unbuilt applications, as on a small machine."""
    steps = {model.name: _step(model, records.get(model.name), seen, now) for model in models}
    specs = {model.name: model.spec for model in models}
    admitted, waiting = _admit(steps, pool, seen, min(pool.max_unbuilt, wave or pool.max_unbuilt))
    new_records: dict[str, ModelRecord] = {}
    applications: list[Application] = []
    for name, step in steps.items():
        record = step.record
        for revision in step.live:
            if (name, revision) not in admitted:
                continue
            kept = record.revisions[revision]
            if not kept.attempt_at:
                kept = replace(kept, attempt_at=now)
                record = replace(record, revisions={**record.revisions, revision: kept})
            spec = recorded_spec(kept, specs[name])
            applications.append(
                Application(name, revision, spec, kept.checkpoint, keep_awake=not kept.is_proved)
            )
        new_records[name] = record
    entries = {
        model.name: entry_of(
            model,
            new_records[model.name],
            steps[model.name].target,
            steps[model.name].source,
            steps[model.name].misfit,
            waiting.get((model.name, steps[model.name].target)),
            seen,
            now,
        )
        for model in models
    }
    gone = [name for name in [*records, *seen.entries] if name not in steps]
    resolve = [
        model.spec.source.uri
        for model in models
        if model.spec.source is not None and _needs_look(steps[model.name], model.spec.source.uri, seen)
    ]
    return Plan(
        applications=tuple(applications),
        entries=entries,
        records=new_records,
        resolve=tuple(dict.fromkeys(resolve)),
        drop=tuple(((name, rev), why) for name, step in steps.items() for rev, why in step.dropped),
        delete=tuple(dict.fromkeys(gone)),
        is_settled=all(_is_settled(entry) for entry in entries.values()) and seen.serve is not None,
        next_look_at=_next_look(new_records, now),
    )


def _step(model: Model, record: ModelRecord | None, seen: Observation, now: float) -> _Step:
    record = record or ModelRecord(name=model.name, created=int(now))
    target = revision_of(model.spec)
    uri = model.spec.source.uri if model.spec.source is not None else ""
    known = record.revisions.get(target)
    source = seen.sources.get(uri) if uri else None
    if source is None and known is not None and known.checkpoint:
        source = SourceState(
            "resolved", known.checkpoint, known.weights_bytes, known.quantization, known.precision
        )
    too_big = misfit(model.spec, source, seen.capacity)
    is_found = not uri or (source is not None and source.state == "resolved")
    if is_found and too_big is None:
        found = source or SourceState("resolved")
        fresh = RevisionRecord(revision=target, spec=spec_on_wire(model.spec))
        record = _with(
            record,
            replace(
                known or fresh,
                checkpoint=found.checkpoint,
                weights_bytes=found.weights_bytes,
                quantization=found.quantization,
                precision=found.precision,
                retired_at=0.0,
            ),
        )
    record, failed = _judge(record, seen, now)
    if target in record.revisions and record.revisions[target].is_proved and record.serving != target:
        record = replace(record, serving=target)
    record, drained = _retire(record, target, seen, now)
    live = [
        revision
        for revision, kept in record.revisions.items()
        if (kept.is_proved or revision == target) and now >= kept.retry_at
    ]
    live.sort(key=lambda revision: (revision != record.serving, revision != target))
    return _Step(record, tuple(live), source, target, too_big, (*failed, *drained))


def _judge(
    record: ModelRecord, seen: Observation, now: float
) -> tuple[ModelRecord, tuple[tuple[str, str], ...]]:
    """Take in proofs and failures of revisions that are being tried. The failed ones' requests go."""
    dropped: list[tuple[str, str]] = []
    for revision, kept in record.revisions.items():
        report = seen.reports.get((record.name, revision))
        if report is not None and report.proved and kept.proof != report:
            kept = replace(kept, proof=report, failures=0, retry_at=0.0, reason="")
            record = _with(record, kept)
        if kept.is_proved:
            record = _free_stuck(record, kept, seen, now)
            continue
        if not kept.attempt_at:
            continue
        failure = _failure(record.name, kept, seen)
        if failure is None:
            continue
        reason, message = failure
        pause = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0**kept.failures)
        record = _with(
            record,
            replace(
                kept,
                attempt_at=0.0,
                failures=kept.failures + 1,
                retry_at=now + pause,
                reason=reason,
                message=message,
            ),
        )
        dropped.append((revision, f"The model {record.name!r} could not be started: {message}"))
    return record, tuple(dropped)


def _free_stuck(record: ModelRecord, kept: RevisionRecord, seen: Observation, now: float) -> ModelRecord:
    """Serve gives an application up for good after a few failed starts, also one that has served. Leaving it
    out for a while and adding it again is the only way back; its queue stays meanwhile."""
    name = application_name(record.name, kept.revision)
    state = seen.serve.applications.get(name) if seen.serve is not None else None
    if state is None or state.status != "DEPLOY_FAILED" or now < kept.retry_at:
        return record
    pause = min(LONGEST_RETRY_SECONDS, FIRST_REBUILD_SECONDS * 2.0**kept.failures)
    message = last_lines(state.deployment_message or state.message)
    stuck = replace(
        kept, failures=kept.failures + 1, retry_at=now + pause, reason="DeployFailed", message=message
    )
    return _with(record, stuck)


def _failure(model: str, kept: RevisionRecord, seen: Observation) -> tuple[str, str] | None:
    report = seen.reports.get((model, kept.revision))
    if report is not None and not report.proved and report.at >= kept.attempt_at:
        return report.reason or "LoadFailed", report.message or "The engine gave no reason."
    if seen.serve is None:
        return None
    state = seen.serve.applications.get(application_name(model, kept.revision))
    if state is not None and state.status == "DEPLOY_FAILED":
        return "DeployFailed", last_lines(state.deployment_message or state.message)
    return None


def _retire(
    record: ModelRecord, target: str, seen: Observation, now: float
) -> tuple[ModelRecord, tuple[tuple[str, str], ...]]:
    """Mark revisions that lost the traffic and take away those that have drained or were never proved."""
    gone: list[tuple[str, str]] = []
    for revision, kept in list(record.revisions.items()):
        if revision in (target, record.serving):
            continue
        if not kept.is_proved:
            gone.append((revision, "A newer revision of the model took its place."))
        elif not kept.retired_at:
            record = _with(record, replace(kept, retired_at=now))
        elif now >= kept.retired_at + SWITCH_SECONDS:
            depth = seen.depths.get((record.name, revision))
            if depth is not None and depth.waiting == 0 and depth.running == 0:
                gone.append((revision, "The revision has drained."))
    left = {rev: kept for rev, kept in record.revisions.items() if rev not in dict(gone)}
    return replace(record, revisions=left), tuple(gone)


def _admit(
    steps: Mapping[str, _Step], pool: PoolSpec, seen: Observation, max_unbuilt: int
) -> tuple[set[RevisionKey], dict[RevisionKey, str]]:
    """Which live revisions may stand in Serve now, and why others wait (`Queued`, `PoolFull`).

    What stands already stays. The serving revisions come before new ones, each in reading order.
    """
    standing = seen.serve.applications if seen.serve is not None else {}
    wanted = [(name, revision) for name, step in steps.items() for revision in step.live]
    admitted = {key for key in wanted if application_name(*key) in standing}
    unbuilt = sum(not standing[application_name(*key)].is_built for key in admitted)
    waiting: dict[RevisionKey, str] = {}
    new = [key for key in wanted if key not in admitted]
    for key in sorted(new, key=lambda key: steps[key[0]].record.serving != key[1]):
        if len(admitted) >= pool.max_live_revisions:
            waiting[key] = "PoolFull"
        elif unbuilt >= max_unbuilt:
            waiting[key] = "Queued"
        else:
            admitted.add(key)
            unbuilt += 1
    return admitted, waiting


def _needs_look(step: _Step, uri: str, seen: Observation) -> bool:
    return uri not in seen.sources and step.target not in step.record.revisions


def _next_look(records: Mapping[str, ModelRecord], now: float) -> float | None:
    times = [kept.retry_at for record in records.values() for kept in record.revisions.values()]
    return min((at for at in times if at > now), default=None)


def _is_settled(entry: ModelEntry) -> bool:
    progressing = next((item for item in entry.conditions if item.type == "Progressing"), None)
    return progressing is None or progressing.status == "False"


def _with(record: ModelRecord, kept: RevisionRecord) -> ModelRecord:
    return replace(record, revisions={**record.revisions, kept.revision: kept})
