"""`tidegate status` over a host's record and a real Redis."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from tests.redis_server import RedisServer
from tidegate.cli.lifecycle import _status_record, _status_text
from tidegate.local.home import Home, Running, record_of
from tidegate.local.lifecycle import status
from tidegate.settings import Settings
from tidegate.store.connection import Connection


async def test_status_says_what_is_wrong_with_the_queue(own_redis: RedisServer, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    running = Running(record_of("host", os.getpid()), url="http://127.0.0.1:1", redis_url=own_redis.url)
    home.record.write_bytes(msgspec.json.encode(running))
    settings = Settings(home=home.root)
    found = await status(settings)
    assert found.queue == []
    assert "queue " not in _status_text(settings, found)
    async with Connection(own_redis.url) as admin:
        await admin.call("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
        await admin.call("CONFIG", "SET", "maxmemory", "1")
    found = await status(settings)
    full, evicts = _status_record(settings, found)["queue"]
    assert "memory" in full
    assert "volatile-lru" in evicts
    assert f"queue    {full}\nqueue    {evicts}" in _status_text(settings, found)
    own_redis.kill()
    assert (await status(settings)).queue == ["The queue's Redis cannot be used now; the log says why."]
