"""The revisions that need a place in a cluster, in their order, and what each asks of its place now. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace as dataclass_replace

from msgspec.structs import replace

from tidegate.control.desired import ModelRecord, RevisionRecord, fitting, recorded_spec, revision_of
from tidegate.control.observed import Group, Observation, RevisionKey, SourceState
from tidegate.control.packing import Need, Packing, place
from tidegate.control.resources import Model, ModelSpec
from tidegate.control.room import Seat, seat_of
from tidegate.control.serve_config import ordered
from tidegate.control.surge import Bounds, least_of
from tidegate.control.turns import Claim
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ReplicaStats
from tidegate.replica_args import SLOTS_UNTIL_KNOWN

# So long without a request, one that has worked counts as idle: callers that ask one after the other should
# not find it gone each time.
REST_SECONDS = 5.0
UNTOLD_SECONDS = 4.0  # since its start: a first request is in the beats by then


def pack(
    models: Sequence[Model],
    records: Mapping[str, ModelRecord],
    targets: Mapping[str, str],
    seen: Observation,
    now: float,
    deleting: Mapping[str, float],
    left_out: Collection[RevisionKey] = (),
) -> Packing | None:
    """Seat every revision that stands or may, but those `left_out`; None on one machine, which has no
    groups."""
    if not seen.groups:
        return None
    needs: list[tuple[tuple[bool, int], Need]] = []
    for model in models:
        record, target = records[model.name], targets[model.name]
        source = source_of(model, record, target, seen)
        least = least_of(model.spec, record)
        for revision, kept in record.revisions.items():
            if (model.name, revision) in left_out:
                continue
            if not kept.is_proved and (revision != target or now < kept.retry_at):
                continue
            found = source if revision == target and is_found(model, source) else kept.source
            spec = _with_least(recorded_spec(kept, model.spec), least.get(revision))
            needs.append(_need(record, revision, spec, found, kept.group, seen))
        if (model.name, target) in left_out:
            continue
        if target not in record.revisions and model.name not in deleting and is_found(model, source):
            needs.append(_need(record, target, model.spec, source, "", seen))
    needs.sort(key=lambda item: item[0])
    return place([need for _, need in needs], seen.groups)


def source_of(model: Model, record: ModelRecord, target: str, seen: Observation) -> SourceState | None:
    """Return what is known of the target's source: what is recorded, else the answer to who asked for it."""
    if model.spec.source is None:
        return None
    known = record.revisions.get(target)
    if known is not None and known.checkpoint:
        return known.source
    return fitting(model.spec, seen.sources.get((model.name, revision_of(model.spec))))


def is_found(model: Model, source: SourceState | None) -> bool:
    return model.spec.source is None or (source is not None and source.state == "resolved")


def seated(
    record: ModelRecord, packing: Packing | None, left_out: Collection[RevisionKey] = ()
) -> ModelRecord:
    """Return the record with the places that its revisions have now; one that was left out keeps its own."""
    if packing is None:
        return record
    places = packing.placements
    revisions = {
        revision: kept
        if (record.name, revision) in left_out
        else replace(kept, placement=places.get((record.name, revision)))
        for revision, kept in record.revisions.items()
    }
    return replace(record, revisions=revisions)


def _with_least(spec: ModelSpec, least: int | None) -> ModelSpec:
    """One that may sleep stays one that may."""
    if least is None or not spec.scaling.min_replicas:
        return spec
    return bounded(spec, Bounds(least, spec.scaling.max_replicas))


def bounded(spec: ModelSpec, bounds: Bounds | None) -> ModelSpec:
    """Return the spec with the replicas that a rollout lets its revision have."""
    if bounds is None:
        return spec
    changes = {"min_replicas": bounds.least, "max_replicas": bounds.most}
    return spec.model_copy(update={"scaling": spec.scaling.model_copy(update=changes)})


