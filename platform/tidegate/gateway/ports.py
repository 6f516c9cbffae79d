"""What the gateway asks of the store. `tidegate.store` implements these over Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tidegate.messages import ModelEntry, QueueLimits, Request, Segment


@dataclass(frozen=True, slots=True)
class Bounds:
    """Upper limits that one atomic submit checks, each over waiting and running requests."""

    model: QueueLimits
    tenant_max_requests: int
    tenant_max_bytes: int
    total_max_requests: int
    total_max_bytes: int


@dataclass(frozen=True, slots=True)
class Depth:
    """What a submit found, or a look at a queue gives. `drain_seconds` is the smoothed time between two
    departures while requests waited; 0 where nothing is known yet."""

    waiting: int
    running: int
    drain_seconds: float


@dataclass(frozen=True, slots=True)
class Accepted:
    """All requests of the call are in the queue. `waiting_ahead` counts those in front of its first one."""

    waiting_ahead: int
    depth: Depth


@dataclass(frozen=True, slots=True)
class Rejected:
    """Nothing was written. `bound` says which limit the call would pass."""

    bound: Literal["model", "tenant", "total"]
    unit: Literal["requests", "bytes"]
    limit: int
    depth: Depth


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request waits. `ahead` is None once it no longer waits."""

    ahead: int | None
    depth: Depth


class RequestQueue(Protocol):
    async def start(self, deliver: Callable[[list[Segment]], None], lost: Callable[[], None]) -> None:
        """Register this gateway and begin to receive. `deliver` is called on the event loop with every
        published batch, `lost` after each reconnect: whatever was published meanwhile must be replayed."""
        ...

    async def submit(self, requests: Sequence[Request], bounds: Bounds) -> Accepted | Rejected:
        """One atomic step for all requests of a call. Raises `QueueUnavailable` where Redis is away."""
        ...

    async def cancel(self, request_ids: Sequence[str], reason: str) -> None: ...

    async def replay(self, request_id: str) -> list[Segment] | None:
        """The request's whole log so far; None where the request is not known (any more)."""
        ...

    async def places(self, requests: Sequence[tuple[str, str, str]]) -> list[Place]:
        """For each (request id, model, revision): how many wait in front of it."""
        ...

    async def depth(self, model: str, revision: str) -> Depth: ...

    async def ping(self) -> None:
        """Raises `QueueUnavailable` where Redis does not answer within a second."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as stored: never the secret itself."""

    id: str
    name: str
    tenant: str
    created: float
    revoked: float | None = None
    prefix: str = ""  # first characters of the secret, to recognise it by


class KeyRing(Protocol):
    def find(self, secret: str) -> Key | None:
        """The unrevoked key with this secret. In memory: a snapshot, at most a second behind the store."""
        ...


class ModelRegistry(Protocol):
    def models(self) -> Mapping[str, ModelEntry]:
        """In memory: a snapshot that follows the store within a second."""
        ...
