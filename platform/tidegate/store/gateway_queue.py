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
from typing import Any, cast

from tidegate.errors import QueueUnavailable
from tidegate.messages.codec import decode_segments, encode_request
from tidegate.messages.queue import Accepted, Bounds, Depth, Place, Rejected
from tidegate.messages.work import Request, Segment
from tidegate.store import names, scripts
from tidegate.store.connection import Connection
from tidegate.store.depths import depth_of, look
from tidegate.store.sweeper import Sweeper, SweepTimes
from tidegate.store.wire import Argument, ConnectionLost

PING_SECONDS = 1.0
# Of one grouped submit, so that no script call holds Redis up. A single call may be larger.
MOST_REQUESTS = 500
MOST_BYTES = 4 * 1024 * 1024
ENOUGH_CALLS = 8  # that gathered: they go although others are in flight
MOST_IN_FLIGHT = 4  # groups
MOST_WITHDRAWN = 10_000  # remembered while Redis is away
FIELDS_PER_CALL = 7  # of the reply of submit.lua


@dataclass(slots=True)
class _Call:
    """One call of `submit` on its way."""

    request_ids: list[str]
    size_bytes: int
    arguments: list[Argument]
    result: asyncio.Future[Accepted | Rejected]


class GatewayQueue:
    """Uses `connection`, which its owner opens and closes."""

    def __init__(
        self,
        connection: Connection,
        *,
        key_prefix: str,
        gateway_id: str,
        result_ttl_seconds: float = 60.0,
        orphan_seconds: float = 120.0,
        times: SweepTimes | None = None,
    ) -> None:
        self._connection = connection
        self._key_prefix = key_prefix
        self._prefix = names.prefix(key_prefix)
        self._gateway_id = gateway_id
        self._times = times or SweepTimes(
            orphan_seconds=orphan_seconds, result_ttl_seconds=result_ttl_seconds
        )
        self._sweeper = Sweeper(connection, self._prefix, times=self._times, gateway=gateway_id)
        self._gathered: deque[_Call] = deque()
        self._commits: set[asyncio.Task[None]] = set()
        self._is_commit_due = False  # one of them has yet to take its first group
        self._unwanted: list[str] = []
        self._withdrawing: asyncio.Task[None] | None = None
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
        await self._sweeper.sweep()
        self._sweeper.start()

    async def submit(self, requests: Sequence[Request], bounds: Bounds) -> Accepted | Rejected:
        """One atomic step for all requests of a call, which share model, revision, tenant and gateway.

        Sent again after a broken connection: a request that is already written is found by its id.
        """
        call = _call(requests, bounds)
        self._gathered.append(call)
        if not self._is_commit_due and self._is_group_due(len(self._commits)):
            self._is_commit_due = True
            self._commits.add(asyncio.get_running_loop().create_task(self._commit()))
        return await call.result

    async def cancel(self, request_ids: Sequence[str], reason: str) -> None:
        if request_ids:
            ttl = self._ttl_seconds()
            await self._connection.run(scripts.CANCEL, self._prefix, reason, ttl, *request_ids, repeat=True)

    async def replay(self, request_id: str) -> list[Segment] | None:
        log, exists = await asyncio.gather(
            self._connection.call("GET", f"{self._prefix}log:{request_id}", repeat=True),
            self._connection.call("EXISTS", f"{self._prefix}req:{request_id}", repeat=True),
        )
        if log is None:
            return [] if exists else None
        return decode_segments(log)

    async def places(self, requests: Sequence[tuple[str, str, str]]) -> list[Place]:
        queues = list(dict.fromkeys(names.queue_name(model, revision) for _, model, revision in requests))
        index = {queue: position + 1 for position, queue in enumerate(queues)}
        pairs: list[Argument] = []
        for request_id, model, revision in requests:
            pairs += (request_id, index[names.queue_name(model, revision)])
        reply = await look(self._connection, self._prefix, queues, pairs)
        ranks = reply[3 * len(queues) :]
        return [
            Place(None if rank < 0 else int(rank), depth_of(reply, cast(int, at) - 1))
            for rank, at in zip(ranks, pairs[1::2], strict=True)
        ]

    async def depth(self, model: str, revision: str) -> Depth:
        return depth_of(await look(self._connection, self._prefix, [names.queue_name(model, revision)]), 0)

    async def ping(self) -> None:
        try:
            async with asyncio.timeout(PING_SECONDS):
                await self._connection.call("PING")
        except TimeoutError as error:
            raise QueueUnavailable("Redis does not answer within a second.") from error

    async def close(self) -> None:
        for stop in self._stop_listening:
            stop()
        self._connection.unsubscribe(names.gateway_channel(self._key_prefix, self._gateway_id))
        await self._sweeper.close()
        for task in (*self._commits, self._withdrawing):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):  # it is cancelled because we ask for it
                    await task
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
                    reply = await self._send(group)
                except Exception as error:
                    self._refuse(group, error)
                else:
                    self._answer(group, reply)
                group = []
        finally:
            self._is_commit_due = False
            self._commits.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            self._refuse(group, QueueUnavailable("The gateway is closing."))

    def _take_group(self) -> list[_Call]:
        """What gathered and is still wanted, in order, up to the size of one script call."""
        group: list[_Call] = []
        count = size_bytes = 0
        while self._gathered:
            call = self._gathered[0]
            count, size_bytes = count + len(call.request_ids), size_bytes + call.size_bytes
            if group and (count > MOST_REQUESTS or size_bytes > MOST_BYTES):
                break
            self._gathered.popleft()
            if not call.result.done():
                group.append(call)
        return group

    async def _send(self, group: list[_Call]) -> list[Any]:
        """The reply of submit.lua to all calls of the group."""
        if not group:
            return []
        arguments = [argument for call in group for argument in call.arguments]
        reply: list[Any]
        try:
            reply = await self._connection.run(scripts.SUBMIT, self._prefix, time.time(), 0, *arguments)
        except ConnectionLost:
            reply = await self._connection.run(
                scripts.SUBMIT, self._prefix, time.time(), 1, *arguments, repeat=True
            )
        return reply

    def _answer(self, group: list[_Call], reply: list[Any]) -> None:
        for position, call in enumerate(group):
            outcome = _outcome(reply, position * FIELDS_PER_CALL)
            if not call.result.done():
                call.result.set_result(outcome)
            elif isinstance(outcome, Accepted):
                self._unwanted += call.request_ids
                self._withdraw_soon()

    def _refuse(self, group: Iterable[_Call], error: Exception) -> None:
        for call in group:
            if len(self._unwanted) < MOST_WITHDRAWN:
                self._unwanted += call.request_ids
            if not call.result.done():
                call.result.set_exception(error)

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

    def _ttl_seconds(self) -> int:
        return max(1, round(self._times.result_ttl_seconds))


def _call(requests: Sequence[Request], bounds: Bounds) -> _Call:
    first = requests[0]
    arguments: list[Argument] = [
        len(requests),
        names.queue_name(first.model, first.revision),
        first.tenant,
        first.gateway,
        bounds.model.max_requests,
        bounds.model.max_bytes,
        bounds.tenant_max_requests,
        bounds.tenant_max_bytes,
        bounds.total_max_requests,
        bounds.total_max_bytes,
    ]
    size_bytes = 0
    for request in requests:
        body = encode_request(request)
        size_bytes += len(body)
        arguments += (request.id, request.deadline, request.priority, request.cost, len(body), body)
    result: asyncio.Future[Accepted | Rejected] = asyncio.get_running_loop().create_future()
    return _Call([request.id for request in requests], size_bytes, arguments, result)


def _outcome(reply: list[Any], base: int) -> Accepted | Rejected:
    is_accepted, ahead, waiting, running, drain, refused, limit = reply[base : base + FIELDS_PER_CALL]
    depth = Depth(waiting, running, float(drain))
    if is_accepted:
        return Accepted(ahead, depth)
    bound, unit = refused.decode().split()
    return Rejected(bound, unit, limit, depth)
