"""The revisions that need a place in a cluster, in their order, and the places that they have. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from tidegate.control.desired import ModelRecord, recorded_spec, revision_of
from tidegate.control.observed import Observation, SourceState
from tidegate.control.packing import Need, Packing, place
from tidegate.control.resources import Model, ModelSpec


def pack(
    models: Sequence[Model],
    records: Mapping[str, ModelRecord],
    seen: Observation,
    now: float,
    deleting: Mapping[str, float],
) -> Packing | None:
    """Seat every revision that stands or may; None on one machine, which has no groups."""
    if not seen.groups:
        return None
    needs: list[tuple[tuple[bool, int], Need]] = []
    for model in models:
        record = records.get(model.name) or ModelRecord(name=model.name, created=int(now))
        target = revision_of(model.spec)
        source = source_of(model, record, target, seen)
        for revision, kept in record.revisions.items():
            if not kept.is_proved and (revision != target or now < kept.retry_at):
                continue
            found = source if revision == target and is_found(model, source) else kept.source
            needs.append(_need(record, revision, recorded_spec(kept, model.spec), found, kept.group))
        if target not in record.revisions and model.name not in deleting and is_found(model, source):
            needs.append(_need(record, target, model.spec, source, ""))
    needs.sort(key=lambda item: item[0])
    return place([need for _, need in needs], seen.groups)


def source_of(model: Model, record: ModelRecord, target: str, seen: Observation) -> SourceState | None:
    """Return what is known of the target's source: the last answer, or the recorded one. In a cluster one Job
    resolves each revision, and once its answer is recorded its end says nothing: its pods may go before it
    does, and it then has no answer any more."""
    if model.spec.source is None:
        return None
    found = seen.sources.get((model.name, target))
    known = record.revisions.get(target)
    if known is None or not known.checkpoint:
        return found
    is_old = found is None or (bool(seen.groups) and found.state != "resolved")
    return known.source if is_old else found


def is_found(model: Model, source: SourceState | None) -> bool:
    return model.spec.source is None or (source is not None and source.state == "resolved")


def seated(record: ModelRecord, packing: Packing | None) -> ModelRecord:
    """Return the record with the places that its revisions have now."""
    if packing is None:
        return record
    places = packing.placements
    revisions = {
        revision: replace(kept, placement=places.get((record.name, revision)))
        for revision, kept in record.revisions.items()
    }
    return replace(record, revisions=revisions)


def _need(
    record: ModelRecord, revision: str, spec: ModelSpec, source: SourceState | None, pinned: str
) -> tuple[tuple[bool, int], Need]:
    """Return what a revision asks for, behind its rank: those with traffic first, then by age."""
    order = (revision not in record.weights, record.created)
    copies = max(1, spec.scaling.min_replicas)
    return order, Need((record.name, revision), spec, source, copies, pinned)
