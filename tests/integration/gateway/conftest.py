"""One gateway over the session's Redis, for tests that need nothing special."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.gateway.rig import Gateway, open_gateway


@pytest.fixture
async def gateway(redis_url: str, key_prefix: str) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, key_prefix) as gateway:
        yield gateway
