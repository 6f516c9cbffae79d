"""Whether Redis can do what a queue needs, asked at most once a second however many want to know."""

from __future__ import annotations

import asyncio
import logging
import re

from tidegate.errors import QueueOutOfMemory, QueueReadOnly, QueueUnavailable
from tidegate.messages.queue import QueueHealth, QueueState
from tidegate.store.connection import Connection
from tidegate.store.scripts import Scripts
from tidegate.store.wire import ReplyError
from tidegate.tasks import end_tasks

log = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0  # a Redis that takes longer is slow
FRESH_SECONDS = 1.0


class HealthWatch:
    """Uses `connection`, which its owner opens and closes."""

    def __init__(self, connection: Connection, *, key_prefix: str) -> None:
        self._connection = connection
        self._scripts = Scripts(connection, key_prefix)
        self._seen = QueueHealth()
        self._asked = -FRESH_SECONDS
        self._asking: asyncio.Task[QueueHealth] | None = None

    async def look(self) -> QueueHealth:
        """Ask, or return what was found within the last second."""
        loop = asyncio.get_running_loop()
        if self._asking is None and loop.time() - self._asked < FRESH_SECONDS:
            return self._seen
        if self._asking is None:
            self._asking = loop.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def close(self) -> None:
        await end_tasks(self._asking)

    async def _ask(self) -> QueueHealth:
        try:
            state, policy = await asyncio.gather(self._state(), self._policy())
        finally:
            self._asking = None
        found = QueueHealth(state, policy)
        if found != self._seen:
            for sentence in found.troubles().values():
                log.warning("%s", sentence)
        self._seen, self._asked = found, asyncio.get_running_loop().time()
        return found

    async def _state(self) -> QueueState:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._scripts.probe()
        except TimeoutError:
            return "slow" if self._connection.is_connected else "away"
        except QueueOutOfMemory:
            return "full"
        except QueueReadOnly:
            return "read-only"
        except QueueUnavailable as error:
            log.warning("%s", error.message)
            return "away"
        return "ok"

    async def _policy(self) -> str:
        """Redis' `maxmemory-policy` where it says one that evicts; else what it said before."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                told = await self._connection.call("INFO", "memory")
        except (TimeoutError, QueueUnavailable, ReplyError):  # away, or not allowed to ask
            return self._seen.eviction
        policy = re.search(rb"maxmemory_policy:([\w-]+)", told)
        return "" if policy is None or policy[1] == b"noeviction" else policy[1].decode()
