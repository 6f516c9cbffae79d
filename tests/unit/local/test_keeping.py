"""Restarts are spaced, and a home has one host."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tidegate.errors import ConfigError
from tidegate.local import keeping
from tidegate.local.home import Home
from tidegate.local.keeping import keep_alive, only_one


async def nothing() -> None:
    return None


def failing(times: int, calls: list[str]) -> Callable[[], Awaitable[None]]:
    async def restart() -> None:
        calls.append("restart")
        if len(calls) <= times:
            raise OSError("not yet")

    return restart


async def test_a_part_that_does_not_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "FIRST_BACKOFF_SECONDS", 0.0)
    calls: list[str] = []
    restarts = keep_alive("part", nothing, failing(2, calls))
    await anext(restarts)
    assert len(calls) == 3
    await anext(restarts)
    assert len(calls) == 4


async def test_what_nobody_expects_ends_the_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "FIRST_BACKOFF_SECONDS", 0.0)

    async def restart() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await anext(keep_alive("part", nothing, restart))


def test_a_home_has_one_host(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    with only_one(home), pytest.raises(ConfigError, match="runs with it already"), only_one(home):
        pass
    with only_one(home):
        assert home.lock.exists()
