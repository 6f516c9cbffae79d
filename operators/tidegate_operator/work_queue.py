"""The work queue holds pools to be reconciled: keys coalesce, wait, and are worked on by one worker each.

`Schedule` is the state, pure: every step takes the time. A key waits with the earliest time that was asked
for, is in work, or is unknown. A key that is asked for while it is in work waits again as soon as that work
ends, so no event is lost and no two workers ever hold the same key.

`ReconcileQueue` gives it to tasks of one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

FIRST_BACKOFF_SECONDS = 0.5
CONFLICT_BACKOFF_SECONDS = (
    0.02  # after a conflict the object has been read again: nothing is to be waited for
)
LONGEST_BACKOFF_SECONDS = 8.0  # a change that mends a pool is in its status within 10 s

Key = tuple[str, str]  # (namespace, pool)


class Schedule:
    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._in_work: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._not_before: dict[Key, float] = {}

    def add(self, key: Key, at: float) -> None:
        """Ask for `key` at `at`; an earlier time that is already asked for stays, and so does the pause after
        a failure, or a pool whose pods crash would be worked on without rest."""
        earliest = min(at, self._due.get(key, at))
        self._due[key] = max(earliest, self._not_before.get(key, earliest))

    def take(self, now: float) -> Key | None:
        """Return the key that is longest due and that nobody works on; the caller must `end` it."""
        ready = [(at, key) for key, at in self._due.items() if at <= now and key not in self._in_work]
        if not ready:
            return None
        _, key = min(ready)
        del self._due[key]
        self._in_work.add(key)
        return key

    def end(self, key: Key) -> None:
        """Give a key back after work that went well."""
        self._in_work.discard(key)
        self._failures.pop(key, None)
        self._not_before.pop(key, None)

    def end_failed(self, key: Key, now: float, first_seconds: float = FIRST_BACKOFF_SECONDS) -> float:
        """Give a key back to be tried again after a pause that doubles. Returns the pause in seconds."""
        self._in_work.discard(key)
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        pause = min(LONGEST_BACKOFF_SECONDS, first_seconds * 2.0**failures)
        self._due[key] = self._not_before[key] = now + pause
        return pause

    def next_at(self) -> float | None:
        """Return when the next key becomes due; None: nothing waits."""
        return min((at for key, at in self._due.items() if key not in self._in_work), default=None)

    def __len__(self) -> int:
        """Count the keys that wait, due or not."""
        return len(self._due)


class ReconcileQueue:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._schedule = Schedule()
        self._changed = asyncio.Event()

    def add(self, key: Key, delay_seconds: float = 0.0) -> None:
        self._schedule.add(key, self._clock() + delay_seconds)
        self._changed.set()

    async def take(self) -> Key:
        """Wait for a key that is due. The caller ends it with `end` or `end_failed`."""
        while (key := self._schedule.take(self._clock())) is None:
            self._changed.clear()
            next_at = self._schedule.next_at()
            pause = None if next_at is None else max(0.0, next_at - self._clock())
            try:
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            except TimeoutError:
                continue  # the pause of the next key is over
        if self._schedule.next_at() is not None:
            self._changed.set()  # another worker may have more to do
        return key

    def end(self, key: Key) -> None:
        self._schedule.end(key)
        self._changed.set()

    def end_failed(self, key: Key, first_seconds: float = FIRST_BACKOFF_SECONDS) -> float:
        pause = self._schedule.end_failed(key, self._clock(), first_seconds)
        self._changed.set()
        return pause

    def __len__(self) -> int:
        return len(self._schedule)
