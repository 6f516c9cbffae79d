"""The sweeps, which do to requests what time does: leases and deadlines pass, gateways do not come back.

Every gateway and replica runs one `Sweeper`; any one of them alive is enough. A sweep is one script over
global sets, so its cost does not grow with models that rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

from tidegate.errors import QueueUnavailable
from tidegate.replica_args import Times
from tidegate.store.connection import Connection
from tidegate.store.scripts import Scripts
from tidegate.store.wire import ReplyError
from tidegate.tasks import end_tasks

logger = logging.getLogger(__name__)

MOST_PER_SWEEP = 200  # of each kind in one script, so that no sweep holds Redis up


class Sweeper:
    def __init__(
        self,
        connection: Connection,
        *,
        key_prefix: str,
        times: Times,
        gateway: str = "",
        queue: str = "",
        work_waits: Callable[[], None] | None = None,
    ) -> None:
        """`gateway`: whose heartbeat a sweep is. `queue` and `work_waits`: call it where that queue is not
        empty (the slow net under the wake-up messages)."""
        self._scripts = Scripts(connection, key_prefix, times)
        self._interval_seconds = times.sweep_interval_seconds
        self._gateway = gateway
        self._queue = queue
        self._work_waits = work_waits
        self._task: asyncio.Task[None] | None = None

    async def sweep(self) -> int:
        """Do what is due; returns how much that was. Raises `QueueUnavailable`."""
        done, waiting = await self._scripts.sweep(self._gateway, self._queue, most=MOST_PER_SWEEP)
        if waiting and self._work_waits is not None:
            self._work_waits()
        return done

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        await end_tasks(self._task)
        self._task = None

    async def _run(self) -> None:
        while True:
            try:
                # A connection that is away comes back by itself, and so does the next sweep.
                with contextlib.suppress(QueueUnavailable):
                    while await self.sweep() >= MOST_PER_SWEEP:
                        continue
            except ReplyError:
                logger.exception("A sweep failed in Redis")
            await asyncio.sleep(self._interval_seconds * random.uniform(0.8, 1.2))