def places(seen: Observation) -> Sequence[Group]:
    """Return the groups of workers as large as they can be now; on one machine the machine is the only one,
    without a name."""
    if not seen.groups:
        return (Group("", gpus_per_worker=math.floor(seen.capacity.gpus), cpus=seen.capacity.cpus),)
    running = Counter(worker.group for worker in seen.workers if worker.address)
    return [
        dataclass_replace(group, max_workers=min(group.max_workers, running[group.name]))
        if group.name in seen.short_groups
        else group
        for group in seen.groups
    ]


def claim(
    record: ModelRecord,
    kept: RevisionRecord,
    spec: ModelSpec,
    seen: Observation,
    now: float,
    *,
    is_deleting: bool,
) -> Claim:
    """Return what a revision that should stand asks of its group."""
    key, scaling = (record.name, kept.revision), spec.scaling
    state, depth = seen.application(*key), seen.depths.get(key)
    load = depth.waiting + depth.running if depth is not None else 0
    least_ordered, may_start = ordered(state.config) if state is not None else (0, False)
    replicas = state.replicas if state is not None else ()
    staying = [replica for replica in replicas if replica.state != "STOPPING"]
    wanted = state.wanted_replicas if state is not None else 0
    present = max(len(staying), wanted, least_ordered)
    must_prove = not kept.is_proved and not is_deleting
    most = scaling.max_replicas
    due = min(most, max(scaling.min_replicas, 1 if must_prove or load else 0))
    may_leave = not due and depth is not None and kept.is_proved
    return Claim(
        key=key,
        group=kept.group,
        seat=seat_at(spec, kept),
        staying=[replica.node for replica in staying if replica.node],
        ending=[replica.node for replica in replicas if replica.state == "STOPPING" and replica.node],
        present=present,
        least=scaling.min_replicas,
        due=due,
        wanted=min(most, max(due, suited(kept, spec, seen.depths.get(key)))),
        most=most,
        created=record.created,
        waits_since=kept.waits_since,
        is_entitled=may_start,
        is_proof=must_prove and not load,
        tried_at=kept.attempt_at,
        idle_since=_idle_since(seen.beating(*key), now) if may_leave else None,
    )


def suited(kept: RevisionRecord, spec: ModelSpec, depth: Depth | None) -> int:
    """Return how many replicas suit the requests that a revision has now."""
    load = depth.waiting + depth.running if depth is not None else 0
    slots = kept.proof.slots if kept.proof is not None else 0
    return math.ceil(load / (spec.scaling.target_in_flight or slots or SLOTS_UNTIL_KNOWN))


def seat_at(spec: ModelSpec, kept: RevisionRecord) -> Seat:
    """Return what one replica takes where it is placed."""
    if kept.placement is None:
        return seat_of(spec.resources.gpus, spec.resources.cpus, 0)
    return seat_of(kept.placement.gpus, spec.resources.cpus, kept.placement.memory_bytes)


def _idle_since(replicas: Sequence[ReplicaStats], now: float) -> float | None:
    """Return since when none of these has had a request; None where one works, or has just worked, or may
    have since its last beat. One that is still loading need not rest."""
    if not replicas:
        return now
    if any(stats.running for stats in replicas):
        return None
    since = max(stats.idle_since or stats.started for stats in replicas)
    has_worked = any(stats.tokens_total for stats in replicas)
    return since if now - since >= (REST_SECONDS if has_worked else UNTOLD_SECONDS) else None


def _need(
    record: ModelRecord,
    revision: str,
    spec: ModelSpec,
    source: SourceState | None,
    pinned: str,
    seen: Observation,
) -> tuple[tuple[bool, int], Need]:
    """Return what a revision asks for, behind its rank: those with traffic first, then by age."""
    order = (revision not in record.weights, record.created)
    copies = spec.scaling.min_replicas
    state = seen.application(record.name, revision)
    is_asleep = not copies and (state is None or not state.replicas)
    return order, Need((record.name, revision), spec, source, copies, pinned, is_asleep)
