"""The decision of the control loop: specs, records and one observation in, everything to do out. Pure.

For each model: look at its source, decide on a revision, let it prove itself while the old one serves, move
the traffic, let the old one drain, take it away. A revision that fails before it has ever proved itself
leaves Serve at once and is tried again later, ever more rarely; the old one stays.

In a cluster each revision also needs a place in a group of workers (`seating`); one that finds none is told
so and never reaches Serve. A model that is being deleted takes no new requests, finishes those it has within
a limit, and is then named in `Plan.drained`.

The host applies a plan and looks again; nothing is remembered but what `Plan.records` holds, so a host that
starts anew goes on where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from msgspec.structs import replace

from tidegate.control.desired import ModelRecord, RevisionRecord, recorded_spec, revision_of, spec_on_wire
from tidegate.control.observed import Observation, RevisionKey, SourceState
from tidegate.control.packing import Packing
from tidegate.control.resources import Model, PoolSpec
from tidegate.control.seating import is_found, pack, seated, source_of
from tidegate.control.serve_config import Application, application_name
from tidegate.control.serve_words import why_given_up
from tidegate.control.sizing import misfit
from tidegate.control.status import entry_of
from tidegate.messages.registry import ModelEntry

FIRST_RETRY_SECONDS = 60.0
LONGEST_RETRY_SECONDS = 3600.0
FIRST_REBUILD_SECONDS = 5.0  # before an application that has served is put back into Serve
# Gateways follow the registry within a second; an old revision may get requests until then.
SWITCH_SECONDS = 3.0
DRAIN_LIMIT_SECONDS = 300.0  # how long the requests of a deleted model may take to end

NOBODY: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Plan:
    """`applications` is the whole set that Serve should hold now. `resolve` names revisions whose source is
    to be looked at, `drop` revisions whose queue and report go, `delete` models to forget. `next_look_at` is
    when time alone changes something (unix seconds; None: only news do); `is_settled` False: look again soon.
    `drained` names models being deleted of which nothing is left once this plan is applied."""

    applications: tuple[Application, ...]
    entries: Mapping[str, ModelEntry]
    records: Mapping[str, ModelRecord]
    resolve: tuple[RevisionKey, ...]
    drop: tuple[tuple[RevisionKey, str], ...]
    delete: tuple[str, ...]
    is_settled: bool
    next_look_at: float | None
    drained: tuple[str, ...] = ()


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
    deleting: Mapping[str, float] = NOBODY,
    drain_limit_seconds: float = DRAIN_LIMIT_SECONDS,
) -> Plan:
    """Decide. `models` in reading order: the first gets its replica first. `wave` lowers the pool's bound
    on unbuilt applications, as on a small machine. `deleting` says since when (unix seconds) models are
    being deleted, which stand in `models` as long as they drain."""
    packing = pack(models, records, seen, now, deleting)
    steps = {
        model.name: _step(model, records.get(model.name), seen, packing, now)
        if model.name not in deleting
        else _drain(model, records.get(model.name), seen, packing, now)
        for model in models
    }
    drained = [
        name
        for name, since in deleting.items()
        if name in steps and _is_drained(steps[name].record, seen, now - since, drain_limit_seconds)
    ]
    left = [model for model in models if model.name not in drained]
    specs = {model.name: model.spec for model in left}
    admitted, waiting = _admit(
        {name: steps[name] for name in specs}, pool, seen, min(pool.max_unbuilt, wave or pool.max_unbuilt)
    )
    new_records: dict[str, ModelRecord] = {}
    applications: list[Application] = []
    for name in specs:
        step = steps[name]
        record = step.record
        for revision in step.live:
            if (name, revision) not in admitted:
                continue
            kept = record.revisions[revision]
            if not kept.attempt_at:
                kept = replace(kept, attempt_at=now)
                record = _with(record, kept)
            spec = recorded_spec(kept, specs[name])
            is_new = not kept.is_proved and name not in deleting
            applications.append(
                Application(
                    name, revision, spec, kept.checkpoint, keep_awake=is_new, placement=kept.placement
                )
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
            is_deleting=model.name in deleting,
        )
        for model in left
    }
    gone = [name for name in [*records, *seen.entries] if name not in new_records]
    resolve = [
        (model.name, steps[model.name].target)
        for model in left
        if model.spec.source is not None
        and model.name not in deleting
        and _needs_look(steps[model.name], seen)
    ]
    return Plan(
        applications=tuple(applications),
        entries=entries,
        records=new_records,
        resolve=tuple(resolve),
        drop=tuple(((name, rev), why) for name in specs for rev, why in steps[name].dropped),
        delete=tuple(dict.fromkeys(gone)),
        is_settled=all(_is_settled(entry) for entry in entries.values()) and seen.serve is not None,
        next_look_at=_next_look(new_records, deleting, drain_limit_seconds, now),
        drained=tuple(drained),
    )


def _step(
    model: Model, record: ModelRecord | None, seen: Observation, packing: Packing | None, now: float
) -> _Step:
    record = record or ModelRecord(name=model.name, created=int(now))
    target = revision_of(model.spec)
    known = record.revisions.get(target)
    source = source_of(model, record, target, seen)
    if packing is None:
        too_big = misfit(model.spec, source, seen.capacity)
    else:
        too_big = packing.refusals.get((model.name, target))
    # In a cluster also what finds no place is recorded: its source need not be looked at again.
    if is_found(model, source) and (too_big is None or packing is not None):
        found = source or SourceState("resolved")
        # Scaling and queue change in place: what runs while a later spec is refused is the last valid one.
        spec = spec_on_wire(model.spec)
        record = _with(
            record,
            replace(
                known or RevisionRecord(revision=target, spec=spec),
                spec=spec,
                checkpoint=found.checkpoint,
                weights_bytes=found.weights_bytes,
                quantization=found.quantization,
                precision=found.precision,
                shape=found.shape,
                weights=found.weights,
                retired_at=0.0,
            ),
        )
    record, failed = _judge(record, seen, now)
    if target in record.revisions and record.revisions[target].is_proved and record.serving != target:
        record = replace(record, serving=target)
    record, drained = _retire(record, target, seen, now)
    record = seated(record, packing)
    live = [
        revision
        for revision, kept in record.revisions.items()
        if (kept.is_proved or revision == target)
        and now >= kept.retry_at
        and (packing is None or kept.placement is not None)
    ]
    live.sort(key=lambda revision: (revision != record.serving, revision != target))
    return _Step(record, tuple(live), source, target, too_big, (*failed, *drained))


def _drain(
    model: Model, record: ModelRecord | None, seen: Observation, packing: Packing | None, now: float
) -> _Step:
    """A model being deleted keeps what stands, or has served, until its requests have ended."""
    record = record or ModelRecord(name=model.name, created=int(now))
    record = seated(record, packing)
    standing = seen.serve.applications if seen.serve is not None else {}
    live = [
        revision
        for revision, kept in record.revisions.items()
        if (kept.is_proved or application_name(model.name, revision) in standing)
        and (packing is None or kept.placement is not None)
    ]
    live.sort(key=lambda revision: revision != record.serving)
    target = record.serving or revision_of(model.spec)
    return _Step(record, tuple(live), source_of(model, record, target, seen), target, None)


def _is_drained(record: ModelRecord, seen: Observation, age_seconds: float, limit_seconds: float) -> bool:
    """Whether nothing is left to wait for, or the limit is over."""
    if not record.revisions or age_seconds >= limit_seconds:
        return True
    depths = [seen.depths.get((record.name, revision)) for revision in record.revisions]
    is_empty = all(depth is not None and depth.waiting + depth.running == 0 for depth in depths)
    return age_seconds >= SWITCH_SECONDS and is_empty


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
    reason, message = why_given_up(state, _group(kept), seen.workers)
    stuck = replace(kept, failures=kept.failures + 1, retry_at=now + pause, reason=reason, message=message)
    return _with(record, stuck)


def _failure(model: str, kept: RevisionRecord, seen: Observation) -> tuple[str, str] | None:
    report = seen.reports.get((model, kept.revision))
    if report is not None and not report.proved and report.at >= kept.attempt_at:
        return report.reason or "LoadFailed", report.message or "The engine gave no reason."
    name = application_name(model, kept.revision)
    if name in seen.rejected:
        return "ServeRejected", seen.rejected[name]
    if seen.serve is None:
        return None
    state = seen.serve.applications.get(name)
    if state is not None and state.status == "DEPLOY_FAILED":
        return why_given_up(state, _group(kept), seen.workers)
    return None


def _group(kept: RevisionRecord) -> str:
    return kept.placement.group if kept.placement is not None else ""


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


def _needs_look(step: _Step, seen: Observation) -> bool:
    key = (step.record.name, step.target)
    return key not in seen.sources and step.target not in step.record.revisions


def _next_look(
    records: Mapping[str, ModelRecord], deleting: Mapping[str, float], limit_seconds: float, now: float
) -> float | None:
    times = [kept.retry_at for record in records.values() for kept in record.revisions.values()]
    for name, since in deleting.items():
        if name in records:
            times += [since + SWITCH_SECONDS, since + limit_seconds]
    return min((at for at in times if at > now), default=None)


def _is_settled(entry: ModelEntry) -> bool:
    progressing = next((item for item in entry.conditions if item.type == "Progressing"), None)
    return progressing is None or progressing.status == "False"


def _with(record: ModelRecord, kept: RevisionRecord) -> ModelRecord:
    return replace(record, revisions={**record.revisions, kept.revision: kept})
