"""How deep queues are, for many of them in one round trip."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from tidegate.errors import QueueUnavailable
from tidegate.messages.queue import Depth
from tidegate.store import names, scripts
from tidegate.store.connection import Connection
from tidegate.store.wire import Argument


class QueueDepths:
    """The depths of all queues that an autoscaler or the CLI asks for. Uses `connection` of its owner."""

    def __init__(self, connection: Connection, *, key_prefix: str) -> None:
        self._connection = connection
        self._prefix = names.prefix(key_prefix)

    async def poll(
        self, queues: Sequence[tuple[str, str]], *, timeout_seconds: float = 0.5
    ) -> dict[tuple[str, str], Depth]:
        """Depth of each (model, revision). Raises `QueueUnavailable`, also past `timeout_seconds`."""
        if not queues:
            return {}
        try:
            async with asyncio.timeout(timeout_seconds):
                reply = await look(
                    self._connection, self._prefix, [names.queue_name(*queue) for queue in queues]
                )
        except TimeoutError as error:
            raise QueueUnavailable(f"Redis does not answer within {timeout_seconds} s.") from error
        return {queue: depth_of(reply, position) for position, queue in enumerate(queues)}


async def look(
    connection: Connection, prefix: str, queues: Sequence[str], pairs: Sequence[Argument] = ()
) -> list[Any]:
    """Run places.lua: three fields per queue, then one rank per (id, queue's index from 1) of `pairs`."""
    reply: list[Any] = await connection.run(scripts.PLACES, prefix, len(queues), *queues, *pairs, repeat=True)
    return reply


def depth_of(reply: list[Any], position: int) -> Depth:
    waiting, running, drain = reply[3 * position : 3 * position + 3]
    return Depth(waiting, running, float(drain))
