"""Leader election: of the operator's processes the holder of a Lease acts (`kubernetes.aio.leaderelection`).

The package's election never lets two candidates believe that they lead, as long as clocks run at about the
same speed: a leader that could not renew for `RENEW_SECONDS` stops before another may take the Lease after
`LEASE_SECONDS`. Stopping means that the process ends; nothing that a deposed leader began can go on.

What its lock leaves open is closed here. An API server that cannot be reached counts as a
failed try instead of ending the election; a call that hangs is cut off, or the deadline for renewing would
pass unnoticed; and a leader that ends of its own will gives the Lease back, so that the next one starts at
once and not after `LEASE_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import aiohttp
from kubernetes.aio.client import V1Lease, V1ObjectMeta
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from tidegate.tasks import end_tasks

log = logging.getLogger(__name__)

LEASE_SECONDS = 15
RENEW_SECONDS = 10
RETRY_SECONDS = 2
CALL_SECONDS = 4.0

_AWAY = (aiohttp.ClientError, TimeoutError, OSError)


async def lead(
    client: ApiClient, name: str, namespace: str, identity: str, work: Callable[[], Awaitable[None]]
) -> bool:
    """Wait for the Lease, then run `work` while it is held.

    Returns True when `work` came to its end (what it raised is raised), False when the Lease was lost; the
    caller ends the process then. However this ends, `work` has ended and a Lease that is ours is given back.
    """
    lock = _PatientLock(name, namespace, identity, client)
    holds_lease = asyncio.Event()

    async def leading() -> None:
        holds_lease.set()

    async def do_work() -> None:
        await holds_lease.wait()
        log.info("leader: %s leads", identity)
        await work()

    election = asyncio.create_task(_elect(lock, leading), name="leader election")
    working = asyncio.create_task(do_work(), name="leader's work")
    is_lost = False
    try:
        await asyncio.wait({election, working}, return_when=asyncio.FIRST_COMPLETED)
        is_lost = not working.done()
    finally:
        await end_tasks(election, working)
        if not is_lost:
            await lock.give_back()
    if is_lost:
        election.result()  # its own failure, if it has one
        log.error("leader: %s could not renew its Lease", identity)
        return False
    working.result()
    return True


async def _elect(lock: LeaseLock, leading: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def deposed() -> None:
        return None  # `lead` sees that the election has ended

    await LeaderElection(Config(lock, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, leading, deposed)).run()


class _PatientLock(LeaseLock):
    """A lock that turns an API server that does not answer into what the election takes for a failed try."""

    async def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                found: tuple[bool, Any] = await super().get(name, namespace)
                return found
        except _AWAY as error:
            return False, ApiException(status=0, reason=repr(error))

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        lease = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        return await self._tried(self._create(namespace, lease))

    async def _create(self, namespace: str, lease: V1Lease) -> bool:
        """Do as the package's own, which passes an argument (`pretty=True`) that its API refuses (37.0.2)."""
        try:
            await self.api_instance.create_namespaced_lease(namespace, lease)
        except ApiException as error:
            log.warning("leader: the Lease cannot be made: %s", error.reason)
            return False
        return True

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        return await self._tried(super().update(name, namespace, updated_record))

    async def give_back(self) -> None:
        """Make the Lease free at once, where it is still ours."""
        is_known, record = await self.get(self.name, self.namespace)
        if not is_known or record is None or record.holder_identity != self.identity:
            return
        lease = self.lease_reference
        if lease is None or lease.spec is None:
            return
        lease.spec.holder_identity = None
        with contextlib.suppress(ApiException, *_AWAY):  # then it runs out by itself
            async with asyncio.timeout(CALL_SECONDS):
                await self.api_instance.replace_namespaced_lease(
                    name=self.name, namespace=self.namespace, body=lease
                )
                log.info("leader: %s gave its Lease back", self.identity)

    async def _tried(self, call: Coroutine[Any, Any, bool]) -> bool:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await call
        except _AWAY as error:
            log.warning("leader: the Lease cannot be written: %r", error)
            return False
