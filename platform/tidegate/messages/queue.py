"""Questions that a gateway asks a queue, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec


class QueueLimits(msgspec.Struct, frozen=True):
    """Bounds of one model's queue (waiting and running together)."""

    max_requests: int = 1000
    max_bytes: int = 64 * 1024 * 1024
    max_wait_seconds: float = 300.0


QueueState = Literal["ok", "slow", "full", "read-only", "away"]
_STATES: dict[QueueState, str] = {
    "slow": "The queue's Redis takes longer than a second to answer.",
    "full": "The queue's Redis has no memory left (maxmemory): what is new is refused.",
    "read-only": "The queue's Redis takes no writes now: what is new is refused.",
    "away": "The queue's Redis cannot be used now; the log says why.",
}


@dataclass(frozen=True, slots=True)
class QueueHealth:
    """The queue's Redis as it was found. `eviction`: its `maxmemory-policy`, where that may evict."""

    state: QueueState = "ok"
    eviction: str = ""

    @property
    def takes_requests(self) -> bool:
        return self.state in ("ok", "slow")

    def troubles(self) -> dict[str, str]:
        """A sentence for each thing that is not as it should be, by a word for it."""
        found = {} if self.state == "ok" else {"redis": _STATES[self.state]}
        if self.eviction:
            found["maxmemory-policy"] = (
                f"The queue's Redis may evict requests: its maxmemory-policy is {self.eviction}. "
                "Set it to noeviction."
            )
        return found


@dataclass(frozen=True, slots=True)
class Bounds:
    """Upper limits that one atomic submit checks, each over waiting and running requests and what those that
    run have written. `key_...`: what one key may hold of the model's queue."""

    model: QueueLimits
    key_max_requests: int
    key_max_bytes: int
    tenant_max_requests: int
    tenant_max_bytes: int
    total_max_requests: int
    total_max_bytes: int


@dataclass(frozen=True, slots=True)
class Label:
    """The ends of a call's requests are counted by this (`messages.outcomes`). `session`: of its errors one
    counts in an hour. Where it is shadowed, the end of its first request waits for that of the shadow."""

    cohort: str = ""
    session: str = ""
    is_shadowed: bool = False


NO_LABEL = Label()


@dataclass(frozen=True, slots=True)
class Depth:
    """The depth of a queue as a submit found it, or as it was read.

    `drain_seconds` is the smoothed time between two departures while requests waited; 0 where nothing is
    known yet.
    """

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

    bound: Literal["model", "key", "tenant", "total"]
    unit: Literal["requests", "bytes"]
    limit: int
    depth: Depth
    has_shadows: bool = False  # that could give way


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a request. `ahead` is None once it no longer waits."""

    ahead: int | None
    depth: Depth
