"""The audit log of a laptop: a file of JSON lines in the home, and the one before it.

Implements `tidegate.control_api.ports.AuditLog`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tidegate.messages.administration import AuditEntry

MOST_BYTES = 4 * 1024 * 1024  # of each of the two files

_encode = msgspec.json.Encoder().encode
_entry = msgspec.json.Decoder(AuditEntry)


class AuditFile:
    """The one writer of its file. A line that was cut off by a crash is skipped."""

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._before = path.with_suffix(".before.jsonl")
        self._now = now
        self._lock = asyncio.Lock()
        self._last: tuple[int, int] | None = None

    async def append(self, entry: AuditEntry) -> None:
        async with self._lock:
            await asyncio.to_thread(self._append, entry)

    async def page(self, before: str, limit: int) -> list[AuditEntry]:
        async with self._lock:
            return await asyncio.to_thread(self._page, before, limit)

    def _append(self, entry: AuditEntry) -> None:
        cut = b""
        if self._last is None:
            newest = self._page("", 1)
            self._last = _number(newest[0].id) if newest else (0, 0)
            cut = b"\n"  # what follows a line that was cut off is a line of its own
        stamp = max(int(self._now() * 1000), self._last[0])  # also where the clock went back
        self._last = (stamp, self._last[1] + 1 if stamp == self._last[0] else 0)
        line = _encode(msgspec.structs.replace(entry, id=f"{self._last[0]}-{self._last[1]}")) + b"\n"
        size = self._path.stat().st_size if self._path.exists() else 0
        if size and size + len(line) > MOST_BYTES:
            self._path.replace(self._before)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(cut + line)

    def _page(self, before: str, limit: int) -> list[AuditEntry]:
        found: list[AuditEntry] = []
        for entry in self._newest_first():
            if not before or _number(entry.id) < _number(before):
                found.append(entry)
            if len(found) == limit:
                break
        return found

    def _newest_first(self) -> Iterator[AuditEntry]:
        for path in (self._path, self._before):
            lines = path.read_bytes().splitlines() if path.exists() else []
            for line in reversed(lines):
                try:
                    yield _entry.decode(line)
                except msgspec.DecodeError:
                    continue


def _number(entry_id: str) -> tuple[int, int]:
    stamp, _, count = entry_id.partition("-")
    return int(stamp), int(count or 0)
