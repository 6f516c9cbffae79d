"""The queue through Sentinels whose master is killed, demoted and missed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.queue_rig import a_request, a_token, accept, open_rig
from tests.sentinels import WatchedPair, ask
from tests.waiting import await_until
from tidegate.errors import ConfigError, QueueUnavailable
from tidegate.messages.work import Request
from tidegate.store.connection import Connection
from tidegate.store.queue import GatewayQueue

FAILOVER_SECONDS = 60.0  # a bound for a busy machine; it takes two or three


@pytest.fixture
def pair() -> Iterator[WatchedPair]:
    pair = WatchedPair()
    try:
        pair.start()
        yield pair
    finally:
        pair.close()


async def test_the_queue_goes_on_where_the_master_is_killed(pair: WatchedPair, key_prefix: str) -> None:
    async with open_rig(pair.url, key_prefix) as rig:
        gateway, ear = await rig.gateway()
        worker = await rig.replica()
        before, after = a_request(), a_request()
        await accept(gateway, before)
        [held] = await worker.queue.claim(1)
        assert await worker.queue.emit([(held.attempt, a_token(held, 0))]) == []
        async with Connection(pair.url) as connection:
            assert await connection.call("WAIT", 1, 20_000) == 1  # the replica has all of it
        pair.kill(pair.master)

        await await_until(lambda: _is_accepted(gateway, after), timeout=FAILOVER_SECONDS)
        assert ask(pair.replica, "ROLE").startswith(b"*3\r\n$6\r\nmaster")
        assert await worker.queue.emit([(held.attempt, a_token(held, 1, finish="stop"))]) == []
        [other] = await worker.queue.claim(5)
        assert other.request.id == after.id
        assert await worker.queue.emit([(other.attempt, a_token(other, 0, finish="stop"))]) == []
        await await_until(lambda: ear.finish_of(before.id) and ear.finish_of(after.id))
        log = await gateway.replay(before.id)
        assert log is not None
        assert [segment.seq for segment in log] == [0, 1]


async def test_a_killed_master_that_comes_back_is_not_taken_for_one(pair: WatchedPair) -> None:
    async with Connection(pair.url) as connection:
        pair.kill(pair.sentinels[0])  # a majority of those in the URL is left
        pair.kill(pair.master)
        await await_until(lambda: not connection.is_connected)
        await await_until(lambda: _is_written(connection), timeout=FAILOVER_SECONDS)
        pair.start_server(pair.master)  # empty, and a master in its own eyes until Sentinels see it
        async with Connection(pair.url) as other:
            assert await other.call("GET", "a") == b"written"


async def test_a_master_that_no_sentinel_knows_is_named(pair: WatchedPair) -> None:
    with pytest.raises(ConfigError, match="watches no master 'other'"):
        await Connection(pair.url.replace("/queue", "/other")).open()
    for port in pair.sentinels:
        pair.kill(port)
    with pytest.raises(QueueUnavailable, match="No Sentinel answers for queue of Sentinels 127"):
        await Connection(pair.url).open()


async def _is_accepted(gateway: GatewayQueue, request: Request) -> bool:
    try:
        await accept(gateway, request)
    except QueueUnavailable:
        return False
    return True


async def _is_written(connection: Connection) -> bool:
    try:
        return bool(await connection.call("SET", "a", "written"))
    except QueueUnavailable:
        return False
