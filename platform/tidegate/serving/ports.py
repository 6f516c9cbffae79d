"""A replica asks this of the store. `tidegate.store` implements these over Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tidegate.messages.registry import ReplicaStats, RevisionReport
from tidegate.messages.work import Claim, Segment


class LeaseQueue(Protocol):
    async def start(self, wake: Callable[[], None], cancelled: Callable[[str], None]) -> None:
        """Register this replica and begin to listen. `wake` is called on the event loop when work may
        wait (also after each reconnect), `cancelled` with the id of a leased request that was cancelled."""
        ...

    async def claim(self, most: int) -> list[Claim]:
        """Lease up to `most` waiting requests, highest priority first, then oldest; of the oldest those first
        whose prompts begin as others that this replica had. What another idle replica had is left to it for
        one claim, and `wake` is called. One atomic step:
        requests past their deadline are expired instead, and at most one suspect of a replica's death
        (see the store's essay) is given out at a time. Raises `QueueUnavailable`."""
        ...

    async def emit(self, segments: Sequence[tuple[int, Segment]], ends: Mapping[str, str]) -> list[str]:
        """Write (attempt, segment) pairs, any number of requests and gateways, in one round trip. Each pair
        is one atomic step, all of them together need not be. A segment with `finish` moves its request to
        the terminal state and releases the lease. It counts as those outcomes (`messages.outcomes`) that
        `ends` has for its id, with spaces between them; nowhere without. Returns the ids whose attempt is no
        longer current (lease lost, cancelled): nothing of theirs was written and the replica must drop them.
        Raises `QueueUnavailable`; then it is unknown what was written, and repeating the call is safe (a
        segment's `seq` is written once)."""
        ...

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[str]:
        """Extend leases of (request id, attempt). Returns the ids that are no longer this replica's."""
        ...

    async def hand_back(self, leases: Sequence[tuple[str, int]], reason: str) -> None:
        """Give requests back to the front of the queue, blameless (draining, engine restart)."""
        ...

    async def fault(self, leases: Sequence[tuple[str, int]], reason: str) -> None:
        """Give requests back as after this replica's death: each counts towards `PoisonRequest`."""
        ...

    async def close(self) -> None: ...


class ReplicaRegistry(Protocol):
    """Replicas say there how they are."""

    async def report(self, report: RevisionReport) -> None: ...

    async def beat(self, stats: ReplicaStats, metrics: bytes = b"") -> None:
        """Publish statistics, and `metrics` of the engine's own (`messages.engine_metrics`) where there are
        newer ones; they vanish by themselves a few seconds after the last beat."""
        ...

    async def gone(self, stats: ReplicaStats) -> None: ...
