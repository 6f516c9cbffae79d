"""The gateway asks this of the store. `tidegate.store` implements it over Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tidegate.messages.queue import Accepted, Bounds, Depth, Label, Place, QueueHealth, Rejected
from tidegate.messages.registry import Key, ModelEntry
from tidegate.messages.work import Request, Segment


class RequestQueue(Protocol):
    async def start(self, deliver: Callable[[list[Segment]], None], lost: Callable[[], None]) -> None:
        """Register this gateway and begin to receive. `deliver` is called on the event loop with every
        published batch, `lost` after each reconnect: whatever was published meanwhile must be replayed."""
        ...

    async def submit(self, requests: Sequence[Request], bounds: Bounds, label: Label) -> Accepted | Rejected:
        """One atomic step for all requests of a call. Raises `QueueUnavailable` where Redis is away."""
        ...

    @property
    def takes_shadows(self) -> bool:
        """False while too many are on their way. Asked before the submit of what is to be shadowed."""
        ...

    def shadow(self, original: str, shadow: Request, bounds: Bounds, cohort: str) -> None:
        """Send a copy of the accepted request `original` to another revision; its answer is thrown away. It
        comes behind every client, takes at most half of any bound, and is dropped in silence where that is
        full, or where a client wants its place."""
        ...

    async def cancel(self, request_ids: Sequence[str], reason: str) -> None: ...

    def forget(self, request_ids: Sequence[str]) -> None:
        """Nobody reads these requests any more: what has ended of them need not be kept."""
        ...

    async def replay(self, request_id: str, from_seq: int = 0) -> list[Segment] | None:
        """The request's log so far, from the segment `from_seq` on; None where nobody knows it (any more)."""
        ...

    async def places(self, requests: Sequence[tuple[str, str, str]]) -> list[Place]:
        """For each (request id, model, revision): how many wait in front of it."""
        ...

    async def depth(self, model: str, revision: str) -> Depth: ...

    async def health(self) -> QueueHealth:
        """Say within two seconds what the queue can do now. Nothing is asked twice within a second."""
        ...

    async def close(self) -> None: ...


class KeyRing(Protocol):
    def find(self, secret: str) -> Key | None:
        """The unrevoked key with this secret. In memory: a snapshot, at most a second behind the store."""
        ...


class ModelRegistry(Protocol):
    def models(self) -> Mapping[str, ModelEntry]:
        """In memory: a snapshot that follows the store within a second."""
        ...
