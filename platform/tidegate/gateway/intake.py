"""Bodies on their way in: how many bytes of them are held at once, and one large one decoded at a time.

A body is held from its first byte until it is decoded and encoded for the queue, which follow each other
without a wait. Small ones are not counted: what they take is bounded by the number of connections.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tidegate.errors import BodiesFull

SMALL_BYTES = 64 * 1024
RETRY_SECONDS = 1.0


class Intake:
    """One per gateway. `most_bytes` bounds all bodies together; one key may hold half of that."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held: Counter[str] = Counter()  # bytes by key
        self.held_bytes = 0
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def body(self, key: str) -> AsyncIterator[Body]:
        body = Body(self, key)
        try:
            yield body
        finally:
            body.count(0)

    def turn(self) -> asyncio.Lock:
        """Hold it to decode a large body: others' events get their turn between two of them."""
        return self._turn


@dataclass(slots=True)
class Body:
    """The bytes of one body."""

    _intake: Intake
    _key: str
    _counted: int = 0

    @property
    def is_large(self) -> bool:
        return self._counted > 0

    def count(self, size_bytes: int) -> None:
        """Note that so many are held now. Raises `BodiesFull`."""
        intake, wanted = self._intake, size_bytes if size_bytes > SMALL_BYTES else 0
        more = wanted - self._counted
        if more > 0:
            if intake.held_bytes + more > intake.most_bytes:
                raise _full(f"The gateway holds {intake.most_bytes} bytes of bodies at most")
            if intake.held[self._key] + more > intake.most_bytes // 2:
                raise _full(f"The gateway holds {intake.most_bytes // 2} bytes of one key's bodies at most")
        intake.held_bytes += more
        intake.held[self._key] += more
        self._counted = wanted
        if not intake.held[self._key]:
            del intake.held[self._key]


def _full(sentence: str) -> BodiesFull:
    return BodiesFull(
        f"{sentence}, and as many are on their way. Send fewer at once, or raise TIDEGATE_BODIES_MAX_BYTES.",
        retry_after_seconds=RETRY_SECONDS,
    )
