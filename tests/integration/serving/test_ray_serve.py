"""Replicas under a real Ray Serve: wake, sleep, scale, drain, and die. One Ray for the whole module."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest

from tests.integration.serving.rig import BOUNDS, Ear, a_request, heard_from, open_ear, undisturbed
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.control.observed import ApplicationState, ReplicaState
from tidegate.control.resources import ModelSpec
from tidegate.control.serve_config import Application, application_config, put_body
from tidegate.local import processes, ray_cluster
from tidegate.local.home import Home
from tidegate.local.ray_cluster import RayCluster
from tidegate.messages.work import Request
from tidegate.replica_args import ReplicaSettings, Times
from tidegate.serve_api import ServeApi
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry

pytestmark = [pytest.mark.serial, pytest.mark.timeout(180)]

PREFIX = "test-ray"
REVISION = "r1"
START_SECONDS = 90.0  # generous: two cores may be busy with more than this test
CRASH = {"test_fault": {"marker": "boom", "kind": "crash", "at_token": 20}}


def application(model: str, *, args: Mapping[str, object] | None = None, **scaling: float) -> Application:
    engine = {"name": "simulated", "maxSlots": 4, "args": {"step_ms": 10.0, **(args or {})}}
    spec = ModelSpec.model_validate({"engine": engine, "resources": {"cpus": 0.1}, "scaling": scaling})
    return Application(model, REVISION, spec, checkpoint="", keep_awake=False)


APPLICATIONS = [
    application("sleeper", minReplicas=0, idleSeconds=1.0),
    application("steady"),
    application("wide", maxReplicas=2, targetInFlight=2, scaleDownSeconds=0.5),
    application("broken", args={"test_load_failure": "WeightsMissing"}),
]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    home = Home(Path(tmp_path_factory.mktemp("home")))
    home.logs.mkdir(parents=True)
    try:
        yield asyncio.run(ray_cluster.start(home, gpus=0, keeps_spare=False))
    finally:
        processes.end(home.instance, "ray", grace_seconds=0.0)


@pytest.fixture(scope="module")
def serving(ray: RayCluster, redis_server: RedisServer) -> RayCluster:
    """The cluster, with every application put."""
    times = Times(lease_seconds=2.0, step_timeout_seconds=60.0, drain_seconds=20.0)
    replicas = ReplicaSettings(redis_url=redis_server.url, key_prefix=PREFIX, times=times)

    config = put_body(application_config(item, replicas) for item in APPLICATIONS)
    (steady,) = [found for found in config["applications"] if found["name"] == f"steady--{REVISION}"]
    steady["args"]["engine"]["args"].update(CRASH)  # more than the resource's schema lets a user say

    async def put() -> None:
        async with open_api(ray) as api:
            await api.put(config)

    asyncio.run(put())
    return ray


@pytest.fixture
async def api(serving: RayCluster) -> AsyncIterator[ServeApi]:
    async with open_api(serving) as api:
        yield api


@pytest.fixture
async def ear(serving: RayCluster, redis_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Ear]:
    async with open_ear(redis_url, PREFIX, gateway_id=request.node.name) as ear:
        yield ear


async def test_a_model_at_zero_wakes_for_a_request_and_sleeps_again(
    api: ServeApi, ear: Ear, connection: Connection, request: pytest.FixtureRequest
) -> None:
    await await_until(lambda: _is_running(api, "sleeper"), START_SECONDS)
    assert await replicas(api, "sleeper") == ()
    for _ in range(2):
        asked = await submit(ear, "sleeper", request, max_tokens=20)
        await ear.ended(asked, timeout=START_SECONDS)
        assert await ear.text(asked.id) == undisturbed(asked)
        replica = await the_replica(api, "sleeper")
        await await_until(lambda: _has(api, "sleeper", 0), 30)
        await _ended(replica)
    report = (await Registry(connection, key_prefix=PREFIX).reports())[("sleeper", REVISION)]
    assert report.proved


async def test_a_killed_replica_is_replaced_and_its_stream_goes_on(
    api: ServeApi, ear: Ear, request: pytest.FixtureRequest
) -> None:
    asked = await submit(ear, "steady", request, max_tokens=300)
    await heard_from(ear, asked, 10, START_SECONDS)
    replica = await the_replica(api, "steady")
    assert replica.pid is not None
    os.kill(replica.pid, signal.SIGKILL)
    await ear.ended(asked, timeout=START_SECONDS)
    assert await ear.text(asked.id) == undisturbed(asked)
    assert [other.pid for other in await replicas(api, "steady")] != [replica.pid]


async def test_a_crashed_engine_ends_its_process_and_says_why(
    api: ServeApi, ear: Ear, connection: Connection, request: pytest.FixtureRequest
) -> None:
    innocent = await submit(ear, "steady", request, max_tokens=400)
    await heard_from(ear, innocent, 5, START_SECONDS)
    replica = await the_replica(api, "steady")
    poison = await submit(ear, "steady", request, "boom", max_tokens=40)
    registry = Registry(connection, key_prefix=PREFIX)

    async def told() -> bool:
        report = (await registry.reports())[("steady", REVISION)]
        return report.reason == "EngineCrashed"

    await await_until(told, 30)
    await _ended(replica)
    _, finish = await ear.ended(innocent, poison, timeout=START_SECONDS)
    assert await ear.text(innocent.id) == undisturbed(innocent)
    assert finish.code == "PoisonRequest"
    report = (await registry.reports())[("steady", REVISION)]
    assert report.proved
    assert "EngineCrashed" in report.notes[0]


async def test_load_brings_a_second_replica_which_drains_when_it_is_over(
    api: ServeApi, ear: Ear, request: pytest.FixtureRequest
) -> None:
    long = [await submit(ear, "wide", request, f"long {i}", max_tokens=1500) for i in range(2)]
    short = [await submit(ear, "wide", request, f"short {i}", max_tokens=700) for i in range(6)]
    await await_until(lambda: _has(api, "wide", 2), START_SECONDS)
    await ear.ended(*short, *long, timeout=START_SECONDS)
    await await_until(lambda: _has(api, "wide", 1), 30)
    for asked in (*long, *short):
        assert await ear.text(asked.id) == undisturbed(asked)


async def test_a_model_that_does_not_load_says_why_and_serve_gives_it_up(
    api: ServeApi, connection: Connection
) -> None:
    registry = Registry(connection, key_prefix=PREFIX)
    report = (await registry.reports())[("broken", REVISION)]
    assert (report.proved, report.reason) == (False, "WeightsMissing")

    async def given_up() -> bool:
        return (await state(api, "broken")).status == "DEPLOY_FAILED"

    await await_until(given_up, START_SECONDS)
    assert (await state(api, "steady")).status == "RUNNING"


def open_api(ray: RayCluster) -> ServeApi:
    return ServeApi(ray.head.dashboard_url, token=ray.token, timeout_seconds=60.0)


async def submit(
    ear: Ear, model: str, request: pytest.FixtureRequest, prompt: str = "hello", **changes: int
) -> Request:
    asked = a_request(
        prompt, model=model, revision=REVISION, gateway=request.node.name, id=_unique(), **changes
    )
    await ear.queue.submit([asked], BOUNDS)
    return asked


def _unique() -> str:
    return f"cmpl-{os.urandom(8).hex()}.0"


async def state(api: ServeApi, model: str) -> ApplicationState:
    return (await api.get()).applications[f"{model}--{REVISION}"]


async def replicas(api: ServeApi, model: str) -> tuple[ReplicaState, ...]:
    return tuple(found for found in (await state(api, model)).replicas if found.state == "RUNNING")


async def the_replica(api: ServeApi, model: str) -> ReplicaState:
    """The only one. Serve learns a little late that a replica runs: it may be serving already."""
    (replica,) = await await_until(lambda: replicas(api, model), START_SECONDS)
    return replica


async def _is_running(api: ServeApi, model: str) -> bool:
    return (await state(api, model)).status == "RUNNING"


async def _has(api: ServeApi, model: str, count: int) -> bool:
    found = await state(api, model)
    return len(found.replicas) == len(await replicas(api, model)) == count


async def _ended(replica: ReplicaState) -> None:
    """Its process is gone."""
    assert replica.pid is not None
    await await_until(lambda: not Path(f"/proc/{replica.pid}").exists(), 20)
