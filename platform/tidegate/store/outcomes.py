"""How the requests of revisions ended, as the scripts that end them have counted (`messages.outcomes`).

{prefix}:outcomes:{queue}  hash  "{cohort}|{what}" -> how often; goes with its queue
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from tidegate.messages.outcomes import Tally, bucket_of, read_outcomes, rollout_of
from tidegate.messages.registry import ReplicaStats
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.store.scripts import Scripts

MOST_AGES = 2000  # requests without a token that are looked at per queue

_stats = msgspec.json.Decoder(ReplicaStats)


class OutcomeStore:
    """Uses `connection`, which its owner opens and closes. All raises `QueueUnavailable`."""

    def __init__(self, connection: Connection, key_prefix: str) -> None:
        self._connection = connection
        self._scripts = Scripts(connection, key_prefix)
        self._prefix = names.prefix(key_prefix)

    async def read(self, queues: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Tally]]:
        """Return the counters of each (model, revision) by cohort, with those who wait for a first token."""
        if not queues:
            return {}
        replicas: dict[tuple[str, str], list[str]] = {queue: [] for queue in queues}
        for text in await self._scripts.beating():
            stats = _stats.decode(text)
            if (queue := (stats.model, stats.revision)) in replicas:
                replicas[queue].append(stats.replica)
        found = await asyncio.gather(*(self._read(queue, replicas[queue]) for queue in queues))
        return dict(zip(queues, found, strict=True))

    async def forget(self, queues: Sequence[tuple[str, str]], rollout: str) -> None:
        """Remove the counters of a rollout that is over, and of those before it."""
        for queue in queues:
            key = self._key(queue)
            fields = await self._connection.call("HKEYS", key, repeat=True)
            past = [
                field for field in fields if "" < rollout_of(field.decode().rpartition("|")[0]) <= rollout
            ]
            if past:
                await self._connection.call("HDEL", key, *past, repeat=True)

    async def _read(self, queue: tuple[str, str], replicas: Sequence[str]) -> dict[str, Tally]:
        counters, ages = await asyncio.gather(
            self._connection.call("HGETALL", self._key(queue), repeat=True),
            self._scripts.ages(names.queue_name(*queue), replicas, most=MOST_AGES),
        )
        found = read_outcomes((field.decode(), int(count)) for field, count in counters.items())
        for cohort, seconds in ages:
            waiting, bucket = found.setdefault(cohort, Tally()).waiting_first, bucket_of(seconds)
            waiting[bucket] = waiting.get(bucket, 0) + 1
        return found

    def _key(self, queue: tuple[str, str]) -> str:
        return f"{self._prefix}outcomes:{names.queue_name(*queue)}"
