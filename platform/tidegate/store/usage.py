"""What tenants hold of the queues now, as `submit` counts it for its bounds.

Implements `tidegate.control_api.ports.UsageReader`.
"""

from __future__ import annotations

import asyncio

from tidegate.messages.administration import Held, Usage
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys


class UsageReader:
    """Uses `connection`, which its owner opens and closes."""

    def __init__(self, connection: Connection, keys: Keys, *, key_prefix: str) -> None:
        self._connection = connection
        self._keys = keys
        self._prefix = names.prefix(key_prefix)

    async def read(self) -> Usage:
        """The tenants of all keys, revoked ones too, by name. Raises `QueueUnavailable`."""
        tenants = sorted({key.tenant for key in await self._keys.list()})
        held = await asyncio.gather(*map(self._held, tenants))
        return Usage(dict(zip(tenants, held, strict=True)))

    async def _held(self, tenant: str) -> Held:
        found = await self._connection.call(
            "HMGET", f"{self._prefix}tenant:{tenant}", "requests", "bytes", "written", repeat=True
        )
        return Held(*(int(value or 0) for value in found))
