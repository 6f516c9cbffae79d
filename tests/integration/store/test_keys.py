from __future__ import annotations

import re
from typing import Any

import pytest

from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.errors import ConfigError
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys


async def test_a_key_is_shown_once_and_found_by_its_secret(redis_url: str, key_prefix: str) -> None:
    async with Connection(redis_url) as one, Connection(redis_url) as two:
        admin, gateway = Keys(one, key_prefix=key_prefix), Keys(two, key_prefix=key_prefix)
        early, early_secret = await admin.create("early", "team-a", now=5.0)
        await gateway.start()
        assert gateway.find(early_secret) == early
        key, secret = await admin.create("later")
        assert re.fullmatch(r"tg-[A-Za-z0-9_-]{43}", secret)
        assert (key.tenant, key.prefix, key.revoked) == ("default", secret[:8], None)
        await await_until(lambda: gateway.find(secret))
        assert gateway.find(secret) == key
        assert gateway.find("tg-wrong") is None
        assert await admin.list() == [early, key]
        stored = await one.call("HGETALL", f"{key_prefix}:keys")
        assert secret not in repr(stored)
        await gateway.close()


async def test_a_revoked_key_is_refused_everywhere(redis_url: str, key_prefix: str) -> None:
    async with Connection(redis_url) as one, Connection(redis_url) as two:
        admin, gateway = Keys(one, key_prefix=key_prefix), Keys(two, key_prefix=key_prefix)
        key, secret = await admin.create("k")
        await gateway.start()
        revoked = await admin.revoke(key.id, now=9.0)
        await await_until(lambda: gateway.find(secret) is None)
        assert revoked.revoked == 9.0
        assert await admin.revoke(key.id, now=10.0) == revoked
        assert await admin.list() == [revoked]
        await gateway.close()


async def test_an_unknown_key_cannot_be_revoked(connection: Connection, key_prefix: str) -> None:
    with pytest.raises(ConfigError, match="'key_none'"):
        await Keys(connection, key_prefix=key_prefix).revoke("key_none")


async def test_a_revocation_during_an_outage_is_caught_up(own_redis: RedisServer, key_prefix: str) -> None:
    async with Connection(own_redis.url) as connection:
        gateway = Keys(connection, key_prefix=key_prefix)
        key, secret = await gateway.create("k")
        await gateway.start()
        own_redis.kill()
        await await_until(lambda: not connection.is_connected)
        assert gateway.find(secret) is not None
        own_redis.start()
        async with Connection(own_redis.url) as other:
            await Keys(other, key_prefix=key_prefix).revoke(key.id)
        await await_until(lambda: gateway.find(secret) is None)
        assert (await gateway.list())[0].revoked is not None
        await gateway.close()


async def test_a_secret_made_elsewhere_is_let_in_once(redis_url: str, key_prefix: str) -> None:
    secret = "tg-" + "s" * 43
    async with Connection(redis_url) as one, Connection(redis_url) as two:
        first, second = Keys(one, key_prefix=key_prefix), Keys(two, key_prefix=key_prefix)
        await second.start()
        assert await first.register(secret, "admin")
        await await_until(lambda: second.find(secret))
        assert not await second.register(secret, "other")
        [key] = await first.list()
        assert (key.name, key.tenant, key.prefix) == ("admin", "default", "tg-sssss")
        await second.close()


async def test_registering_does_not_undo_a_revocation(connection: Connection, key_prefix: str) -> None:
    secret = "tg-" + "r" * 43
    keys = Keys(connection, key_prefix=key_prefix)
    await keys.start()
    await keys.register(secret, "admin")
    [key] = await keys.list()
    await keys.revoke(key.id)
    assert not await keys.register(secret, "admin")
    await await_until(lambda: keys.find(secret) is None)
    await keys.close()


@pytest.mark.parametrize(
    ("name", "tenant", "said"),
    [
        ("", "t", "name: ''"),
        ("  ", "t", "name: '  '"),
        ("a\x1b[31m", "t", r"name: 'a\\x1b"),
        ("a\nb", "t", r"name: 'a\\nb'"),
        ("\u202ea", "t", "name: "),
        ("n" * 129, "t", "name: 129 characters: use at most 128"),
        ("n", "", "tenant: ''"),
        ("n", "t\0", r"tenant: 't\\x00'"),
        ("n", "t" * 5000, "tenant: 5000 characters: use at most 64"),
        ("n", " t", "tenant: ' t'"),
    ],
)
async def test_names_that_no_table_can_show_are_refused(
    connection: Connection, key_prefix: str, name: str, tenant: str, said: str
) -> None:
    keys = Keys(connection, key_prefix=key_prefix)
    with pytest.raises(ConfigError, match=said):
        await keys.create(name, tenant)
    assert await keys.list() == []


async def test_a_lost_key_is_let_in_again_and_a_revoked_one_is_not(
    own_redis: RedisServer, key_prefix: str
) -> None:
    async with Connection(own_redis.url) as connection:
        keys = Keys(connection, key_prefix=key_prefix)
        key, secret = await keys.create("local")
        assert not await keys.restore(secret, "local")
        await connection.call("FLUSHALL")
        assert await keys.restore(secret, "local")
        (restored,) = await keys.list()
        assert (restored.name, restored.prefix) == ("local", key.prefix)
        await keys.revoke(restored.id)
        assert not await keys.restore(secret, "local")
        assert (await keys.list())[0].revoked


async def test_a_key_has_its_scopes_and_one_stored_before_there_were_any_asks_models(
    connection: Connection, key_prefix: str
) -> None:
    keys = Keys(connection, key_prefix=key_prefix)
    made, _ = await keys.create("ops", scopes=["read", "admin", "read"])
    assert made.scopes == ("read", "admin")
    before = b'{"id":"key_1","name":"old","tenant":"default","created":1.0,"revoked":null,"prefix":"tg-old"}'
    await connection.call("HSET", f"{key_prefix}:keys", "digest", before)
    old, listed = await keys.list()
    assert (old.name, old.scopes, listed) == ("old", ("inference",), made)


@pytest.mark.parametrize("scopes", [[], ["root"], ["inference", "root"]])
async def test_a_scope_that_there_is_not_is_refused(
    connection: Connection, key_prefix: str, scopes: list[Any]
) -> None:
    with pytest.raises(ConfigError, match="use one or more of inference, admin, read"):
        await Keys(connection, key_prefix=key_prefix).create("k", scopes=scopes)
