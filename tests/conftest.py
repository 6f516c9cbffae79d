"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.redis_server import RedisServer
from tidegate.store.connection import Connection

# A process that waits to become a replica takes seconds to import what simulated models have no use for;
# `test_spare` has one of its own.
os.environ.setdefault("TIDEGATE_SPARE_PROCESS", "false")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for all tests of the session; `key_prefix` keeps them apart."""
    server = RedisServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def key_prefix() -> str:
    return "test-" + secrets.token_hex(6)


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    async with Connection(redis_url) as connection:
        yield connection


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server of this test alone, to be killed and started again: it fsyncs every write."""
    server = RedisServer(durable=True)
    server.start()
    yield server
    server.close()
