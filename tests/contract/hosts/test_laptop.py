"""What only the laptop's loop does: it goes on for ever, whatever one round meets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.contract.hosts.rigs import LaptopRig
from tidegate.control.observed import ServeState
from tidegate.errors import QueueUnavailable

LONG = 30.0  # seconds; nothing here takes one


@pytest.fixture
def rig(tmp_path: Path) -> LaptopRig:
    return LaptopRig(tmp_path)


@asynccontextmanager
async def running(rig: LaptopRig) -> AsyncIterator[None]:
    task = asyncio.create_task(rig.loop.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Once:
    """Answers the first call with an error and all others as ever; `asked` is set by the first."""

    def __init__(self, error: Exception, answer: Callable[[], Awaitable[ServeState]]) -> None:
        self._error: Exception | None = error
        self._answer = answer
        self.asked = asyncio.Event()

    async def __call__(self) -> ServeState:
        error, self._error = self._error, None
        self.asked.set()
        if error is not None:
            raise error
        return await self._answer()


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), QueueUnavailable("Redis is away.")])
async def test_the_loop_outlives_what_one_round_meets(
    rig: LaptopRig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    once = Once(error, rig.serve.get)
    monkeypatch.setattr(rig.serve, "get", once)
    rig.model("one")
    async with running(rig):
        async with asyncio.timeout(LONG):
            await once.asked.wait()
            rig.changed.set()  # or it would pause for a second
            await rig.published.wait()
    assert "one" in rig.store.entries


async def test_a_round_follows_a_change_at_once(rig: LaptopRig) -> None:
    async with running(rig), asyncio.timeout(LONG):
        rig.model("one")
        rig.changed.set()
        await rig.published.wait()
    assert "one" in rig.store.entries
