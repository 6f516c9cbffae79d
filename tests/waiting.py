"""Waiting for conditions. The only place in the tests that sleeps, and never for longer than it must."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

POLL_SECONDS = 0.005
# So that looking takes little from what is waited for, which may have to share two cores with it.
LOOKING_SHARE = 1 / 4  # of the time
PAUSE_SHARE = 1 / 50  # of what was waited already
MOST_PAUSE_SECONDS = 0.25

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], timeout: float = 10.0) -> T:
    """The first truthy value of `predicate`. Fails the test after `timeout` seconds."""
    began = time.monotonic()
    while True:
        looked = time.monotonic()
        if value := predicate():
            return value
        time.sleep(_pause(predicate, began, looked, timeout))


@overload
async def await_until(predicate: Callable[[], Coroutine[Any, Any, T]], timeout: float = 10.0) -> T: ...
@overload
async def await_until(predicate: Callable[[], T], timeout: float = 10.0) -> T: ...
async def await_until(predicate: Callable[[], Any], timeout: float = 10.0) -> Any:
    """The same on the event loop; `predicate` may be a coroutine function."""
    began = time.monotonic()
    while True:
        looked = time.monotonic()
        found = predicate()
        value = await found if inspect.isawaitable(found) else found
        if value:
            return value
        await asyncio.sleep(_pause(predicate, began, looked, timeout))


def _pause(predicate: Callable[[], object], began: float, looked: float, timeout: float) -> float:
    """Seconds until the next look."""
    now = time.monotonic()
    if now > began + timeout:
        raise AssertionError(f"not within {timeout} s: {_told(predicate)}")
    resting = (now - looked) * (1 / LOOKING_SHARE - 1)
    return min(MOST_PAUSE_SECONDS, max(POLL_SECONDS, resting, (now - began) * PAUSE_SHARE))


def _told(predicate: Callable[[], object]) -> str:
    try:
        return inspect.getsource(predicate).strip()
    except (OSError, TypeError):
        return repr(predicate)
