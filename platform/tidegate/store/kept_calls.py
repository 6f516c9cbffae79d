"""Calls that are kept. Implements `tidegate.gateway.ports.KeptCalls`; the essay of `tidegate.store.queue`
says how they live.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

from msgspec.structs import replace

from tidegate.errors import QueueUnavailable
from tidegate.messages.codec import decode_kept, decode_segments
from tidegate.messages.kept import KeptCall, gateway_of
from tidegate.messages.work import Segment
from tidegate.replica_args import Times
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.store.scripts import Scripts
from tidegate.tasks import end_tasks

ATTEND_SECONDS = 2.0  # between two signs that a call is read: well within what one lives without a reader
ATTENDED_AT_ONCE = 500  # in one script


class _Channel:
    """The channel of one call, which several readers in this process may hear."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.readers: list[Callable[[list[Segment]], None]] = []
        self.opening = asyncio.get_running_loop().create_task(connection.subscribe(name, self._receive))

    def _receive(self, blob: bytes) -> None:
        segments = decode_segments(blob)
        for deliver in list(self.readers):
            deliver(segments)


class KeptCalls:
    """Uses `connection`, which its owner opens and closes."""

    def __init__(self, connection: Connection, *, key_prefix: str, times: Times) -> None:
        self._connection = connection
        self._key_prefix = key_prefix
        self._prefix = names.prefix(key_prefix)
        self._scripts = Scripts(connection, key_prefix, times)
        self._channels: dict[str, _Channel] = {}
        self._attending: asyncio.Task[None] | None = None

    async def keep(
        self, call: KeptCall, *, seconds: float, linger_seconds: float, tenant_bytes: int, total_bytes: int
    ) -> Literal["", "tenant", "total"]:
        """See `gateway.ports.KeptCalls.keep`."""
        return await self._scripts.keep(
            call,
            seconds=seconds,
            linger_seconds=linger_seconds,
            tenant_bytes=tenant_bytes,
            total_bytes=total_bytes,
        )

    async def find(self, call_id: str, tenant: str) -> KeptCall | None:
        """See `gateway.ports.KeptCalls.find`."""
        of, record, ended = await self._connection.call(
            "HMGET", f"{self._prefix}{gateway_of(call_id)}", "tenant", "record", "ended", repeat=True
        )
        return replace(decode_kept(record), ended=int(ended or 0)) if of == tenant.encode() else None

    async def state(self, request_id: str) -> str:
        """See `gateway.ports.KeptCalls.state`."""
        state = await self._connection.call("HGET", f"{self._prefix}req:{request_id}", "state", repeat=True)
        return (state or b"").decode()

    async def unkeep(self, call_id: str, reason: str) -> None:
        """See `gateway.ports.KeptCalls.unkeep`."""
        await self._scripts.unkeep([call_id], reason)

    @asynccontextmanager
    async def following(self, call_id: str, deliver: Callable[[list[Segment]], None]) -> AsyncIterator[None]:
        """See `gateway.ports.KeptCalls.following`."""
        name = names.gateway_channel(self._key_prefix, gateway_of(call_id))
        channel = self._channels.get(call_id)
        if channel is None:
            channel = self._channels[call_id] = _Channel(self._connection, name)
        channel.readers.append(deliver)
        try:
            await asyncio.shield(channel.opening)
            if self._attending is None or self._attending.done():
                self._attending = asyncio.get_running_loop().create_task(self._attend())
            yield
        finally:
            channel.readers.remove(deliver)
            if not channel.readers and self._channels.get(call_id) is channel:
                del self._channels[call_id]
                await end_tasks(channel.opening)
                if call_id not in self._channels:
                    self._connection.unsubscribe(name)

    async def close(self) -> None:
        await end_tasks(self._attending)

    async def _attend(self) -> None:
        while self._channels:
            ids = list(self._channels)
            with contextlib.suppress(QueueUnavailable):  # nobody is forgotten while Redis is away
                for at in range(0, len(ids), ATTENDED_AT_ONCE):
                    await self._scripts.attend(ids[at : at + ATTENDED_AT_ONCE])
            await asyncio.sleep(ATTEND_SECONDS)
