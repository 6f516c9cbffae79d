"""Q1, Q8 and Q9 with real processes: replicas that are killed or stopped, and a Redis that restarts."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.queue_rig import Ear, a_request, accept, open_rig
from tests.integration.store.worker import TIMES, text_of
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.errors import QueueUnavailable
from tidegate.messages.work import Request, Sampling, Segment
from tidegate.store.queue import GatewayQueue

ROOT = Path(__file__).parents[3]
TOKENS = 30


class Workers:
    """Replica processes on one queue."""

    def __init__(self, url: str, key_prefix: str, folder: Path) -> None:
        self._arguments = [url, key_prefix]
        self._folder = folder
        self._count = 0
        self.alive: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        self._count += 1
        name = f"worker-{self._count}"
        command = [sys.executable, "-m", "tests.integration.store.worker", *self._arguments, name]
        with self._output(self._count).open("wb") as output:
            worker = subprocess.Popen(command, cwd=ROOT, stdout=output, start_new_session=True)
        self.alive.append(worker)
        return worker

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        self.alive.remove(worker)
        worker.kill()
        worker.wait()

    def said(self, number: int) -> list[str]:
        """The lines that the `number`th worker (from 1) printed."""
        return self._output(number).read_text().splitlines()

    def _output(self, number: int) -> Path:
        return self._folder / f"worker-{number}.out"


@pytest.fixture
def workers(own_redis: RedisServer, key_prefix: str, tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(own_redis.url, key_prefix, tmp_path)
    yield workers
    for worker in list(workers.alive):
        workers.kill(worker)


def a_long_request() -> Request:
    return a_request(sampling=Sampling(seed=1, max_tokens=TOKENS))


def assert_exact(log: list[Segment] | None) -> None:
    """Every token once and in order, and exactly one end, at the end."""
    assert log is not None
    assert [segment.seq for segment in log] == list(range(TOKENS))
    assert "".join(segment.output.text for segment in log) == "".join(map(text_of, range(TOKENS)))
    assert [segment.seq for segment in log if segment.finish] == [TOKENS - 1]


async def all_ended(gateway: GatewayQueue, requests: list[Request]) -> bool:
    for request in requests:
        log = await gateway.replay(request.id)
        if not log or log[-1].finish is None:
            return False
    return True


async def heard_whole(gateway: GatewayQueue, ear: Ear, request: Request) -> list[Segment]:
    """What a gateway has in the end: the messages it heard, or the log where one of them is missing."""
    heard = ear.of(request.id)
    if [segment.seq for segment in heard] == list(range(TOKENS)):
        return heard
    return await gateway.replay(request.id) or []


async def test_killed_replicas_lose_nothing(
    own_redis: RedisServer, key_prefix: str, workers: Workers
) -> None:
    async with open_rig(own_redis.url, key_prefix) as rig:
        gateway, ear = await rig.gateway(times=TIMES)
        requests = [a_long_request() for _ in range(120)]
        for _ in range(3):
            workers.start()
        await asyncio.gather(*(accept(gateway, request) for request in requests))
        for goal in (300, 900, 1500, 2100):
            await await_until(lambda goal=goal: len(ear.segments) >= goal, timeout=60)  # type: ignore[misc]
            workers.kill(random.choice(workers.alive))
            workers.start()
        await await_until(lambda: all_ended(gateway, requests), timeout=60)
        poisoned = 0
        for request in requests:
            finish = ear.finish_of(request.id)
            if finish is not None and finish.code == "PoisonRequest":
                poisoned += 1  # two kills, both before its first token: that is what poison looks like
                continue
            assert_exact(await gateway.replay(request.id))
            assert_exact(await heard_whole(gateway, ear, request))
        assert poisoned < 5
        assert (await gateway.depth("m", "r1")).running == 0


async def test_a_stopped_replica_that_wakes_up_writes_nothing(
    own_redis: RedisServer, key_prefix: str, workers: Workers
) -> None:
    async with open_rig(own_redis.url, key_prefix) as rig:
        gateway, ear = await rig.gateway(times=TIMES)
        stopped = workers.start()
        requests = [a_long_request() for _ in range(8)]
        await accept(gateway, *requests)
        await await_until(lambda: len(ear.segments) > 40, timeout=60)
        stopped.send_signal(signal.SIGSTOP)
        workers.start()
        await await_until(lambda: all_ended(gateway, requests), timeout=60)
        logs = [await gateway.replay(request.id) for request in requests]
        stopped.send_signal(signal.SIGCONT)
        await await_until(lambda: any(line.startswith("stale") for line in workers.said(1)), timeout=60)
        assert [await gateway.replay(request.id) for request in requests] == logs
        for log in logs:
            assert_exact(log)


async def test_a_redis_restart_under_load_loses_nothing(
    own_redis: RedisServer, key_prefix: str, workers: Workers
) -> None:
    async with open_rig(own_redis.url, key_prefix) as rig:
        gateway, ear = await rig.gateway(times=TIMES)
        for _ in range(2):
            workers.start()
        accepted: list[Request] = []
        is_over = asyncio.Event()

        async def answered(request_id: str) -> None:
            await await_until(lambda: is_over.is_set() or ear.losses or ear.finish_of(request_id), 60)

        async def client() -> None:
            while not is_over.is_set():
                request = a_long_request()
                try:
                    await accept(gateway, request)
                except QueueUnavailable:
                    continue  # said so: not accepted, or not known to be
                accepted.append(request)
                await answered(request.id)

        clients = [asyncio.create_task(client()) for _ in range(24)]
        await await_until(lambda: len(ear.segments) > 500, timeout=60)
        own_redis.kill()
        own_redis.start()
        await await_until(lambda: ear.losses == 1, timeout=60)
        before = len(accepted)
        await await_until(lambda: len(accepted) > before + 10, timeout=60)
        is_over.set()
        await asyncio.gather(*clients)
        await await_until(lambda: all_ended(gateway, accepted), timeout=60)
        for request in accepted:
            assert_exact(await gateway.replay(request.id))
        assert all(worker.poll() is None for worker in workers.alive)
