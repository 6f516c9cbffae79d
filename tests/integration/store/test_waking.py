"""One message per empty-to-filled edge is enough: no claimer sleeps while something waits."""

from __future__ import annotations

import asyncio
import random

from tests.contract.queue_rig import Rig, Worker, a_request, a_token, accept, open_rig
from tests.waiting import await_until
from tidegate.messages.work import Claim

REQUESTS = 400


class Claimer:
    """Claims as a replica does, and only when it has a reason: a message, or a slot that became free."""

    def __init__(self, rig: Rig, rng: random.Random) -> None:
        self._rig = rig
        self._rng = rng
        self._woken = asyncio.Event()
        self._held: list[Claim] = []
        self.claims = 0

    async def run(self, done: set[str]) -> None:
        worker: Worker = await self._rig.replica()
        worker.wake = self._woken.set  # type: ignore[method-assign]
        await worker.queue.close()  # the rig's callbacks go, ours come
        await worker.queue.start(self._woken.set, lambda _: None)
        while True:
            if not self._held:
                await self._woken.wait()
            slots = 3 - len(self._held)
            if self._woken.is_set() and slots:
                got = await worker.queue.claim(slots)
                self.claims += 1
                if len(got) < slots:
                    self._woken.clear()
                    if self._rng.random() < 0.3:
                        await asyncio.sleep(0)
                self._held += got
            leaving = [claim for claim in self._held if self._rng.random() < 0.5]
            self._held = [claim for claim in self._held if claim not in leaving]
            if leaving:
                await worker.queue.emit([(c.attempt, a_token(c, 0, finish="stop")) for c in leaving])
                done |= {claim.request.id for claim in leaving}
                self._woken.set()


async def test_nothing_waits_while_a_claimer_sleeps(redis_url: str, key_prefix: str) -> None:
    rng = random.Random(3)
    async with open_rig(redis_url, key_prefix) as rig:
        gateway, _ = await rig.gateway()
        done: set[str] = set()
        claimers = [Claimer(rig, rng) for _ in range(5)]
        tasks = [asyncio.create_task(claimer.run(done)) for claimer in claimers]
        sent = 0
        while sent < REQUESTS:
            burst = [a_request() for _ in range(rng.choice([1, 1, 1, 2, 7, 30]))]
            await accept(gateway, *burst)
            sent += len(burst)
            if rng.random() < 0.6 or sent >= REQUESTS:  # let it run dry: the next one is an edge again
                await await_until(lambda goal=sent: len(done) == goal)  # type: ignore[misc]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(done) == sent


async def test_a_submit_wakes_only_where_nothing_waited(redis_url: str, key_prefix: str) -> None:
    async with open_rig(redis_url, key_prefix) as rig:
        gateway, _ = await rig.gateway()
        replica, elsewhere = await rig.replica(), await rig.replica(model="other")
        started = replica.wakes
        await accept(gateway, a_request())
        await await_until(lambda: replica.wakes == started + 1)
        for _ in range(3):
            await accept(gateway, a_request())
        await replica.queue.claim(4)
        await accept(gateway, a_request())
        await await_until(lambda: replica.wakes >= started + 2)
        assert (replica.wakes, elsewhere.wakes) == (started + 2, 1)
