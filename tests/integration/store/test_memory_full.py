"""A Redis that has no memory left: what is new is refused, what is there goes on to its end."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
from msgspec.structs import replace

from tests.contract.queue_rig import BY_HAND, MODEL, REVISION, Rig, a_request, a_token, accept, bounds
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.errors import QueueOutOfMemory
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys

KIB = 1024


async def fill(connection: Connection, *, is_full: bool = True) -> None:
    await connection.call("CONFIG", "SET", "maxmemory", 1 if is_full else 0)


async def test_what_is_there_goes_on_and_what_is_new_is_refused(
    own_redis: RedisServer, key_prefix: str
) -> None:
    async with AsyncExitStack() as stack, Connection(own_redis.url) as admin:
        rig = Rig(own_redis.url, key_prefix, stack)
        gateway, ear = await rig.gateway()
        replica = await rig.replica()
        requests = [a_request() for _ in range(6)]
        await accept(gateway, *requests)
        await replica.queue.claim(1)
        await fill(admin)
        with pytest.raises(QueueOutOfMemory):
            await gateway.submit([a_request()], bounds())
        ended, cancelled, given_back, failed, last, dropped = (request.id for request in requests)
        assert await replica.queue.emit([(1, a_token(ended, 0))]) == []
        assert await replica.queue.emit([(1, a_token(ended, 1, finish="stop"))]) == []
        assert len(await replica.queue.claim(4)) == 4
        assert await replica.queue.renew([(last, 1)]) == []
        await gateway.cancel([cancelled], "left")
        await replica.queue.hand_back([(given_back, 1)], "r")
        await replica.queue.fault([(failed, 1)], "r")
        for _ in range(2):
            await gateway.cancel([given_back, failed, last], "left")
        sweeper = await rig.sweeper(replace(BY_HAND, orphan_seconds=1e-6))
        await sweeper.sweep()
        assert {request.id for request in requests if ear.finish_of(request.id)} <= {r.id for r in requests}
        await await_until(lambda: ear.finish_of(dropped))
        assert (await gateway.depth(MODEL, REVISION)).waiting == 0
        await fill(admin, is_full=False)
        await accept(gateway, a_request())


async def test_the_largest_answers_end_where_memory_is_full(own_redis: RedisServer, key_prefix: str) -> None:
    async with AsyncExitStack() as stack, Connection(own_redis.url) as admin:
        rig = Rig(own_redis.url, key_prefix, stack)
        gateway, ear = await rig.gateway()
        replica = await rig.replica()
        large, small = a_request(), a_request()
        await accept(gateway, large, small)
        await replica.queue.claim(2)
        await replica.queue.emit([(1, a_token(large, 0, "x" * 300 * KIB)), (1, a_token(small, 0))])
        await fill(admin)
        step = "x" * 8 * KIB
        assert await replica.queue.emit([(1, a_token(large, 1, step)), (1, a_token(small, 1, step))]) == [
            large.id
        ]
        finish = await await_until(lambda: ear.finish_of(large.id))
        assert finish is not None
        assert (finish.code, "no memory left" in finish.message) == ("AnswerTooLarge", True)
        assert await replica.queue.emit([(1, a_token(small, 2, step))]) == []


async def test_a_key_can_be_revoked_where_memory_is_full(own_redis: RedisServer, key_prefix: str) -> None:
    async with Connection(own_redis.url) as connection:
        keys = Keys(connection, key_prefix=key_prefix)
        key, _ = await keys.create("k")
        await fill(connection)
        assert (await keys.revoke(key.id)).revoked is not None
