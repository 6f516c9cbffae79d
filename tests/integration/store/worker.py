"""A replica as a process of its own, to be killed, stopped and continued: `python -m ... URL PREFIX NAME`.

Its engine writes the numbers 0, 1, 2, ... up to each request's `max_tokens`, one per step, and continues from
the log as a real one does. It prints `claimed ID` and `stale ID`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tests.engine_requests import sampling_of
from tidegate.errors import QueueUnavailable
from tidegate.messages.work import Claim, Finish, Segment, Tokens
from tidegate.replica_args import Times
from tidegate.store.connection import Connection
from tidegate.store.queue import ReplicaQueue

Argument = TypeVar("Argument")
Result = TypeVar("Result")

SLOTS = 8
STEP_SECONDS = 0.004
TIMES = Times(
    lease_seconds=0.6,
    orphan_seconds=60,
    sweep_interval_seconds=0.2,
    sweep_pause_seconds=1.5,
    sweep_grace_seconds=1.0,
)


def text_of(number: int) -> str:
    return f"{number} "


class Running:
    def __init__(self, claim: Claim) -> None:
        self.attempt = claim.attempt
        self._id = claim.request.id
        self._next = len(claim.log)
        self._last = (sampling_of(claim.request).max_tokens or 1) - 1

    def step(self) -> tuple[int, Segment]:
        number = self._next
        self._next += 1
        finish = Finish("length") if number == self._last else None
        return self.attempt, Segment(
            self._id, number, output=Tokens([number], text_of(number)), finish=finish
        )


async def serve(queue: ReplicaQueue) -> None:
    woken = asyncio.Event()
    running: dict[str, Running] = {}

    def drop(request_id: str) -> None:
        running.pop(request_id, None)

    await queue.start(woken.set, drop)
    renewed, loop = 0.0, asyncio.get_running_loop()
    while True:
        if woken.is_set() and len(running) < SLOTS:
            asked = SLOTS - len(running)
            claims = await again(queue.claim, asked)
            if len(claims) < asked:
                woken.clear()
            for claim in claims:
                running[claim.request.id] = Running(claim)
                print("claimed", claim.request.id, flush=True)
        segments = [request.step() for request in running.values()]
        for stale in await again(queue.emit, segments):
            running.pop(stale, None)
            print("stale", stale, flush=True)
        for _, segment in segments:
            if segment.finish is not None:
                running.pop(segment.request_id, None)
                woken.set()
        if running and loop.time() - renewed > TIMES.lease_seconds / 4:
            renewed = loop.time()
            # What is lost is dropped when it is written: the tests want to see that write refused.
            await again(queue.renew, [(key, value.attempt) for key, value in running.items()])
        with contextlib.suppress(TimeoutError):  # the step's time, or at rest a wait for work
            await asyncio.wait_for(asyncio.Event().wait() if running else woken.wait(), STEP_SECONDS)


async def again(call: Callable[[Argument], Awaitable[Result]], argument: Argument) -> Result:
    """Repeat while Redis is away: every call of a replica may be repeated."""
    while True:
        try:
            return await call(argument)
        except QueueUnavailable:
            continue


async def main(url: str, key_prefix: str, name: str) -> None:
    async with Connection(url, name=name) as connection:
        await serve(
            ReplicaQueue(
                connection,
                key_prefix=key_prefix,
                model="m",
                revision="r1",
                replica_id=name,
                times=TIMES,
            )
        )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
