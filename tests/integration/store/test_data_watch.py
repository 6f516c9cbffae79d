"""A Redis that loses its data without a broken connection is noticed, by everybody who follows it."""

from __future__ import annotations

from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.replica_args import DEFAULT_TIMES
from tidegate.store.connection import Connection
from tidegate.store.data_watch import DataWatch
from tidegate.store.gateway_queue import GatewayQueue
from tidegate.store.keys import Keys


async def test_each_process_is_told_once_of_each_loss(own_redis: RedisServer, key_prefix: str) -> None:
    async with Connection(own_redis.url) as one, Connection(own_redis.url) as two:
        told: list[str] = []
        one.on_reconnect(lambda: told.append("one"))
        two.on_reconnect(lambda: told.append("two"))
        watches = [DataWatch(one, key_prefix=key_prefix), DataWatch(two, key_prefix=key_prefix)]
        for watch in watches:
            await watch.start()
            await watch.look()
        assert told == []
        await one.call("FLUSHALL")
        for watch in watches * 2:
            await watch.look()
        assert told == ["one", "two"]
        for watch in watches:
            await watch.close()


async def test_a_gateway_reads_its_open_requests_and_keys_anew(
    own_redis: RedisServer, key_prefix: str
) -> None:
    lost: list[bool] = []
    async with Connection(own_redis.url) as connection:
        keys = Keys(connection, key_prefix=key_prefix)
        _, secret = await keys.create("k")
        await keys.start()
        queue = GatewayQueue(connection, key_prefix=key_prefix, gateway_id="g", times=DEFAULT_TIMES)
        await queue.start(lambda segments: None, lambda: lost.append(True))
        assert keys.find(secret) is not None
        await connection.call("FLUSHALL")
        await await_until(lambda: lost and keys.find(secret) is None)
        assert await queue.replay("any") is None  # so its stream ends with LogGone
        await queue.close()
        await keys.close()
