"""A follower keeps an in-memory snapshot level with Redis: it reloads what a message names, and everything
after a reconnect.

One task reads; messages only add names to a set, so that a burst of changes becomes one read. A slow full
reload is the net under a lost message.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection

from tidegate.errors import QueueUnavailable
from tidegate.store.connection import Connection
from tidegate.tasks import end_tasks

FULL_RELOAD_SECONDS = 30.0
RETRY_SECONDS = 0.5


class Follower:
    def __init__(
        self,
        connection: Connection,
        channel: str,
        load: Callable[[Collection[str] | None], Awaitable[None]],
    ) -> None:
        """`load` reads the entries named, or all for None, into its owner's snapshot."""
        self._connection = connection
        self._channel = channel
        self._load = load
        self._changed: set[str] = set()
        self._is_all_stale = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stop_listening: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Subscribe, load all, and follow. Raises `QueueUnavailable`."""
        await self._connection.subscribe(self._channel, self._note)
        self._stop_listening = self._connection.on_reconnect(self._note_all)
        await self._load(None)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        self._stop_listening()
        self._connection.unsubscribe(self._channel)
        await end_tasks(self._task)
        self._task = None

    def _note(self, name: bytes) -> None:
        self._changed.add(name.decode())
        self._wake.set()

    def _note_all(self) -> None:
        self._is_all_stale = True
        self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(FULL_RELOAD_SECONDS * random.uniform(0.8, 1.2)):
                    await self._wake.wait()
            except TimeoutError:
                self._is_all_stale = True
            self._wake.clear()
            changed, self._changed = self._changed, set()
            is_all, self._is_all_stale = self._is_all_stale, False
            try:
                await self._load(None if is_all else changed)
            except QueueUnavailable:
                self._note_all()
                await asyncio.sleep(RETRY_SECONDS)
