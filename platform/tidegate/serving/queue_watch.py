"""The watch tells autoscaling policies how their queues are: one poll for all of them.

Runs inside the Serve controller, on its event loop, which also starts and stops every replica: nothing here
may make it wait. `latest` returns at once what the last poll found and, where that is older than
`POLL_SECONDS`, starts one poll in the background, for all queues that were asked for lately. There is no
endless task, so nothing is left behind when policies go.

This is a module of its own because Serve pickles a policy's module by value: a global there would be a copy
per policy, while this one is imported, and so shared by all policies of the controller.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from dataclasses import dataclass
from functools import partial

from tidegate.errors import QueueUnavailable
from tidegate.messages.registry import ReplicaStats
from tidegate.replica_args import find_redis_url
from tidegate.store.connection import Connection
from tidegate.store.queue import QueueDepths
from tidegate.store.registry import Registry

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
POLL_TIMEOUT_SECONDS = 0.5
REPLICAS_SECONDS = 1.0  # between looks at the replicas' statistics, which change every two seconds
RECONNECT_SECONDS = 1.0
FORGET_SECONDS = 30.0  # a queue that no policy asked for so long is polled no more

Queue = tuple[str, str]  # model, revision


@dataclass(frozen=True, slots=True)
class Sighting:
    """One queue at one moment. `at` is monotonic seconds; `slots` of one replica, 0 where not known;
    `tokens_total` counts what the replicas that are alive have generated."""

    at: float
    waiting: int
    running: int
    slots: int
    tokens_total: int


@functools.cache
def shared_watch(redis_url: str, key_prefix: str) -> QueueWatch:
    """The one watch of this process for a Redis and prefix."""
    return QueueWatch(redis_url, key_prefix)


class QueueWatch:
    def __init__(self, redis_url: str, key_prefix: str) -> None:
        self._connection = Connection(
            partial(find_redis_url, redis_url),
            name="tidegate-autoscaler",
            patience_seconds=0.05,
            connect_timeout_seconds=POLL_TIMEOUT_SECONDS,
            call_timeout_seconds=2.0,
        )
        self._depths = QueueDepths(self._connection, key_prefix=key_prefix)
        self._registry = Registry(self._connection, key_prefix=key_prefix)
        self._asked: dict[Queue, float] = {}
        self._seen: dict[Queue, Sighting] = {}
        self._slots: dict[Queue, int] = {}
        self._replicas: list[ReplicaStats] = []
        self._replicas_at = 0.0
        self._next_poll = 0.0
        self._poll: asyncio.Task[None] | None = None

    def latest(self, queue: Queue) -> Sighting | None:
        """Return the last sighting of `queue`, None before the first. Never waits. Needs a running loop."""
        now = time.monotonic()
        self._asked[queue] = now
        if self._poll is None and now >= self._next_poll:
            self._next_poll = now + POLL_SECONDS
            self._poll = asyncio.get_running_loop().create_task(self._poll_once())
        return self._seen.get(queue)

    async def close(self) -> None:
        if self._poll is not None:
            await asyncio.wait({self._poll})
        await self._connection.close()

    async def _poll_once(self) -> None:
        try:
            await self._see()
        except QueueUnavailable as error:
            self._next_poll = time.monotonic() + RECONNECT_SECONDS
            log.warning("autoscaling keeps its replicas: %s", error.message)
        except Exception:
            self._next_poll = time.monotonic() + RECONNECT_SECONDS
            log.exception("autoscaling keeps its replicas: the poll failed")
        finally:
            self._poll = None

    async def _see(self) -> None:
        started = time.monotonic()
        self._asked = {queue: at for queue, at in self._asked.items() if started - at < FORGET_SECONDS}
        queues = list(self._asked)
        if started - self._replicas_at >= REPLICAS_SECONDS:
            async with asyncio.timeout(POLL_TIMEOUT_SECONDS):
                self._replicas = await self._registry.replicas()
                if any(not self._slots.get(queue) for queue in queues):
                    reports = await self._registry.reports()
                    self._slots = {queue: report.slots for queue, report in reports.items()}
            self._replicas_at = started
        depths = await self._depths.poll(queues, timeout_seconds=POLL_TIMEOUT_SECONDS)
        seen = {}
        for queue, depth in depths.items():
            alive = [stats for stats in self._replicas if (stats.model, stats.revision) == queue]
            slots = max((stats.slots for stats in alive), default=self._slots.get(queue, 0))
            tokens = sum(stats.tokens_total for stats in alive)
            seen[queue] = Sighting(time.monotonic(), depth.waiting, depth.running, slots, tokens)
        self._seen = seen
