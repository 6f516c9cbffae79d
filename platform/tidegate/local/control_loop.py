"""Gather, decide, apply: the one writer of the Serve config and of the models in the registry.

One task runs `run`; nothing else calls `round`. A round gathers one snapshot, makes one plan (pure) and
applies it step by step, each awaited before the next, so two PUTs can never overlap. A change (of a file, of
a source, Ray is back) sets `changed`; without any the next round comes soon while something progresses, and
rarely when all is settled, which is what repairs drift.

Order of the steps within a round: records first (a crash after it repeats a step and never forgets one), the
entries that gateways read, then Serve. So a model that goes is refused by gateways before its replicas
drain, and traffic has moved before an old revision is taken away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from tidegate.control.desired import ModelRecord
from tidegate.control.history import views
from tidegate.control.looks import Question, questions
from tidegate.control.observed import Capacity, ServeState, SourceState
from tidegate.control.plan import (
    PROGRESSING_SECONDS,
    PoolPlan,
    PoolSnapshot,
    compared_of,
    plan_pool,
    queues_of,
)
from tidegate.control.resource_files import ResourceSet
from tidegate.control.resources import Model, PoolSpec
from tidegate.control.serve_config import application_configs
from tidegate.control_round import Audit, Depths, Registry, Serve, observe_store, publish, tell
from tidegate.errors import QueueUnavailable
from tidegate.local.history_folder import HistoryFolder
from tidegate.local.record_file import RecordFile
from tidegate.messages.registry import ModelEntry
from tidegate.messages.rollouts import Action, RevisionView, RolloutView
from tidegate.replica_args import ReplicaSettings
from tidegate.serve_api import ServeUnavailable
from tidegate.serve_writer import ServeWriter

log = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 15.0  # after failures in a row


class Resources(Protocol):
    """The resources that should stand, and what people ask of them (`local.asked.Asked`)."""

    @property
    def resources(self) -> ResourceSet: ...

    @property
    def pool(self) -> PoolSpec: ...

    @property
    def actions(self) -> Mapping[str, Action]: ...

    @property
    def drains(self) -> frozenset[str]: ...

    @property
    def authors(self) -> Mapping[str, str]: ...

    def acted(self, actions: Mapping[str, Action]) -> None: ...


class Sources(Protocol):
    """Resolves sources (`local.source_checks.SourceChecks`)."""

    def begin(self, question: Question) -> None: ...

    def states(self) -> Mapping[str, SourceState]: ...

    def keep(self, asked: Collection[str]) -> None: ...


class ControlLoop:
    def __init__(
        self,
        files: Resources,
        registry: Registry,
        depths: Depths,
        sources: Sources,
        record_file: RecordFile,
        history: HistoryFolder,
        replicas: ReplicaSettings,
        capacity: Capacity,
        changed: asyncio.Event,
        audit: Audit,
        *,
        wave: int,
        on_entries: Callable[[Mapping[str, ModelEntry]], None],
        on_first_serve: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`on_entries` is called with all entries after each round that changed one, `on_first_serve`
        once, and `on_entries` after it: after the first round that wrote entries from what Serve said."""
        self._files = files
        self._registry = registry
        self._depths = depths
        self._sources = sources
        self._record_file = record_file
        self._history = history
        self._replicas = replicas
        self._capacity = capacity
        self._changed = changed
        self._wave = wave
        self._on_entries = on_entries
        self._on_first_serve: Callable[[], None] | None = on_first_serve
        self._now = now
        self._records: Mapping[str, ModelRecord] = record_file.read()
        history.read()
        self._audit = audit
        self._decided: Mapping[str, Model] = {}
        self._rollouts: Mapping[str, RolloutView] = {}
        self._serve: Serve | None = None
        self._writer = ServeWriter()

    def use(self, serve: Serve | None) -> None:
        """Take the Serve to write to; None while Ray is away."""
        self._serve = serve
        self._changed.set()

    async def run(self) -> None:
        """One round after the other, for ever."""
        failures = 0
        while True:
            self._changed.clear()
            try:
                pause = await self.round()
                failures = 0
            except QueueUnavailable as error:
                failures += 1
                log.warning("control: Redis does not answer: %s", error.message)
            except Exception:
                # The loop must outlive whatever one round meets; it is logged and tried again.
                failures += 1
                log.exception("control: a round failed")
            if failures:
                pause = min(LONGEST_PAUSE_SECONDS, PROGRESSING_SECONDS * 2.0**failures)
            try:
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            except TimeoutError:
                continue  # nothing was said; see what has moved by itself

    async def round(self) -> float:
        """Gather, decide, apply. Returns after how many seconds the next round is due. Raises
        `QueueUnavailable`."""
        serve = self._serve
        snapshot = await self._gather(serve, self._files.resources.models, self._files.actions)
        plan = plan_pool(snapshot, self._now())
        return await self._apply(plan, snapshot, serve)

    @property
    def records(self) -> Mapping[str, ModelRecord]:
        return self._records

    def revisions(self, name: str) -> list[RevisionView]:
        """Return a model's history, the newest first."""
        return views(self._history.known.get(name, ()), self._records.get(name) or ModelRecord(name, 0))

    @property
    def decided(self) -> Mapping[str, Model]:
        """The models that the last round decided on."""
        return self._decided

    @property
    def rollouts(self) -> Mapping[str, RolloutView]:
        """The rollouts as the last round left them."""
        return self._rollouts

    async def look(self, models: Sequence[Model], actions: Mapping[str, Action]) -> PoolSnapshot:
        """Return what the next round would decide on, with these models and actions. Raises
        `QueueUnavailable`."""
        return await self._gather(self._serve, models, {**self._files.actions, **actions})

    async def _gather(
        self, serve: Serve | None, models: Sequence[Model], actions: Mapping[str, Action]
    ) -> PoolSnapshot:
        pool, drains = self._files.pool, self._files.drains
        state: ServeState | None = None
        if serve is not None:
            try:
                state = await serve.get()
            except ServeUnavailable as error:
                log.warning("control: %s", error.message)
        queues = queues_of(models, self._records)
        stored = await observe_store(self._registry, self._depths, queues, None, compared_of(self._records))
        asked, found = questions(models, self._records), self._sources.states()
        seen = replace(
            stored,
            serve=state,
            serve_problem=self._writer.problem,
            sources={key: found[each.identity] for key, each in asked.items() if each.identity in found},
            capacity=self._capacity,
            rejected=self._writer.rejected,
        )
        return PoolSnapshot(
            models,
            pool,
            self._records,
            seen,
            actions=actions,
            drains=drains,
            authors=self._files.authors,
            history=self._history.known,
            wave=self._wave,
        )

    async def _apply(self, plan: PoolPlan, snapshot: PoolSnapshot, serve: Serve | None) -> float:
        self._records = plan.records
        self._record_file.write(plan.records)
        self._history.write(plan.history)
        self._files.acted(snapshot.actions)
        await tell(plan.notes, self._audit, self._now())
        asked = questions(snapshot.models, plan.records)
        self._sources.keep([each.identity for each in asked.values()])
        for key in plan.resolve:
            self._sources.begin(asked[key])
        await publish(self._registry, plan.registry, snapshot.seen.entries)
        self._decided = {model.name: model for model in snapshot.models}
        self._rollouts = plan.rollouts
        if plan.registry.put or plan.registry.delete:
            self._on_entries(plan.entries)
        if serve is not None and snapshot.seen.serve is not None:
            if (first := self._on_first_serve) is not None:
                self._on_first_serve = None
                first()
                self._on_entries(plan.entries)
            wanted = application_configs(plan.applications, self._replicas)
            if await self._writer.write(serve, wanted, snapshot.seen.serve):
                return PROGRESSING_SECONDS
        return plan.pause_seconds(self._now())
