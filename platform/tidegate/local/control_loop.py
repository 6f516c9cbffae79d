"""Gather, decide, act: the one writer of the Serve config and of the models in the registry.

One task runs `run`; nothing else calls `look`. A look gathers one observation, makes one plan (pure) and
applies it step by step, each awaited before the next, so two PUTs can never overlap. News (a changed file, a
source that was looked at, Ray back) set `news`; without any the loop looks again soon while something
progresses, and rarely when all is settled, which is what repairs drift.

Order of the steps within a look: records first (a crash after it repeats a step and never forgets one), the
entries that gateways read, then Serve. So a model that goes is refused by gateways before its replicas
drain, and traffic has moved before an old revision is taken away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from tidegate.control.desired import ModelRecord, revision_of
from tidegate.control.observed import (
    Capacity,
    Observation,
    QueueDepth,
    RevisionKey,
    ServeState,
    SourceState,
)
from tidegate.control.plan import Plan, make_plan
from tidegate.control.serve_config import ReplicaRuntime
from tidegate.errors import QueueUnavailable
from tidegate.local.record_file import RecordFile
from tidegate.local.source_checks import SourceChecks
from tidegate.local.watch import ResourceFiles
from tidegate.messages.registry import ModelEntry, ReplicaStats, RevisionReport
from tidegate.serve_api import ServeApi, ServeRejected, ServeUnavailable
from tidegate.serve_writer import ServeWriter

log = logging.getLogger(__name__)

PROGRESSING_SECONDS = 0.5
SETTLED_SECONDS = 3.0
LONGEST_PAUSE_SECONDS = 15.0  # after failures in a row


class Store(Protocol):
    """What the control loop asks of the registry (`tidegate.store.registry.Registry`)."""

    async def read_models(self) -> dict[str, ModelEntry]: ...

    async def put_model(self, entry: ModelEntry) -> None: ...

    async def delete_model(self, name: str, message: str = "") -> None: ...

    async def drop_revision(self, model: str, revision: str, message: str) -> None: ...

    async def reports(self) -> dict[RevisionKey, RevisionReport]: ...

    async def replicas(self) -> list[ReplicaStats]: ...


class DepthSource(Protocol):
    async def __call__(self, queues: list[RevisionKey]) -> Mapping[RevisionKey, QueueDepth]: ...


class ControlLoop:
    def __init__(
        self,
        files: ResourceFiles,
        store: Store,
        depths: DepthSource,
        sources: SourceChecks,
        memory: RecordFile,
        runtime: ReplicaRuntime,
        capacity: Capacity,
        news: asyncio.Event,
        *,
        wave: int,
        told: Callable[[Mapping[str, ModelEntry]], None],
    ) -> None:
        """`told` is called with all entries after each look that changed one."""
        self._files = files
        self._store = store
        self._depths = depths
        self._sources = sources
        self._memory = memory
        self._runtime = runtime
        self._capacity = capacity
        self._news = news
        self._wave = wave
        self._told = told
        self._records: dict[str, ModelRecord] = memory.read()
        self._api: ServeApi | None = None
        self._serve_problem: tuple[str, str] | None = None
        self._writer = ServeWriter()
        self._rejected: Mapping[str, str] = {}

    def use(self, api: ServeApi | None) -> None:
        """Which Serve to write to; None while Ray is away."""
        self._api = api
        self._news.set()

    async def run(self) -> None:
        """Look for ever."""
        failures = 0
        while True:
            self._news.clear()
            pause = SETTLED_SECONDS
            try:
                plan = await self.look()
                failures = 0
                pause = _pause(plan)
            except QueueUnavailable as error:
                failures += 1
                log.warning("control: Redis does not answer: %s", error.message)
            except Exception:
                # The loop must outlive whatever one look meets; it is told and tried again.
                failures += 1
                log.exception("control: a look failed")
            if failures:
                pause = min(LONGEST_PAUSE_SECONDS, PROGRESSING_SECONDS * 2.0**failures)
            try:
                async with asyncio.timeout(pause):
                    await self._news.wait()
            except TimeoutError:
                continue  # nothing new; look for what has moved by itself

    async def look(self) -> Plan:
        """One observation, one plan, applied. Raises `QueueUnavailable`."""
        seen = await self._gather()
        plan = make_plan(
            self._files.resources.models,
            self._files.pool,
            self._records,
            seen,
            time.time(),
            self._wave,
        )
        self._records = dict(plan.records)
        self._memory.write(self._records)
        uris = self._uris()
        for key in plan.resolve:
            self._sources.begin(uris[key])
        await self._publish(plan, seen)
        if seen.serve is not None:
            await self._apply(plan, seen.serve)
        return plan

    async def _gather(self) -> Observation:
        serve: ServeState | None = None
        if self._api is not None:
            try:
                serve = await self._api.get()
            except ServeUnavailable as error:
                log.warning("control: %s", error.message)
        queues = [(name, revision) for name, record in self._records.items() for revision in record.revisions]
        return Observation(
            serve=serve,
            serve_problem=self._serve_problem,
            sources=self._found_sources(),
            reports=await self._store.reports(),
            replicas=tuple(await self._store.replicas()),
            depths=await self._depths(queues),
            entries=await self._store.read_models(),
            capacity=self._capacity,
            rejected=self._rejected,
        )

    def _uris(self) -> dict[RevisionKey, str]:
        """Where the checkpoints of the models' newest revisions lie."""
        return {
            (model.name, revision_of(model.spec)): model.spec.source.uri
            for model in self._files.resources.models
            if model.spec.source is not None
        }

    def _found_sources(self) -> dict[RevisionKey, SourceState]:
        """Each source is looked at once, however many models name it."""
        states = self._sources.states()
        return {key: states[uri] for key, uri in self._uris().items() if uri in states}

    async def _publish(self, plan: Plan, seen: Observation) -> None:
        for name in plan.delete:
            log.info("model %s is removed", name)
            await self._store.delete_model(name)
        for (model, revision), message in plan.drop:
            log.info("revision %s of model %s goes: %s", revision, model, message)
            await self._store.drop_revision(model, revision, message)
        changed = False
        for name, entry in plan.entries.items():
            past = seen.entries.get(name)
            if entry != past:
                changed = True
                await self._store.put_model(entry)
                if past is None or (past.ready, past.reason) != (entry.ready, entry.reason):
                    log.info("model %s: ready %s, %s: %s", name, entry.ready, entry.reason, entry.message)
        if changed or plan.delete:
            self._told(plan.entries)

    async def _apply(self, plan: Plan, serve: ServeState) -> None:
        assert self._api is not None
        try:
            self._rejected = await self._writer.write(self._api, plan.applications, self._runtime, serve)
            self._serve_problem = None
        except (ServeRejected, ServeUnavailable) as error:
            log.error("control: %s", error.message)
            self._serve_problem = (error.reason, error.message)
        if self._writer.has_written:
            self._news_soon(plan)

    def _news_soon(self, plan: Plan) -> None:
        """After a PUT there is something to see, also where the plan was settled before it."""
        if plan.is_settled:
            self._news.set()


def _pause(plan: Plan) -> float:
    if not plan.is_settled:
        return PROGRESSING_SECONDS
    if plan.next_look_at is not None:
        return min(SETTLED_SECONDS, max(PROGRESSING_SECONDS, plan.next_look_at - time.time()))
    return SETTLED_SECONDS
