"""The replica's side of the queue. Implements `tidegate.serving.ports.LeaseQueue`; the essay on what may
interleave is in `tidegate.store.queue`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tidegate.messages.codec import decode_request, decode_segments, encode_segment, frame
from tidegate.messages.work import Claim, Segment
from tidegate.store import names, scripts
from tidegate.store.connection import Connection
from tidegate.store.sweeper import Sweeper, SweepTimes
from tidegate.store.wire import Argument

SEGMENTS_PER_SCRIPT = 32
RECORD_SECONDS = 3600  # a replica's own record outlives its leases by far, and no longer


class ReplicaQueue:
    """Uses `connection`, which its owner opens and closes. `replica_id` names one process, never two."""

    def __init__(
        self,
        connection: Connection,
        *,
        key_prefix: str,
        model: str,
        revision: str,
        replica_id: str,
        lease_seconds: float = 6.0,
        result_ttl_seconds: float = 60.0,
        orphan_seconds: float = 120.0,
        times: SweepTimes | None = None,
    ) -> None:
        self._connection = connection
        self._prefix = names.prefix(key_prefix)
        self._queue = names.queue_name(model, revision)
        self._replica_id = replica_id
        self._lease_seconds = lease_seconds
        self._times = times or SweepTimes(
            orphan_seconds=orphan_seconds, result_ttl_seconds=result_ttl_seconds
        )
        self._wake_channel = names.wake_channel(key_prefix, self._queue)
        self._own_channel = names.replica_channel(key_prefix, replica_id)
        self._sweeper: Sweeper | None = None
        self._stop_listening: Callable[[], None] = lambda: None
        self._claim_number = 1

    async def start(self, wake: Callable[[], None], cancelled: Callable[[str], None]) -> None:
        def dropped(ids: bytes) -> None:
            for request_id in ids.decode().split():
                cancelled(request_id)

        await self._connection.subscribe(self._own_channel, dropped)
        await self._connection.subscribe(self._wake_channel, lambda _: wake())
        self._stop_listening = self._connection.on_reconnect(wake)
        self._sweeper = Sweeper(
            self._connection, self._prefix, times=self._times, queue=self._queue, work_waits=wake
        )
        self._sweeper.start()
        wake()  # what came before the subscription was announced to nobody

    async def claim(self, most: int) -> list[Claim]:
        """See `LeaseQueue.claim`. Where a reply is lost (broken connection, cancelled caller), the next call
        carries the same number and gets the same requests: none is leased to a replica that never saw it."""
        if most < 1:
            return []
        reply = await self._connection.run(
            scripts.CLAIM,
            self._prefix,
            self._queue,
            self._replica_id,
            self._claim_number,
            most,
            self._lease_seconds,
            self._ttl_seconds(),
            RECORD_SECONDS,
            repeat=True,
        )
        self._claim_number += 1
        claims = [Claim(decode_request(body), attempt, decode_segments(log)) for attempt, body, log in reply]
        if too_many := claims[most:]:  # a repeated claim that once asked for more
            await self.hand_back([(claim.request.id, claim.attempt) for claim in too_many], "no free slot")
        return claims[:most]

    async def emit(self, segments: Sequence[tuple[int, Segment]]) -> list[str]:
        """See `LeaseQueue.emit`. Several script calls, sent in one write: gateways take up what the first of
        them published while Redis works on the next."""
        if len(segments) <= SEGMENTS_PER_SCRIPT:
            return await self._emit(segments)
        parts = [
            segments[at : at + SEGMENTS_PER_SCRIPT] for at in range(0, len(segments), SEGMENTS_PER_SCRIPT)
        ]
        # Who calls again after an error does so when nothing of this call is on its way any more.
        lost: list[str] = []
        for result in await asyncio.gather(*map(self._emit, parts), return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
            lost += result
        return lost

    async def _emit(self, segments: Sequence[tuple[int, Segment]]) -> list[str]:
        if not segments:
            return []
        arguments: list[Argument] = []
        for attempt, segment in segments:
            finish = segment.finish
            arguments += (
                segment.request_id,
                attempt,
                segment.seq,
                finish.reason if finish is not None else "",
                frame(encode_segment(segment)),
            )
        return await self._ids(scripts.EMIT, self._ttl_seconds(), self._replica_id, *arguments)

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[str]:
        if not leases:
            return []
        return await self._ids(
            scripts.RENEW, self._replica_id, self._lease_seconds, RECORD_SECONDS, *_flat(leases)
        )

    async def hand_back(self, leases: Sequence[tuple[str, int]], reason: str) -> None:
        await self._release(leases, 0, reason)

    async def fault(self, leases: Sequence[tuple[str, int]], reason: str) -> None:
        """See `LeaseQueue.fault`. All leases that the failure ended belong in one call: a suspect among them
        takes the blame for the others."""
        await self._release(leases, 1, reason)

    async def close(self) -> None:
        self._stop_listening()
        self._connection.unsubscribe(self._wake_channel)
        self._connection.unsubscribe(self._own_channel)
        if self._sweeper is not None:
            await self._sweeper.close()

    async def _release(self, leases: Sequence[tuple[str, int]], is_fault: int, reason: str) -> None:
        if leases:
            await self._connection.run(
                scripts.RELEASE,
                self._prefix,
                self._replica_id,
                is_fault,
                reason,
                self._ttl_seconds(),
                *_flat(leases),
                repeat=True,
            )

    async def _ids(self, script: scripts.Script, *arguments: Argument) -> list[str]:
        reply: list[bytes] = await self._connection.run(script, self._prefix, *arguments, repeat=True)
        return [request_id.decode() for request_id in reply]

    def _ttl_seconds(self) -> int:
        return max(1, round(self._times.result_ttl_seconds))


def _flat(leases: Sequence[tuple[str, int]]) -> list[Argument]:
    return [part for lease in leases for part in lease]
