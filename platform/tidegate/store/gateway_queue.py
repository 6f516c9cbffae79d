"""The gateway's side of the queue. Implements `tidegate.gateway.ports.RequestQueue`; the essay on what may
interleave is in `tidegate.store.queue`.

Group commit: while one submit is in flight, further ones of this process gather and go together as the next
script call. Under load the cost of a round trip is shared by all that wait for it, without a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from tidegate.errors import QueueUnavailable
from tidegate.gateway.ports import Accepted, Bounds, Depth, Place, Rejected
from tidegate.messages import Request, Segment, decode_segments, encode_request
from tidegate.store import names, scripts
from tidegate.store.connection import Connection
from tidegate.store.depths import depth_of, look
from tidegate.store.sweeper import Sweeper, SweepTimes
from tidegate.store.wire import Argument, ConnectionLost

PING_SECONDS = 1.0
MOST_ARGUMENTS = 6_000  # of one grouped submit: some hundred requests, well under Lua's and Redis' limits
FIELDS_PER_CALL = 7  # of the reply of submit.lua


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
        self._gathered: list[tuple[list[Argument], asyncio.Future[Accepted | Rejected]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._stop_listening: Callable[[], None] = lambda: None

    async def start(self, deliver: Callable[[list[Segment]], None], lost: Callable[[], None]) -> None:
        await self._connection.subscribe(
            names.gateway_channel(self._key_prefix, self._gateway_id),
            lambda blob: deliver(decode_segments(blob)),
        )
        self._stop_listening = self._connection.on_reconnect(lost)
        await self._sweeper.sweep()
        self._sweeper.start()

    async def submit(self, requests: Sequence[Request], bounds: Bounds) -> Accepted | Rejected:
        """One atomic step for all requests of a call, which share model, revision, tenant and gateway.

        Sent again after a broken connection: a request that is already written is found by its id.
        """
        result: asyncio.Future[Accepted | Rejected] = asyncio.get_running_loop().create_future()
        self._gathered.append((_call_arguments(requests, bounds), result))
        if self._committing is None:
            self._committing = asyncio.get_running_loop().create_task(self._commit())
        return await result

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
        self._stop_listening()
        self._connection.unsubscribe(names.gateway_channel(self._key_prefix, self._gateway_id))
        await self._sweeper.close()
        if self._committing is not None:
            self._committing.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # it is cancelled because we ask for it
                await self._committing

    async def _commit(self) -> None:
        """Send what gathered until nothing is left. Exactly one of these runs at a time."""
        group: list[tuple[list[Argument], asyncio.Future[Accepted | Rejected]]] = []
        try:
            while self._gathered:
                group = self._take_group()
                try:
                    reply = await self._send(group)
                except Exception as error:
                    _settle_all(group, error)
                else:
                    for position, (_, result) in enumerate(group):
                        if not result.done():
                            result.set_result(_outcome(reply, position * FIELDS_PER_CALL))
        finally:
            self._committing = None
            gathered, self._gathered = self._gathered, []
            _settle_all(group + gathered, QueueUnavailable("The gateway is closing."))

    def _take_group(self) -> list[tuple[list[Argument], asyncio.Future[Accepted | Rejected]]]:
        """What gathered and is still wanted, in order, up to the size of one script call."""
        size, count = 0, 0
        for arguments, _ in self._gathered:
            if count and size + len(arguments) > MOST_ARGUMENTS:
                break
            size, count = size + len(arguments), count + 1
        group, self._gathered = self._gathered[:count], self._gathered[count:]
        return [(arguments, result) for arguments, result in group if not result.done()]

    async def _send(self, group: list[tuple[list[Argument], asyncio.Future[Accepted | Rejected]]]) -> Any:
        arguments = [argument for call, _ in group for argument in call]
        try:
            return await self._connection.run(scripts.SUBMIT, self._prefix, time.time(), 0, *arguments)
        except ConnectionLost:
            return await self._connection.run(
                scripts.SUBMIT, self._prefix, time.time(), 1, *arguments, repeat=True
            )

    def _ttl_seconds(self) -> int:
        return max(1, round(self._times.result_ttl_seconds))


def _call_arguments(requests: Sequence[Request], bounds: Bounds) -> list[Argument]:
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
    for request in requests:
        body = encode_request(request)
        arguments += (request.id, request.deadline, request.priority, request.cost, len(body), body)
    return arguments


def _outcome(reply: list[Any], base: int) -> Accepted | Rejected:
    is_accepted, ahead, waiting, running, drain, refused, limit = reply[base : base + FIELDS_PER_CALL]
    depth = Depth(waiting, running, float(drain))
    if is_accepted:
        return Accepted(ahead, depth)
    bound, unit = refused.decode().split()
    return Rejected(bound, unit, limit, depth)


def _settle_all(
    group: list[tuple[list[Argument], asyncio.Future[Accepted | Rejected]]], error: Exception
) -> None:
    for _, result in group:
        if not result.done():
            result.set_exception(error)
