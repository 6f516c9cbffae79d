"""A gateway and replicas on one queue, and requests to send through it."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tidegate.messages.outcomes import Tally
from tidegate.messages.queue import NO_LABEL, Accepted, Bounds, Label, QueueLimits
from tidegate.messages.work import (
    Claim,
    Finish,
    FinishReason,
    Generate,
    Prompt,
    Request,
    Sampling,
    Segment,
    TextPrompt,
    Tokens,
)
from tidegate.replica_args import Times
from tidegate.store.connection import Connection
from tidegate.store.outcomes import OutcomeStore
from tidegate.store.queue import GatewayQueue, ReplicaQueue, Sweeper
from tidegate.store.registry import Registry

MODEL, REVISION = "m", "r1"
QUEUE = f"{MODEL}--{REVISION}"
# Tests sweep by hand: no timer changes anything while they look.
BY_HAND = Times(
    lease_seconds=60.0,
    orphan_seconds=3600,
    sweep_interval_seconds=3600,
    sweep_pause_seconds=3600,
    sweep_grace_seconds=0,
)
_ids = itertools.count()


def bounds(**changes: Any) -> Bounds:
    values: dict[str, Any] = {
        "model": QueueLimits(),
        "key_max_requests": 10_000,
        "key_max_bytes": 1 << 30,
        "tenant_max_requests": 10_000,
        "tenant_max_bytes": 1 << 30,
        "total_max_requests": 10_000,
        "total_max_bytes": 1 << 30,
    }
    return Bounds(**(values | changes))


HELLO = TextPrompt("hello")


def a_request(prompt: Prompt = HELLO, **changes: Any) -> Request:
    now = time.time()
    values: dict[str, Any] = {
        "id": f"cmpl-{next(_ids)}.0",
        "tenant": "default",
        "model": MODEL,
        "revision": REVISION,
        "gateway": "gw",
        "created": now,
        "deadline": now + 60,
        "priority": 0,
        "cost": 10,
        "work": Generate(prompt, changes.pop("sampling", Sampling(seed=1))),
    }
    return Request(**(values | changes))


def a_token(
    request: Request | Claim | str, seq: int, text: str = "x", finish: FinishReason | None = None
) -> Segment:
    if isinstance(request, Claim):
        request = request.request
    request_id = request if isinstance(request, str) else request.id
    return Segment(request_id, seq, output=Tokens([seq], text), finish=Finish(finish) if finish else None)


@dataclass
class Ear:
    """What a gateway hears."""

    segments: list[Segment] = field(default_factory=list)
    losses: int = 0

    def deliver(self, segments: list[Segment]) -> None:
        self.segments += segments

    def lost(self) -> None:
        self.losses += 1

    def of(self, request_id: str) -> list[Segment]:
        return [segment for segment in self.segments if segment.request_id == request_id]

    def finish_of(self, request_id: str) -> Finish | None:
        return next((segment.finish for segment in self.of(request_id) if segment.finish), None)


@dataclass
class Worker:
    """One replica's queue, and what it was told."""

    queue: ReplicaQueue
    wakes: int = 0
    cancelled: list[str] = field(default_factory=list)

    def wake(self) -> None:
        self.wakes += 1


class Rig:
    """Everything on one queue. Each gateway and replica has its own connection, as in real life."""

    def __init__(self, url: str, key_prefix: str, stack: AsyncExitStack) -> None:
        self.url = url
        self.key_prefix = key_prefix
        self._stack = stack
        self._replicas = itertools.count()

    async def connect(self) -> Connection:
        return await self._stack.enter_async_context(Connection(self.url))

    async def gateway(self, name: str = "gw", times: Times = BY_HAND) -> tuple[GatewayQueue, Ear]:
        queue = GatewayQueue(await self.connect(), key_prefix=self.key_prefix, gateway_id=name, times=times)
        ear = Ear()
        await queue.start(ear.deliver, ear.lost)
        self._stack.push_async_callback(queue.close)
        return queue, ear

    async def replica(
        self,
        *,
        model: str = MODEL,
        revision: str = REVISION,
        times: Times = BY_HAND,
    ) -> Worker:
        queue = ReplicaQueue(
            await self.connect(),
            key_prefix=self.key_prefix,
            model=model,
            revision=revision,
            replica_id=f"replica-{next(self._replicas)}",
            times=times,
        )
        worker = Worker(queue)
        await queue.start(worker.wake, worker.cancelled.append)
        self._stack.push_async_callback(queue.close)
        return worker

    async def registry(self) -> Registry:
        return Registry(await self.connect(), key_prefix=self.key_prefix)

    async def outcomes(self, revision: str = REVISION) -> dict[str, Tally]:
        """The outcomes of one revision, by cohort."""
        store = OutcomeStore(await self.connect(), self.key_prefix)
        return (await store.read([(MODEL, revision)]))[MODEL, revision]

    async def sweeper(self, times: Times = BY_HAND) -> Sweeper:
        return Sweeper(await self.connect(), key_prefix=self.key_prefix, times=times)


@asynccontextmanager
async def open_rig(url: str, key_prefix: str) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        yield Rig(url, key_prefix, stack)


async def accept(
    queue: GatewayQueue, *requests: Request, limits: Bounds | None = None, label: Label = NO_LABEL
) -> Accepted:
    outcome = await queue.submit(requests, limits or bounds(), label)
    assert isinstance(outcome, Accepted), outcome
    return outcome
