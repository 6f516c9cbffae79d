"""Every host of the control loop does this alike in a round: read the registry and the queues, publish.

A round is gather, decide, apply. `control.plan` decides, `serve_writer` writes Serve's config; only what
holds resources and records differs from host to host.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from tidegate.control.observed import Observation, RevisionKey, ServeState
from tidegate.control.plan import RegistryChanges
from tidegate.control.rollout_state import Note
from tidegate.messages.administration import AuditEntry
from tidegate.messages.outcomes import Outcomes
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ModelEntry, Parked, ReplicaStats, RevisionReport

log = logging.getLogger(__name__)

DEPTHS_SECONDS = 2.0
PLATFORM = "tidegate"  # who decided, in the audit log


class OutcomeCounts(Protocol):
    """A host asks this of the counts of ends (`store.outcomes.OutcomeStore`). Raises `QueueUnavailable`."""

    async def read(self, queues: Sequence[RevisionKey]) -> Mapping[RevisionKey, Outcomes]: ...

    async def forget(self, queues: Sequence[RevisionKey], rollout: str) -> None: ...


class Registry(Protocol):
    """A host asks this of the registry (`store.registry.Registry`). All raise `QueueUnavailable`."""

    @property
    def outcomes(self) -> OutcomeCounts: ...

    async def reports(self, wanted: Collection[RevisionKey]) -> dict[RevisionKey, RevisionReport]: ...

    async def parked(self, wanted: Collection[RevisionKey]) -> dict[RevisionKey, Parked]: ...

    async def replicas(self) -> list[ReplicaStats]: ...

    async def read_models(self, wanted: Collection[str] | None = None) -> dict[str, ModelEntry]: ...

    async def put_model(self, entry: ModelEntry) -> None: ...

    async def delete_model(self, name: str) -> None: ...

    async def drop_revision(self, model: str, revision: str, message: str) -> None: ...

    async def move_revision(
        self, model: str, from_revision: str, to_revision: str, may_continue: bool
    ) -> int: ...


class Depths(Protocol):
    """A host asks this of the queues (`store.depths.QueueDepths`). Raises `QueueUnavailable`."""

    async def poll(
        self, queues: Sequence[RevisionKey], *, timeout_seconds: float
    ) -> Mapping[RevisionKey, Depth]: ...


class Serve(Protocol):
    """A host asks this of one Ray cluster's Serve (`serve_api.ServeApi`)."""

    async def get(self) -> ServeState: ...

    async def put(self, config: Mapping[str, object]) -> None: ...

    async def close(self) -> None: ...


async def observe_store(
    registry: Registry,
    depths: Depths,
    queues: Sequence[RevisionKey],
    models: Collection[str] | None,
    compared: Sequence[RevisionKey] = (),
) -> Observation:
    """Return what the registry and the queues say of these queues and of `models` (None: of all), and how the
    requests of the `compared` ended. What is not in Redis is the caller's to fill in. Raises
    `QueueUnavailable`."""
    reports, parked, replicas, entries, found, outcomes = await asyncio.gather(
        registry.reports(queues),
        registry.parked(queues),
        registry.replicas(),
        registry.read_models(models),
        depths.poll(queues, timeout_seconds=DEPTHS_SECONDS),
        registry.outcomes.read(compared),
    )
    ours = tuple(stats for stats in replicas if models is None or stats.model in models)
    return Observation(
        None,
        reports=reports,
        parked=parked,
        replicas=ours,
        depths=found,
        entries=entries,
        outcomes=outcomes,
    )


async def publish(registry: Registry, changes: RegistryChanges, published: Mapping[str, ModelEntry]) -> None:
    """Make the registry what gateways should read; `published` is what they read now. Raises
    `QueueUnavailable`; all of it may be repeated."""
    for name in changes.delete:
        log.info("model %s is removed", name)
        await registry.delete_model(name)
    for (model, revision), message in changes.drop:
        log.info("revision %s of model %s goes: %s", revision, model, message)
        await registry.drop_revision(model, revision, message)
    for entry in changes.put:
        await registry.put_model(entry)
        past = published.get(entry.name)
        if past is None or (past.ready, past.reason) != (entry.ready, entry.reason):
            log.info("model %s: ready %s, %s: %s", entry.name, entry.ready, entry.reason, entry.message)
    for (model, source), (_, goal), may_continue in changes.move:
        await registry.move_revision(model, source, goal, may_continue)
    for queues, rollout in changes.forget_outcomes:
        await registry.outcomes.forget(queues, rollout)


class Audit(Protocol):
    """A host asks this of its audit log (`local.audit_file`, `store.audit`)."""

    async def append(self, entry: AuditEntry) -> None: ...


async def tell(notes: Iterable[Note], audit: Audit, now: float) -> None:
    """Tell the log and the audit log what was decided about rollouts."""
    for note in notes:
        log.log(
            logging.WARNING if note.is_trouble else logging.INFO,
            "rollout of %s: %s: %s",
            note.model,
            note.reason,
            note.message,
        )
        entry = AuditEntry(now, PLATFORM, note.reason, note.model, after={"message": note.message})
        try:
            await audit.append(entry)
        except Exception:  # nothing that was decided waits for it
            log.exception("the audit log could not be written")
