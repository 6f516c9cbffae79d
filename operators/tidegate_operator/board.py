"""The registry and the queues as the operator uses them, over one connection that may come late.

The operator starts and tells the truth also while Redis is away, so the connection is opened when something
is first asked of it, and again until it succeeds; from then on it comes back by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

from tidegate.control.observed import RevisionKey
from tidegate.errors import ConfigError, QueueUnavailable
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ModelEntry, ReplicaStats, RevisionReport
from tidegate.store.connection import Connection
from tidegate.store.queue import QueueDepths
from tidegate.store.registry import Registry


class RedisBoard:
    """Every method raises `QueueUnavailable`, whatever the reason is that Redis cannot be used."""

    def __init__(self, url: str, *, key_prefix: str, result_ttl_seconds: float) -> None:
        self._connection = Connection(url, name="tidegate-operator")
        self._registry = Registry(
            self._connection, key_prefix=key_prefix, result_ttl_seconds=result_ttl_seconds
        )
        self._depths = QueueDepths(self._connection, key_prefix=key_prefix)
        self._opening = asyncio.Lock()
        self._is_open = False

    async def close(self) -> None:
        await self._connection.close()

    async def reports(self, wanted: Collection[RevisionKey]) -> dict[RevisionKey, RevisionReport]:
        await self._open()
        return await self._registry.reports(wanted)

    async def replicas(self) -> list[ReplicaStats]:
        await self._open()
        return await self._registry.replicas()

    async def read_models(self, wanted: Collection[str] | None = None) -> dict[str, ModelEntry]:
        await self._open()
        return await self._registry.read_models(wanted)

    async def poll(
        self, queues: Sequence[RevisionKey], *, timeout_seconds: float
    ) -> Mapping[RevisionKey, Depth]:
        await self._open()
        return await self._depths.poll(queues, timeout_seconds=timeout_seconds)

    async def put_model(self, entry: ModelEntry) -> None:
        await self._open()
        await self._registry.put_model(entry)

    async def delete_model(self, name: str) -> None:
        await self._open()
        await self._registry.delete_model(name)

    async def drop_revision(self, model: str, revision: str, message: str) -> None:
        await self._open()
        await self._registry.drop_revision(model, revision, message)

    async def _open(self) -> None:
        async with self._opening:
            if self._is_open:
                return
            try:
                await self._connection.open()
            except ConfigError as error:  # a wrong password is mended in Redis or by a new start
                raise QueueUnavailable(error.message) from error
            self._is_open = True
