"""The whole decision about one pool: one snapshot in, everything to do out, in its order. Pure.

`make_plan` decides about models. Here that becomes what a host does: how the registry changes, what Serve
should hold, and when the next round is due.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from tidegate.control.conditions import condition, overlaid
from tidegate.control.desired import ModelRecord, revision_of
from tidegate.control.observed import Observation, RevisionKey
from tidegate.control.packing import Refusal
from tidegate.control.plan import make_plan
from tidegate.control.reasons import CONFIG_VALID
from tidegate.control.resources import Model, PoolSpec
from tidegate.control.serve_config import Application
from tidegate.messages.registry import ModelEntry

PROGRESSING_SECONDS = 0.5
SETTLED_SECONDS = 3.0  # drift is found at the latest after it


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """All that one decision takes. `records` are the decision before. `deleting` says since when (unix
    seconds) models are being deleted. `refused` says why the spec of a model that runs on as it last was is
    refused. `wave` lowers the pool's bound on unbuilt applications."""

    models: Sequence[Model]
    pool: PoolSpec
    records: Mapping[str, ModelRecord]
    seen: Observation
    deleting: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    wave: int | None = None


@dataclass(frozen=True, slots=True)
class RegistryChanges:
    """Gateways should read this other than they do, in this order: models to forget, revisions whose queue
    and report go (with the sentence for whom it concerns), entries to put."""

    delete: tuple[str, ...] = ()
    drop: tuple[tuple[RevisionKey, str], ...] = ()
    put: tuple[ModelEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Everything to do, in this order. Records come first: a crash after them repeats a step and forgets
    none. Then what gateways read, so that traffic has moved, and a model that goes is refused, before
    `applications` (the whole set that Serve should hold) takes replicas away.

    `entries` is all that the registry should hold of these models. `resolve` names revisions whose source is
    to be resolved, `drained` models being deleted of which nothing is left.
    """

    records: Mapping[str, ModelRecord]
    entries: Mapping[str, ModelEntry]
    registry: RegistryChanges
    resolve: tuple[RevisionKey, ...]
    applications: tuple[Application, ...]
    drained: tuple[str, ...]
    pause_seconds: float


def plan_pool(snapshot: PoolSnapshot, now: float) -> PoolPlan:
    seen = snapshot.seen
    plan = make_plan(
        snapshot.models,
        snapshot.pool,
        snapshot.records,
        seen,
        now,
        snapshot.wave,
        deleting=snapshot.deleting,
    )
    entries = {
        name: _with_refusal(entry, snapshot.refused[name], seen.entries.get(name), now)
        if name in snapshot.refused
        else entry
        for name, entry in plan.entries.items()
    }
    put = tuple(entry for name, entry in entries.items() if entry != seen.entries.get(name))
    return PoolPlan(
        records=plan.records,
        entries=entries,
        registry=RegistryChanges(plan.delete, plan.drop, put),
        resolve=plan.resolve,
        applications=plan.applications,
        drained=plan.drained,
        pause_seconds=pause_seconds([plan.next_look_at], now) if plan.is_settled else PROGRESSING_SECONDS,
    )


def pause_seconds(times: Iterable[float | None], now: float) -> float:
    """Return how long a settled pool can wait for its next round: until the first of `times` (unix seconds),
    at which time alone may change something."""
    soonest = min((at - now for at in times if at is not None), default=SETTLED_SECONDS)
    return min(SETTLED_SECONDS, max(PROGRESSING_SECONDS, soonest))


def queues_of(models: Iterable[Model], records: Mapping[str, ModelRecord]) -> list[RevisionKey]:
    """Return the revisions whose depths and reports a decision may need: the recorded and the newest."""
    recorded = [(name, revision) for name, record in records.items() for revision in record.revisions]
    return list(dict.fromkeys([*recorded, *((model.name, revision_of(model.spec)) for model in models)]))


def _with_refusal(entry: ModelEntry, why: Refusal, past: ModelEntry | None, now: float) -> ModelEntry:
    refused = condition(CONFIG_VALID, "False", *why)
    before = past.conditions if past is not None else []
    return replace(entry, conditions=overlaid(entry.conditions, [refused], before, now))
