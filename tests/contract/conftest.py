from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.contract.queue_rig import Rig, open_rig


@pytest.fixture
async def rig(redis_url: str, key_prefix: str) -> AsyncIterator[Rig]:
    async with open_rig(redis_url, key_prefix) as rig:
        yield rig
