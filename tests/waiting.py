"""Waiting for conditions. The only place in the tests that sleeps, and never for longer than it must."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

POLL_SECONDS = 0.005

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], timeout: float = 10.0) -> T:
    """The first truthy value of `predicate`. Fails the test after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {_told(predicate)}")
        time.sleep(POLL_SECONDS)
    return value


@overload
async def await_until(predicate: Callable[[], Coroutine[Any, Any, T]], timeout: float = 10.0) -> T: ...
@overload
async def await_until(predicate: Callable[[], T], timeout: float = 10.0) -> T: ...
async def await_until(predicate: Callable[[], Any], timeout: float = 10.0) -> Any:
    """The same on the event loop; `predicate` may be a coroutine function."""
    end = time.monotonic() + timeout
    while True:
        found = predicate()
        value = await found if inspect.isawaitable(found) else found
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {_told(predicate)}")
        await asyncio.sleep(POLL_SECONDS)


def _told(predicate: Callable[[], object]) -> str:
    try:
        return inspect.getsource(predicate).strip()
    except (OSError, TypeError):
        return repr(predicate)
