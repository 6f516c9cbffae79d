"""Put a replica together in its process: arguments, logs, connection, engine, loop. Used by the Serve
deployment (`app`) and by the plain runner (`python -m tidegate.serving`), so both take the same path."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec
import psutil

from tidegate.engines.base import Engine, EngineLoadError, LoadReport
from tidegate.engines.create import create_engine
from tidegate.errors import QueueUnavailable, SourceError
from tidegate.messages.registry import RevisionReport
from tidegate.replica_args import ReplicaArgs, find_redis_url
from tidegate.runtime import calm_collector
from tidegate.serving import node_files, parking
from tidegate.serving.replica import RETRY_SECONDS, ReplicaLoop
from tidegate.serving.reports import ended_note, not_loaded
from tidegate.sources.checkpoint import read_checkpoint
from tidegate.store.connection import Connection
from tidegate.store.queue import ReplicaQueue
from tidegate.store.registry import Registry
from tidegate.telemetry import JsonFormatter, Laps, fields

log = logging.getLogger(__name__)

EXIT_ENGINE_FAILED = 70  # of a process whose engine crashed or hung, after it told so
MOST_PROCESS_SECONDS = 30.0


class ReplicaProcess:
    """A replica with its connection. `await start()` once, which makes `loop`; `await drain()` once at the
    end."""

    loop: ReplicaLoop

    def __init__(self, args: ReplicaArgs, *, waited: bool = False) -> None:
        """`waited`: the process was there before anybody needed it (`spare`)."""
        self.args = args
        self._began = time.time()
        self._borrowed: parking.Borrowed | None = None
        self._process_seconds = 0.0 if waited else _process_age_seconds()
        self.replica_id = f"{args.model}--{args.revision}#{secrets.token_hex(4)}"
        self.connection = Connection(
            partial(find_redis_url, args.redis_url), name=f"tidegate-replica-{args.model}"
        )
        self.registry = Registry(self.connection, key_prefix=args.key_prefix, times=args.times)

    async def start(self) -> LoadReport:
        """Connect (waiting while Redis is away), load, serve. Raises `EngineLoadError`, `ConfigError`."""
        laps = Laps()
        before = await self._connect()
        laps.end("Redis")
        try:
            self.loop = self._make_loop(await self._make_engine(laps))
            until_load = self._process_seconds + time.time() - self._began
            report = await self.loop.start(ended_note(before), process_seconds=until_load)
        except BaseException:
            self._give_back()
            await self.connection.close()
            raise
        if self._borrowed is not None:
            self._borrowed.loaded()
        laps.end("load and report")
        seconds = {"process": self._process_seconds, **laps.seconds, **report.seconds}
        log.info("replica %s is up", self.replica_id, extra=fields(began=self._began, seconds=seconds))
        calm_collector()
        return report

    async def _connect(self) -> RevisionReport | None:
        """Wait for Redis, however long; returns the revision's last report."""
        while True:
            try:
                await self.connection.open()
                return (await self.registry.reports()).get((self.args.model, self.args.revision))
            except QueueUnavailable as error:
                log.warning("waiting for Redis: %s", error.message)
                await asyncio.sleep(RETRY_SECONDS)

    async def _make_engine(self, laps: Laps) -> Engine:
        """Raises `EngineLoadError`, and reports it, where the arguments are not the engine's, or its revision
        is of other weights."""
        spec = self.args.engine
        try:
            self._borrowed = await asyncio.to_thread(parking.borrow, self.args)
            if self._borrowed is None:
                await asyncio.to_thread(check_content, self.args)
            else:
                spec = msgspec.structs.replace(spec, path=str(self._borrowed.path))
                log.info("loads parked weights: %.2f GB", self._borrowed.bytes / 1e9)
            laps.end("content")
            engine = create_engine(spec, node_files.check_record(self.args))
            laps.end("imports")
            return engine
        except EngineLoadError as failure:
            await self.registry.report(not_loaded(self.args.model, self.args.revision, failure, time.time()))
            raise

    def _make_loop(self, engine: Engine) -> ReplicaLoop:
        args = self.args
        return ReplicaLoop(
            engine,
            ReplicaQueue(
                self.connection,
                key_prefix=args.key_prefix,
                model=args.model,
                revision=args.revision,
                replica_id=self.replica_id,
                times=args.times,
            ),
            self.registry,
            args,
            self.replica_id,
        )

    async def drain(self) -> None:
        await self.loop.drain()
        await self._park()
        self._give_back()
        await self.connection.close()

    async def _park(self) -> None:
        """Leave the weights to a holder where they should stay in memory and nobody else serves them."""
        try:
            entry = (await self.registry.read_models([self.args.model])).get(self.args.model)
            if entry is None or self.args.revision not in entry.parks or self.loop.failure is not None:
                return
            others = await self.registry.replicas()
            key = (self.args.model, self.args.revision)
            if not any((each.model, each.revision) == key and not each.draining for each in others):
                await asyncio.to_thread(parking.leave_to_holder, self.args)
        except (QueueUnavailable, OSError) as error:
            log.warning("weights are not parked: %s", error)

    def _give_back(self) -> None:
        if self._borrowed is not None:
            self._borrowed.close()
            self._borrowed = None


def check_content(args: ReplicaArgs) -> None:
    """Raise `EngineLoadError` (SourceChanged) where other content lies there than the revision was made from.
    What cannot be read is the engine's to tell."""
    with suppress(SourceError, OSError):
        if args.digest and read_checkpoint(Path(args.engine.path)).digest(args.commit) != args.digest:
            raise EngineLoadError(
                "SourceChanged",
                f"{args.engine.path} no longer holds what the revision was made from. Put those files back, "
                f"or take what lies there as another revision: tidegate rollout recheck {args.model}.",
            )


def configure_logs(args: ReplicaArgs) -> None:
    """JSON lines of `tidegate.*` to standard error (Ray keeps it) and, with `log_dir`, to
    `replica-{model}.log` there. Leaves Ray's own loggers as they are."""
    logger = logging.getLogger("tidegate")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if args.log_dir:
        folder = Path(args.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / f"replica-{args.model}.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(JsonFormatter())
    logger.handlers[:] = handlers


def _process_age_seconds() -> float:
    """Bounded: a worker that Ray had started ahead of need may be old."""
    return min(MOST_PROCESS_SECONDS, max(0.0, time.time() - psutil.Process().create_time()))


def exit_failed() -> NoReturn:
    """End this process at once: an engine thread may hang in foreign code, so nothing is waited for."""
    for handler in logging.getLogger("tidegate").handlers:
        handler.flush()
    os._exit(EXIT_ENGINE_FAILED)
