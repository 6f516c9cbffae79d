"""The depths of queues, many of them in one round trip."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tidegate.errors import QueueUnavailable
from tidegate.messages.queue import Depth
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.store.scripts import Scripts


class QueueDepths:
    """The depths of all queues that an autoscaler or the CLI asks for. Uses `connection` of its owner."""

    def __init__(self, connection: Connection, *, key_prefix: str) -> None:
        self._scripts = Scripts(connection, key_prefix)

    async def poll(
        self, queues: Sequence[tuple[str, str]], *, timeout_seconds: float = 0.5
    ) -> dict[tuple[str, str], Depth]:
        """Return the depth of each (model, revision). Raises `QueueUnavailable`, also past the timeout."""
        if not queues:
            return {}
        try:
            async with asyncio.timeout(timeout_seconds):
                depths, _ = await self._scripts.depths([names.queue_name(*queue) for queue in queues])
        except TimeoutError as error:
            raise QueueUnavailable(f"Redis does not answer within {timeout_seconds} s.") from error
        return {queue: depths[names.queue_name(*queue)] for queue in queues}
