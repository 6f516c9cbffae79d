"""What time does to requests: leases and deadlines that pass, gateways that do not come back.

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
from tidegate.store import scripts
from tidegate.store.connection import Connection
from tidegate.store.wire import ReplyError

logger = logging.getLogger(__name__)

MOST_PER_SWEEP = 200  # of each kind in one script, so that no sweep holds Redis up


class Sweeper:
    def __init__(
        self,
        connection: Connection,
        prefix: str,
        *,
        times: Times,
        gateway: str = "",
        queue: str = "",
        work_waits: Callable[[], None] | None = None,
    ) -> None:
        """`gateway`: whose heartbeat a sweep is. `queue` and `work_waits`: call it where that queue is not
        empty (the slow net under the wake-up messages)."""
        self._connection = connection
        self._prefix = prefix
        self._times = times
        self._gateway = gateway
        self._queue = queue
        self._work_waits = work_waits
        self._task: asyncio.Task[None] | None = None

    async def sweep(self) -> int:
        """Do what is due; how much that was. Raises `QueueUnavailable`."""
        times = self._times
        done, waiting = await self._connection.run(
            scripts.SWEEP,
            self._prefix,
            self._gateway,
            self._queue,
            times.orphan_seconds,
            times.expire_seconds,
            MOST_PER_SWEEP,
            times.sweep_pause_seconds,
            times.sweep_grace_seconds,
        )
        if waiting and self._work_waits is not None:
            self._work_waits()
        return int(done)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # it is cancelled because we ask for it
                await self._task
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
            await asyncio.sleep(self._times.sweep_interval_seconds * random.uniform(0.8, 1.2))
