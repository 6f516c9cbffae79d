"""The Serve application of one model revision: `build` makes it, `Replica` is its only deployment.

Nothing is sent to a replica through Serve: it pulls. Serve starts replicas (`__init__`, within which the
model loads and proves itself), asks whether they are well (`check_health`), and ends them (`__del__`, which
it awaits within `graceful_shutdown_timeout_s`).

A model that does not load has told so on the board before `__init__` raises. After each change of its
config Serve tries an application three times and, where no replica was ever seen running, leaves it as failed
for good; else it starts replicas again and again, at once. So two pauses stand here. A failed load is told to
Serve late, which slows its next try down. A replica whose engine breaks right after its start stays until
Serve has seen it running: a poison request that meets fresh replicas costs restarts, never the application.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from ray import serve

from tidegate.replica_args import parse_args
from tidegate.serving import spare
from tidegate.serving.process import ReplicaProcess, configure_logs, exit_failed

log = logging.getLogger("tidegate.serving")

LOAD_FAILURE_PAUSE_SECONDS = 5.0
SHORTEST_LIFE_SECONDS = 3.0  # after a start that succeeded
# Until the next spare is ordered: its imports would take a core from the first answers. Of 1 GB of weights
# the first token came 0.6 s later beside them (2 cores).
ORDER_PAUSE_SECONDS = 2.0


def build(args: dict[str, Any]) -> Any:
    """The `serve.Application` for these `ReplicaArgs`. Raises `ConfigError` where they are wrong."""
    parse_args(args)
    spare.leave()  # where Ray gave this task the process that waited
    return Deployed.bind(args)


class Replica:
    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._process: ReplicaProcess | None = None
        waited = spare.leave()
        parsed = parse_args(args)
        configure_logs(parsed)
        process = ReplicaProcess(parsed, waited=waited)
        try:
            await process.start()
        except Exception:
            await asyncio.sleep(LOAD_FAILURE_PAUSE_SECONDS)
            raise
        self._process = process
        self._started = time.monotonic()
        loop = asyncio.get_running_loop()
        self._guard = loop.create_task(self._exit_when_ended(process))
        self._leaving = asyncio.Event()
        self._order = loop.create_task(self._order_spare())

    async def check_health(self) -> None:
        """Raises with a sentence where the engine is broken and the process has not ended by itself."""
        if self._process is None or self._life_left() > 0:
            return
        if (sentence := self._process.loop.trouble()) is not None:
            raise RuntimeError(sentence)

    async def __del__(self) -> None:
        if self._process is not None:
            self._leaving.set()
            await self._process.drain()
            await self._order
            log.info("replica %s left", self._process.replica_id)

    async def _order_spare(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._leaving.wait(), ORDER_PAUSE_SECONDS)
        await asyncio.to_thread(spare.order)

    async def _exit_when_ended(self, process: ReplicaProcess) -> None:
        """Serve replaces a replica whose process is gone; one with a broken engine has nothing to keep."""
        await process.loop.ended
        await asyncio.sleep(self._life_left())
        exit_failed()

    def _life_left(self) -> float:
        return max(0.0, self._started + SHORTEST_LIFE_SECONDS - time.monotonic())


Deployed: Any = serve.deployment(name="Replica", max_ongoing_requests=1)(Replica)
