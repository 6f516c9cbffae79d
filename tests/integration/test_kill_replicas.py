"""The queue's promises (Q1, Q2, Q8, Q9) with real replica processes that are killed and stopped."""

from __future__ import annotations

import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.engine_requests import sampling_of
from tests.integration.serving.rig import (
    LEASE_SECONDS,
    MODEL,
    REVISION,
    Ear,
    ReplicaChild,
    a_request,
    heard_from,
    open_ear,
    undisturbed,
)
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.messages.work import Request

pytestmark = pytest.mark.serial

Spawn = Callable[..., ReplicaChild]


@pytest.fixture
def spawn(key_prefix: str) -> Iterator[Spawn]:
    children: list[ReplicaChild] = []

    def start(url: str, **changes: object) -> ReplicaChild:
        children.append(ReplicaChild(url, key_prefix, **changes))
        return children[-1]

    yield start
    for child in children:
        child.close()


@pytest.fixture
async def ear(redis_url: str, key_prefix: str) -> AsyncIterator[Ear]:
    async with open_ear(redis_url, key_prefix) as ear:
        yield ear


async def test_replicas_killed_at_random_moments_lose_and_double_nothing(
    ear: Ear, spawn: Spawn, redis_url: str
) -> None:
    draw = random.Random(3)
    replicas = [spawn(redis_url, slots=6) for _ in range(2)]
    requests = [a_request(f"prompt {number}", max_tokens=draw.randint(1, 250)) for number in range(30)]
    total = sum(sampling_of(request).max_tokens or 0 for request in requests)
    await ear.submit(*requests)
    for share in (0.1, 0.3, 0.5, 0.7):
        threshold = share * total * draw.uniform(0.8, 1.2)
        await _tokens_heard(ear, requests, threshold)
        replicas.pop(draw.randrange(len(replicas))).kill()
        replicas.append(spawn(redis_url, slots=6))
    finishes = await ear.ended(*requests, timeout=40)
    for request, finish in zip(requests, finishes, strict=True):
        assert await ear.text(request.id) == undisturbed(request)
        assert (finish.reason, finish.completion_tokens) == ("length", sampling_of(request).max_tokens)


async def test_every_request_ends_once_under_kills_cancels_and_deadlines(
    ear: Ear, spawn: Spawn, redis_url: str
) -> None:
    draw = random.Random(5)
    replica = spawn(redis_url, slots=2)
    stays = [a_request(f"stays {number}", max_tokens=60) for number in range(8)]
    leaves = [a_request(f"leaves {number}", max_tokens=4000) for number in range(8)]
    late = [a_request(f"late {number}", deadline=stays[0].created + 1.0) for number in range(4)]
    mixed = stays + leaves
    draw.shuffle(mixed)
    await ear.submit(*mixed, *late)
    await await_until(lambda: any(ear.tokens_of(request) for request in mixed), 20)
    replica.kill()
    await ear.ended(*late)
    spawn(redis_url, slots=2)
    for request in leaves:
        await ear.queue.cancel([request.id], "the client left")
    await ear.ended(*stays, *leaves, *late, timeout=40)
    assert {ear.finished[request.id].reason for request in stays} == {"length"}
    assert {ear.finished[request.id].reason for request in leaves} == {"cancelled"}
    assert {ear.finished[request.id].reason for request in late} == {"expired"}
    assert all(ear.tokens_of(request) == 0 for request in late)
    depth = await ear.queue.depth(MODEL, REVISION)
    assert (depth.waiting, depth.running) == (0, 0)


async def test_a_process_that_every_request_kills_does_not_kill_for_ever(
    ear: Ear, spawn: Spawn, redis_url: str
) -> None:
    fault = {"test_fault": {"marker": "boom", "kind": "kill", "at_token": 0}}
    poison, innocent = a_request("boom"), a_request("innocent", max_tokens=100)
    await ear.submit(poison, innocent)
    for _ in range(2):
        replica = spawn(redis_url, engine_args=fault)
        await _gone(replica)
        await await_until(lambda: _nothing_runs(ear), 5 * LEASE_SECONDS)
    spawn(redis_url, engine_args=fault)
    finish, _ = await ear.ended(poison, innocent)
    assert (finish.reason, finish.code) == ("error", "PoisonRequest")
    assert await ear.text(innocent.id) == undisturbed(innocent)


async def test_a_stalled_replica_that_wakes_cannot_write(ear: Ear, spawn: Spawn, redis_url: str) -> None:
    stalled = spawn(redis_url, engine_args={"step_ms": 10.0})
    request = a_request(max_tokens=300)
    await ear.submit(request)
    await heard_from(ear, request, 10)
    stalled.send(signal.SIGSTOP)
    spawn(redis_url, engine_args={"step_ms": 5.0})
    heard = ear.tokens_of(request)
    await heard_from(ear, request, heard + 20)
    stalled.send(signal.SIGCONT)
    await ear.ended(request)
    assert await ear.text(request.id) == undisturbed(request)
    # It noticed, dropped that request and is of use again.
    assert stalled.process.poll() is None
    following = [a_request(f"following {number}") for number in range(4)]
    await ear.submit(*following)
    await ear.ended(*following)


async def test_a_redis_that_is_killed_under_load_loses_nothing(
    own_redis: RedisServer, spawn: Spawn, key_prefix: str
) -> None:
    async with open_ear(own_redis.url, key_prefix) as ear:
        spawn(own_redis.url)
        requests = [a_request(f"prompt {number}", max_tokens=400) for number in range(12)]
        await ear.submit(*requests)
        for tokens in (20, 150):
            await heard_from(ear, requests[0], tokens)
            own_redis.kill()
            own_redis.start()
        await await_until(lambda: _all_over(ear), 40)
        for request in requests:
            log = await ear.queue.replay(request.id)
            assert log is not None and log[-1].finish is not None
            assert [segment.seq for segment in log] == list(range(len(log)))
            assert "".join(segment.output.text for segment in log) == undisturbed(request)


async def test_a_terminated_replica_drains_and_leaves_cleanly(ear: Ear, spawn: Spawn, redis_url: str) -> None:
    replica = spawn(redis_url)
    request = a_request(max_tokens=200)
    await ear.submit(request)
    await heard_from(ear, request, 5)
    replica.send(signal.SIGTERM)
    await ear.ended(request)
    await _gone(replica)
    assert replica.process.returncode == 0
    assert await ear.text(request.id) == undisturbed(request)


async def _tokens_heard(ear: Ear, requests: list[Request], tokens: float) -> None:
    await await_until(lambda: sum(ear.tokens_of(request) for request in requests) >= tokens, 30)


async def _gone(replica: ReplicaChild) -> None:
    await await_until(lambda: replica.process.poll() is not None, 20)


async def _nothing_runs(ear: Ear) -> bool:
    return (await ear.queue.depth(MODEL, REVISION)).running == 0


async def _all_over(ear: Ear) -> bool:
    depth = await ear.queue.depth(MODEL, REVISION)
    return depth.waiting + depth.running == 0
