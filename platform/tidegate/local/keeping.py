"""Keeping parts alive, keeping a home to one host, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import IO

from tidegate.errors import ConfigError, FieldProblem, TidegateError
from tidegate.local import processes
from tidegate.local.home import Home, read_record

log = logging.getLogger("tidegate.local")

FIRST_BACKOFF_SECONDS = 0.5
DYING_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a part that ran so long starts with the first backoff again


async def keep_alive(
    part: str, died: Callable[[], Awaitable[None]], restart: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Start a part again whenever it has died, ever more slowly while that does not help; yields after each
    restart. `died` returns when it has, `restart` raises where it could not."""
    backoff = FIRST_BACKOFF_SECONDS
    clock = asyncio.get_running_loop().time
    while True:
        began = clock()
        await died()
        if clock() - began > STEADY_SECONDS:
            backoff = FIRST_BACKOFF_SECONDS
        is_back = False
        while not is_back:
            await asyncio.sleep(backoff)
            backoff = min(LONGEST_BACKOFF_SECONDS, backoff * 2)
            try:
                await restart()
                is_back = True
            except (TidegateError, OSError) as error:
                log.error("%s does not start: %s", part, error)
        log.error("%s had died and was started again", part)
        yield


@contextmanager
def only_one(home: Home) -> Iterator[None]:
    """Holds the lock of a home. Raises `ConfigError` where a host runs with it already."""
    with home.lock.open("w") as file:
        try:
            _lock(file)
        except OSError as error:
            running = read_record(home)
            who = f" (process {running.host.pid})" if running is not None else ""
            problem = FieldProblem(
                "TIDEGATE_HOME", str(home.root), f"a host runs with it already{who}; `tidegate down`"
            )
            raise ConfigError(str(problem), [problem]) from error
        yield


def _lock(file: IO[str]) -> None:
    """A killed host's threads hold its files for a moment after it is known to be dead."""
    until = time.monotonic() + DYING_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)
        else:
            return


def leave_nothing(home: Home) -> None:
    """End every process of this home but the caller, and remove its temporary files. Blocks."""
    # Ray dies at once: its orderly end takes long, and the gateway has cancelled what it was asked for.
    processes.end(home.instance, "ray", grace_seconds=0.0)
    processes.end(home.instance, grace_seconds=5.0)
    shutil.rmtree(home.temporary, ignore_errors=True)
