"""The gateway's side of the queue. Implements `tidegate.gateway.ports.RequestQueue`; the essay on what may
interleave is in `tidegate.store.queue`.

Group commit: while submits are in flight, further ones of this process gather and go together as the next
script call. Under load the cost of a script call is shared, without a timer. Where enough have gathered they
do not wait for those in flight: groups follow each other on the connection, in order, so that Redis and the
replica work on one while this process reads the next. Each group is answered, repeated or refused by itself.

Nothing runs for nobody: a call whose caller left while it was in flight, or was told `QueueUnavailable`
although it may have been written, is withdrawn (cancelled) as soon as Redis can be asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from tidegate.errors import QueueFull, QueueUnavailable
from tidegate.messages.codec import decode_segments
from tidegate.messages.queue import NO_LABEL, Accepted, Bounds, Depth, Label, Place, QueueHealth, Rejected
from tidegate.messages.work import Request, Segment
from tidegate.replica_args import Times
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.store.data_watch import DataWatch
from tidegate.store.health import HealthWatch
from tidegate.store.scripts import Scripts, SubmitCall
from tidegate.store.sweeper import Sweeper
from tidegate.store.wire import ConnectionLost
from tidegate.tasks import end_tasks

# Of one grouped submit, so that no script call holds Redis up. A single call may be larger.
MOST_REQUESTS = 500
MOST_BYTES = 4 * 1024 * 1024
ENOUGH_CALLS = 8  # that gathered: they go although others are in flight
MOST_IN_FLIGHT = 4  # groups
MOST_BYTES_ON_THE_WAY = 128 * 1024 * 1024  # one call alone may have more
FULL_RETRY_SECONDS = 1.0
REPLAY_BYTES = 1024 * 1024  # of a log in one reply: over 32 MB Redis ends a connection that hears channels
FORGET_SECONDS = 0.1  # in which answers that were read gather before they leave Redis together
MOST_SHADOWS = 16  # on their way to the queue
MOST_WITHDRAWN = 10_000  # remembered while Redis is away


@dataclass(slots=True)
class _Call:
    """One call of `submit` on its way."""

    encoded: SubmitCall
    result: asyncio.Future[Accepted | Rejected]


class GatewayQueue:
    """Uses `connection`, which its owner opens and closes."""

    def __init__(
        self,
        connection: Connection,
        *,
        key_prefix: str,
        gateway_id: str,
        times: Times,
    ) -> None:
        self._connection = connection
        self._key_prefix = key_prefix
        self._prefix = names.prefix(key_prefix)
        self._scripts = Scripts(connection, key_prefix, times)
        self._gateway_id = gateway_id
        self._sweeper = Sweeper(connection, key_prefix=key_prefix, times=times, gateway=gateway_id)
        self._health = HealthWatch(connection, key_prefix=key_prefix)
        self._data_watch = DataWatch(connection, key_prefix=key_prefix)
        self._gathered: deque[_Call] = deque()
        self._commits: set[asyncio.Task[None]] = set()
        self._bytes_on_the_way = 0  # of the calls that gathered or are in flight
        self._is_commit_due = False  # one of them has yet to take its first group
        self._unwanted: list[str] = []
        self._withdrawing: asyncio.Task[None] | None = None
        self._read: list[str] = []
        self._forgetting: asyncio.Task[None] | None = None
        self._shadows: deque[tuple[str, Request, Bounds, str]] = deque()
        self._shadowing: asyncio.Task[None] | None = None
        self._stop_listening: list[Callable[[], None]] = []

    async def start(self, deliver: Callable[[list[Segment]], None], lost: Callable[[], None]) -> None:
        await self._connection.subscribe(
            names.gateway_channel(self._key_prefix, self._gateway_id),
            lambda blob: deliver(decode_segments(blob)),
        )
        self._stop_listening = [
            self._connection.on_reconnect(lost),
            self._connection.on_reconnect(self._withdraw_soon),
        ]
        await self._data_watch.start()
        await self._sweeper.sweep()
        self._sweeper.start()
        await self._health.look()  # the log names what is wrong with it

    async def submit(
        self, requests: Sequence[Request], bounds: Bounds, label: Label = NO_LABEL
    ) -> Accepted | Rejected:
        """One atomic step for all requests of a call, which share model, revision, tenant and gateway.

        Sent again after a broken connection: a request that is already written is found by its id.
        """
        encoded = SubmitCall.of(requests, bounds, label)
        del requests  # of two forms of a large prompt one is enough while it waits
        if self._bytes_on_the_way and self._bytes_on_the_way + encoded.size_bytes > MOST_BYTES_ON_THE_WAY:
            raise QueueFull(
                f"{self._bytes_on_the_way} bytes of other calls are on their way to the queue.",
                retry_after_seconds=FULL_RETRY_SECONDS,
            )
        call = _Call(encoded, asyncio.get_running_loop().create_future())
        self._gathered.append(call)
        self._bytes_on_the_way += encoded.size_bytes
        if not self._is_commit_due and self._is_group_due(len(self._commits)):
            self._is_commit_due = True
            self._commits.add(asyncio.get_running_loop().create_task(self._commit()))
        return await call.result

    @property
    def takes_shadows(self) -> bool:
        """See `RequestQueue.takes_shadows`."""
        return len(self._shadows) < MOST_SHADOWS

    def shadow(self, original: str, shadow: Request, bounds: Bounds, cohort: str) -> None:
        """See `RequestQueue.shadow`. One after the other, so that clients' submits go in between."""
        self._shadows.append((original, shadow, bounds, cohort))
        if self._shadowing is None or self._shadowing.done():
            self._shadowing = asyncio.get_running_loop().create_task(self._shadow())

    async def cancel(self, request_ids: Sequence[str], reason: str) -> None:
        if request_ids:
            await self._scripts.cancel(request_ids, reason)

    def forget(self, request_ids: Sequence[str]) -> None:
        """See `RequestQueue.forget`. What is lost here goes when its time to live is over."""
        self._read += request_ids[: MOST_WITHDRAWN - len(self._read)]
        if self._read and (self._forgetting is None or self._forgetting.done()):
            self._forgetting = asyncio.get_running_loop().create_task(self._forget())

    async def replay(self, request_id: str, from_seq: int = 0) -> list[Segment] | None:
        log = bytearray()
        while len(log) % REPLAY_BYTES == 0:  # the last piece was whole
            end = len(log) + REPLAY_BYTES - 1
            piece = await self._connection.call(
                "GETRANGE", f"{self._prefix}log:{request_id}", len(log), end, repeat=True
            )
            if not piece:
                break
            log += piece
        if not log and not await self._connection.call(
            "EXISTS", f"{self._prefix}req:{request_id}", repeat=True
        ):
            return None
        return decode_segments(log, from_seq)

    async def places(self, requests: Sequence[tuple[str, str, str]]) -> list[Place]:
        waiting = [(request_id, names.queue_name(*queue)) for request_id, *queue in requests]
        _, places = await self._scripts.depths(list(dict.fromkeys(queue for _, queue in waiting)), waiting)
        return places

    async def depth(self, model: str, revision: str) -> Depth:
        queue = names.queue_name(model, revision)
        depths, _ = await self._scripts.depths([queue])
        return depths[queue]

    async def health(self) -> QueueHealth:
        return await self._health.look()

    async def close(self) -> None:
        for stop in self._stop_listening:
            stop()
        self._connection.unsubscribe(names.gateway_channel(self._key_prefix, self._gateway_id))
        await self._health.close()
        await self._data_watch.close()
        await self._sweeper.close()
        await end_tasks(*self._commits, self._withdrawing, self._forgetting, self._shadowing)
        self._refuse(self._gathered, QueueUnavailable("The gateway is closing."))
        self._gathered.clear()

    def _is_group_due(self, in_flight: int) -> bool:
        return not in_flight or (in_flight < MOST_IN_FLIGHT and len(self._gathered) >= ENOUGH_CALLS)

    async def _commit(self) -> None:
        """Send what gathered, group by group, until nothing is left or it may wait for others in flight."""
        group: list[_Call] = []
        try:
            while self._gathered and self._is_group_due(len(self._commits) - 1):
                self._is_commit_due = False
                group = self._take_group()
                try:
                    outcomes = await self._send(group)
                except Exception as error:
                    self._refuse(group, error)
                else:
                    self._answer(group, outcomes)
                group = []
        finally:
            self._is_commit_due = False
            self._commits.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            self._refuse(group, QueueUnavailable("The gateway is closing."))

    def _take_group(self) -> list[_Call]:
        """Take the calls that gathered and are still wanted, in order, up to the size of one script call."""
        group: list[_Call] = []
        count = size_bytes = 0
        while self._gathered:
            call = self._gathered[0]
            count += len(call.encoded.request_ids)
            size_bytes += call.encoded.size_bytes
            if group and (count > MOST_REQUESTS or size_bytes > MOST_BYTES):
                break
            self._gathered.popleft()
            if call.result.done():
                self._bytes_on_the_way -= call.encoded.size_bytes
            else:
                group.append(call)
        return group

    async def _send(self, group: list[_Call]) -> list[Accepted | Rejected]:
        if not group:
            return []
        calls = [call.encoded for call in group]
        outcomes = await self._submit(calls)
        # Clients before shadows.
        wanted = {
            calls[at].queue if outcome.bound == "model" else ""
            for at, outcome in enumerate(outcomes)
            if isinstance(outcome, Rejected) and outcome.has_shadows and outcome.bound in ("model", "total")
        }
        if not wanted or not await self._scripts.give_way(wanted):
            return outcomes
        refused = [at for at, outcome in enumerate(outcomes) if isinstance(outcome, Rejected)]
        for at, outcome in zip(refused, await self._submit([calls[at] for at in refused]), strict=True):
            outcomes[at] = outcome
        return outcomes

    async def _submit(self, calls: list[SubmitCall]) -> list[Accepted | Rejected]:
        try:
            return await self._scripts.submit(calls, now=time.time())
        except ConnectionLost:
            return await self._scripts.submit(calls, now=time.time(), is_repeat=True)

    def _answer(self, group: list[_Call], outcomes: list[Accepted | Rejected]) -> None:
        for call, outcome in zip(group, outcomes, strict=True):
            self._bytes_on_the_way -= call.encoded.size_bytes
            if not call.result.done():
                call.result.set_result(outcome)
            elif isinstance(outcome, Accepted):
                self._unwanted += call.encoded.request_ids
                self._withdraw_soon()

    def _refuse(self, group: Iterable[_Call], error: Exception) -> None:
        for call in group:
            self._bytes_on_the_way -= call.encoded.size_bytes
            if len(self._unwanted) < MOST_WITHDRAWN:
                self._unwanted += call.encoded.request_ids
            if not call.result.done():
                call.result.set_exception(error)

    async def _shadow(self) -> None:
        while self._shadows:
            with contextlib.suppress(QueueUnavailable, ConnectionLost):
                await self._scripts.shadow(*self._shadows.popleft())

    async def _forget(self) -> None:
        while self._read:
            await asyncio.sleep(FORGET_SECONDS)
            read, self._read = self._read, []
            with contextlib.suppress(QueueUnavailable):
                for at in range(0, len(read), MOST_REQUESTS):
                    await self._scripts.forget(read[at : at + MOST_REQUESTS])

    def _withdraw_soon(self) -> None:
        if self._unwanted and (self._withdrawing is None or self._withdrawing.done()):
            self._withdrawing = asyncio.get_running_loop().create_task(self._withdraw())

    async def _withdraw(self) -> None:
        while self._unwanted:
            now, self._unwanted = self._unwanted[:MOST_REQUESTS], self._unwanted[MOST_REQUESTS:]
            try:
                await self.cancel(now, "The client left before the request was accepted.")
            except QueueUnavailable:
                self._unwanted += now
                return  # the next reconnect tries again
