"""The gateway asks this of the store. `tidegate.store` implements it over Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from tidegate.messages.kept import KeptCall
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


class KeptCalls(Protocol):
    """Calls whose answers can be read again, on any gateway. Every method raises `QueueUnavailable`."""

    async def keep(
        self, call: KeptCall, *, seconds: float, linger_seconds: float, tenant_bytes: int, total_bytes: int
    ) -> Literal["", "tenant", "total"]:
        """Keep a call from before its submit until `seconds` after its end. While it runs and nobody reads
        it, it lives for `linger_seconds`, and is then cancelled. Returns whose bytes do not suffice."""
        ...

    async def find(self, call_id: str, tenant: str) -> KeptCall | None: ...

    async def state(self, request_id: str) -> str:
        """Where a request of a kept call is: waiting, running or a terminal state; empty: it is gone."""
        ...

    async def unkeep(self, call_id: str, reason: str) -> None:
        """Remove it before its time; what runs is cancelled."""
        ...

    def following(
        self, call_id: str, deliver: Callable[[list[Segment]], None]
    ) -> AbstractAsyncContextManager[None]:
        """Within it the call is read here: it stays, and `deliver` gets every batch that is published."""
        ...

    async def close(self) -> None: ...


class KeyRing(Protocol):
    def find(self, secret: str) -> Key | None:
        """The unrevoked key with this secret. In memory: a snapshot, at most a second behind the store."""
        ...


class ModelRegistry(Protocol):
    async def engine_metrics(self) -> list[bytes]:
        """What the engines of replicas count under names of their own (`messages.engine_metrics`). Raises
        `QueueUnavailable`."""
        ...

    def models(self) -> Mapping[str, ModelEntry]:
        """In memory: a snapshot that follows the store within a second."""
        ...
