"""The replica's side of the queue. Implements `tidegate.serving.ports.LeaseQueue`; the essay on what may
interleave is in `tidegate.store.queue`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from tidegate.messages.work import Claim, Segment
from tidegate.replica_args import Times
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.store.scripts import Scripts
from tidegate.store.sweeper import Sweeper

SEGMENTS_PER_SCRIPT = 32
NOWHERE: Mapping[str, str] = MappingProxyType({})


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
        times: Times,
    ) -> None:
        self._connection = connection
        self._key_prefix = key_prefix
        self._scripts = Scripts(connection, key_prefix, times)
        self._queue = names.queue_name(model, revision)
        self._replica_id = replica_id
        self._times = times
        self._wake_channel = names.wake_channel(key_prefix, self._queue)
        self._own_channel = names.replica_channel(key_prefix, replica_id)
        self._sweeper: Sweeper | None = None
        self._stop_listening: Callable[[], None] = lambda: None
        self._claim_number = 1
        self._takes_all = False
        self._wake: Callable[[], None] = lambda: None

    async def start(self, wake: Callable[[], None], cancelled: Callable[[str], None]) -> None:
        def dropped(ids: bytes) -> None:
            for request_id in ids.decode().split():
                cancelled(request_id)

        self._wake = wake
        await self._connection.subscribe(self._own_channel, dropped)
        await self._connection.subscribe(self._wake_channel, lambda _: wake())
        self._stop_listening = self._connection.on_reconnect(wake)
        self._sweeper = Sweeper(
            self._connection,
            key_prefix=self._key_prefix,
            times=self._times,
            queue=self._queue,
            work_waits=wake,
        )
        self._sweeper.start()
        wake()  # what came before the subscription was announced to nobody

    async def claim(self, most: int) -> list[Claim]:
        """See `LeaseQueue.claim`. Where a reply is lost (broken connection, cancelled caller), the next call
        carries the same number and gets the same requests: none is leased to a replica that never saw it."""
        if most < 1:
            return []
        claims, has_left = await self._scripts.claim(
            self._queue,
            self._replica_id,
            number=self._claim_number,
            most=most,
            takes_all=self._takes_all,
        )
        self._claim_number += 1
        self._takes_all = has_left
        if has_left:  # by the next claim another replica, which was woken as well, has had its chance
            self._wake()
        if too_many := claims[most:]:  # a repeated claim that once asked for more
            await self.hand_back([(claim.request.id, claim.attempt) for claim in too_many], "no free slot")
        return claims[:most]

    async def emit(
        self, segments: Sequence[tuple[int, Segment]], ends: Mapping[str, str] = NOWHERE
    ) -> list[str]:
        """See `LeaseQueue.emit`. Several script calls, sent in one write: gateways take up what the first of
        them published while Redis works on the next."""
        if len(segments) <= SEGMENTS_PER_SCRIPT:
            return await self._emit(segments, ends)
        parts = [
            segments[at : at + SEGMENTS_PER_SCRIPT] for at in range(0, len(segments), SEGMENTS_PER_SCRIPT)
        ]
        # Who calls again after an error does so when nothing of this call is on its way any more.
        lost: list[str] = []
        emits = [self._emit(part, ends) for part in parts]
        for result in await asyncio.gather(*emits, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
            lost += result
        return lost

    async def _emit(self, segments: Sequence[tuple[int, Segment]], ends: Mapping[str, str]) -> list[str]:
        if not segments:
            return []
        return await self._scripts.emit(self._replica_id, segments, ends)

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[str]:
        if not leases:
            return []
        return await self._scripts.renew(self._replica_id, leases)

    async def hand_back(self, leases: Sequence[tuple[str, int]], reason: str) -> None:
        await self._release(leases, reason, is_fault=False)

    async def fault(self, leases: Sequence[tuple[str, int]], reason: str) -> None:
        """See `LeaseQueue.fault`. All leases that the failure ended belong in one call: a suspect among them
        takes the blame for the others."""
        await self._release(leases, reason, is_fault=True)

    async def close(self) -> None:
        self._stop_listening()
        self._connection.unsubscribe(self._wake_channel)
        self._connection.unsubscribe(self._own_channel)
        if self._sweeper is not None:
            await self._sweeper.close()

    async def _release(self, leases: Sequence[tuple[str, int]], reason: str, *, is_fault: bool) -> None:
        if leases:
            await self._scripts.release(self._replica_id, leases, is_fault=is_fault, reason=reason)
