"""Notice that Redis has lost its data although the connection stands: FLUSHALL, or an older copy restored.

One small key says which data this is. Whoever finds another value there, or none, tells its process what a
reconnect would tell it: that everything it follows may be gone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from tidegate.errors import QueueUnavailable
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.tasks import end_tasks

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class DataWatch:
    def __init__(self, connection: Connection, *, key_prefix: str) -> None:
        self._connection = connection
        self._name = names.prefix(key_prefix) + "epoch"
        self._seen = b""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Remember what is there, and look again from now on. Raises `QueueUnavailable`."""
        self._seen = await self._read()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        await end_tasks(self._task)

    async def look(self) -> None:
        """Tell the process where the data is not what it was. Raises `QueueUnavailable`."""
        found = await self._read()
        if found != self._seen:
            self._seen = found
            log.warning("Redis has lost its data; everything is read anew")
            self._connection.tell_reconnected()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except QueueUnavailable:
                continue  # away: its return is told by the connection

    async def _read(self) -> bytes:
        """Written only where it is missing: a server that is full can still be watched."""
        if (found := await self._connection.call("GET", self._name, repeat=True)) is None:
            await self._connection.call("SET", self._name, secrets.token_hex(8), "NX", repeat=True)
            found = await self._connection.call("GET", self._name, repeat=True)
        return bytes(found or b"")
