"""The registry and the queues as the operator uses them. The operator starts and tells the truth also while
Redis is away, so nothing here waits for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tidegate.control.observed import QueueDepth, RevisionKey
from tidegate.messages.registry import ModelEntry, ReplicaStats, RevisionReport
from tidegate.replica_args import Times
from tidegate.store.connection import Connection
from tidegate.store.queue import QueueDepths
from tidegate.store.registry import Registry

DEPTHS_SECONDS = 2.0


class RedisBoard:
    """Every method raises `QueueUnavailable`, whatever the reason is that Redis cannot be used."""

    def __init__(self, url: str, *, key_prefix: str, times: Times) -> None:
        self._connection = Connection(url, name="tidegate-operator")
        self._registry = Registry(self._connection, key_prefix=key_prefix, times=times)
        self._depths = QueueDepths(self._connection, key_prefix=key_prefix)

    async def close(self) -> None:
        await self._connection.close()

    async def reports(self, wanted: Collection[RevisionKey]) -> dict[RevisionKey, RevisionReport]:
        return await self._registry.reports(wanted)

    async def replicas(self) -> list[ReplicaStats]:
        return await self._registry.replicas()

    async def read_models(self, wanted: Collection[str] | None = None) -> dict[str, ModelEntry]:
        return await self._registry.read_models(wanted)

    async def depths(self, queues: Sequence[RevisionKey]) -> Mapping[RevisionKey, QueueDepth]:
        found = await self._depths.poll(queues, timeout_seconds=DEPTHS_SECONDS)
        return {key: QueueDepth(depth.waiting, depth.running) for key, depth in found.items()}

    async def put_model(self, entry: ModelEntry) -> None:
        await self._registry.put_model(entry)

    async def delete_model(self, name: str) -> None:
        await self._registry.delete_model(name)

    async def drop_revision(self, model: str, revision: str, message: str) -> None:
        await self._registry.drop_revision(model, revision, message)
