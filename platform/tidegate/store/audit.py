"""The audit log of a cluster: a stream in Redis with the newest entries. The operator's own log has them all.

Implements `tidegate.control_api.ports.AuditLog`.
"""

from __future__ import annotations

import msgspec

from tidegate.messages.administration import AuditEntry
from tidegate.store import names
from tidegate.store.connection import Connection

MOST_ENTRIES = 10_000

_encode = msgspec.json.Encoder().encode
_entry = msgspec.json.Decoder(AuditEntry)


class AuditStream:
    """Uses `connection`, which its owner opens and closes. All raise `QueueUnavailable`."""

    def __init__(self, connection: Connection, *, key_prefix: str) -> None:
        self._connection = connection
        self._name = names.prefix(key_prefix) + "audit"

    async def append(self, entry: AuditEntry) -> None:
        text = _encode(entry)
        await self._connection.call("XADD", self._name, "MAXLEN", "~", MOST_ENTRIES, "*", "entry", text)

    async def page(self, before: str, limit: int) -> list[AuditEntry]:
        start = f"({before}" if before else "+"
        found = await self._connection.call("XREVRANGE", self._name, start, "-", "COUNT", limit, repeat=True)
        return [
            msgspec.structs.replace(_entry.decode(fields[1]), id=entry_id.decode())
            for entry_id, fields in found
        ]
