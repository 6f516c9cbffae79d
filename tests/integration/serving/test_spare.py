"""The process that waits to become a replica, under a real Ray Serve with one model that sleeps."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.serving.rig import open_ear, undisturbed
from tests.integration.serving.test_ray_serve import (
    _ended,
    _has,
    _is_running,
    application,
    open_api,
    submit,
)
from tests.integration.serving.test_ray_serve import replicas as running
from tests.processes import command
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.control.serve_config import application_config, put_body
from tidegate.local import processes, ray_cluster
from tidegate.local.home import Home
from tidegate.local.ray_cluster import RayCluster
from tidegate.replica_args import ReplicaSettings
from tidegate.serve_api import ServeUnavailable
from tidegate.serving import spare

pytestmark = [pytest.mark.serial, pytest.mark.timeout(900)]

PREFIX = "test-ray"
WAIT_SECONDS = 240.0  # for what imports torch, on two cores that may be busy with more than this test
PROMPTS = "tidegate.engines.transformers.prompt_process"


@pytest.fixture
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    home = Home(Path(tmp_path_factory.mktemp("home")))
    home.logs.mkdir(parents=True)
    try:
        yield asyncio.run(ray_cluster.start(home, gpus=0))
    finally:
        processes.end(home.instance, "ray", grace_seconds=0.0)


def test_a_replica_begins_in_the_process_that_waited_and_another_waits_then(
    ray: RayCluster, redis_server: RedisServer, request: pytest.FixtureRequest
) -> None:
    """What was asked is answered as well where the one that waited has died."""
    asyncio.run(story(ray, redis_server, request))


async def story(ray: RayCluster, redis_server: RedisServer, request: pytest.FixtureRequest) -> None:
    replicas = ReplicaSettings(redis_url=redis_server.url, key_prefix=PREFIX)
    sleeper = application("sleeper", minReplicas=0, idleSeconds=5.0)
    async with open_api(ray) as api, open_ear(redis_server.url, PREFIX, gateway_id=request.node.name) as ear:
        await api.put(put_body([application_config(sleeper, replicas)]))
        await soon(lambda: _is_running(api, "sleeper"))
        waiting = 0
        for lost in (False, False, True):
            if lost:
                os.kill(waiting, signal.SIGKILL)
            asked = await submit(ear, "sleeper", request, max_tokens=20)
            await ear.ended(asked, timeout=WAIT_SECONDS)
            assert await ear.text(asked.id) == undisturbed(asked)
            (replica,) = await soon(lambda: running(api, "sleeper"))
            assert not waiting or (replica.pid == waiting) is not lost
            await soon(lambda: _has(api, "sleeper", 0))
            await _ended(replica)
            waiting = await the_spare(ray)


async def soon(holds: Callable[[], Awaitable[Any]]) -> Any:
    """Wait, also while a Serve that gets no core does not answer."""

    async def patient() -> Any:
        try:
            return await holds()
        except ServeUnavailable:
            return None

    return await await_until(patient, WAIT_SECONDS)


async def the_spare(ray: RayCluster) -> int:
    """The process that waits, once it has imported all, and Ray has no other that it would rather take."""

    def alone() -> list[int]:
        try:
            found = spares(Path(ray.head.session, spare.LOCK))
            return found if found and not others(ray, found) else []
        except psutil.NoSuchProcess:
            return []

    (pid,) = await await_until(alone, WAIT_SECONDS)
    return int(pid)


def spares(lock: Path) -> list[int]:
    """Who holds the lock and has, last of all, started the process that is to prepare its prompts."""
    if not lock.exists():
        return []
    mark = f":{lock.stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    holders = [psutil.Process(int(line.split()[4])) for line in lines if mark in line]
    return [holder.pid for holder in holders if any(PROMPTS in command(child) for child in holder.children())]


def others(ray: RayCluster, found: list[int]) -> list[int]:
    """Ray's idle workers beside these."""
    (raylet,) = [part.pid for part in ray.parts if part.name == "ray raylet"]
    idle = [child.pid for child in psutil.Process(raylet).children() if command(child)[:1] == ["ray::IDLE"]]
    return [pid for pid in idle if pid not in found]
