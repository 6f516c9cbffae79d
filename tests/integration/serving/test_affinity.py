"""What a replica leaves to another one does not wait for it."""

from __future__ import annotations

from tests.integration.serving.rig import MODEL, REVISION, a_request, open_ear, open_replica
from tidegate.messages.work import Finish, Segment
from tidegate.replica_args import Times
from tidegate.store.connection import Connection
from tidegate.store.queue import ReplicaQueue

PREFIX = "tide " * 1000
NEVER_SWEEPS = {"sweep_interval_seconds": 3600.0}


async def test_what_a_dead_replica_holds_is_answered_by_the_next_claim(
    redis_url: str, key_prefix: str
) -> None:
    async with open_ear(redis_url, key_prefix) as ear, Connection(redis_url) as connection:
        dead = ReplicaQueue(
            connection,
            key_prefix=key_prefix,
            model=MODEL,
            revision=REVISION,
            replica_id="dead",
            times=Times(lease_seconds=60.0, **NEVER_SWEEPS),
        )
        await dead.start(lambda: None, lambda _: None)
        first = a_request(PREFIX)
        await ear.submit(first)
        [claim] = await dead.claim(8)  # it has room for more
        await dead.emit([(claim.attempt, Segment(first.id, 0, Finish("stop")))])
        async with open_replica(redis_url, key_prefix, **NEVER_SWEEPS):
            again = a_request(PREFIX + "again")
            await ear.submit(again)
            [finish] = await ear.ended(again)
            assert finish.reason == "length"
        await dead.close()


async def test_a_replica_tells_what_its_engine_held(redis_url: str, key_prefix: str) -> None:
    async with (
        open_ear(redis_url, key_prefix) as ear,
        open_replica(redis_url, key_prefix, engine_args={"prefix_cache_tokens": 2048}),
    ):
        finishes = []
        for _ in range(2):
            request = a_request(PREFIX)
            await ear.submit(request)
            finishes += await ear.ended(request)
        assert [finish.cached_tokens for finish in finishes] == [0, 1248]
