"""Submits that gather, and what becomes of those whose caller leaves or whose answer is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.contract.queue_rig import MODEL, REVISION, Rig, a_request, accept, bounds, open_rig
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.errors import QueueUnavailable
from tidegate.messages.queue import QueueLimits
from tidegate.messages.work import TextPrompt
from tidegate.store import scripts
from tidegate.store.connection import Connection, Script
from tidegate.store.gateway_queue import ENOUGH_CALLS, MOST_BYTES, MOST_IN_FLIGHT
from tidegate.store.wire import ConnectionLost


@pytest.fixture
async def rig(own_redis: RedisServer, key_prefix: str) -> AsyncIterator[Rig]:
    async with open_rig(own_redis.url, key_prefix) as rig:
        yield rig


def submits_of(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of arguments of each SUBMIT that `connection` carries from now on."""
    seen: list[int] = []
    run = connection.run

    async def noting(script: Script, prefix: str, *arguments: Any, repeat: bool = False) -> Any:
        if script is scripts.SUBMIT:
            seen.append(len(arguments))
        return await run(script, prefix, *arguments, repeat=repeat)

    monkeypatch.setattr(connection, "run", noting)
    return seen


async def test_submits_of_one_moment_share_a_script_call(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, _ = await rig.gateway()
    seen = submits_of(gateway._connection, monkeypatch)
    limits = bounds(model=QueueLimits(max_requests=2000))
    await asyncio.gather(*(accept(gateway, a_request(), limits=limits) for _ in range(300)))
    assert len(seen) == 1
    await asyncio.gather(*(accept(gateway, a_request(), a_request(), limits=limits) for _ in range(400)))
    assert len(seen) == 3  # 500 requests at most in one
    assert (await gateway.depth(MODEL, REVISION)).waiting == 1100


async def test_large_bodies_do_not_gather(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, _ = await rig.gateway()
    seen = submits_of(gateway._connection, monkeypatch)
    large = [a_request(prompt=TextPrompt("x" * (MOST_BYTES // 2 + 1))) for _ in range(3)]
    await asyncio.gather(*(accept(gateway, request) for request in large))
    assert len(seen) == 3


async def test_groups_follow_each_other_without_waiting_for_answers(
    rig: Rig, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    seen = submits_of(gateway._connection, monkeypatch)
    own_redis.pause()
    submits: list[asyncio.Task[Any]] = []
    requests = [a_request() for _ in range(ENOUGH_CALLS * (MOST_IN_FLIGHT + 2))]
    for position, request in enumerate(requests, start=1):
        submits.append(asyncio.create_task(accept(gateway, request)))
        if position % ENOUGH_CALLS == 0:
            sent = min(position // ENOUGH_CALLS, MOST_IN_FLIGHT)
            await await_until(lambda sent=sent: len(seen) == sent)  # type: ignore[misc]
    own_redis.resume()
    accepted = await asyncio.gather(*submits)
    assert [each.waiting_ahead for each in accepted] == list(range(len(requests)))
    claims = await replica.queue.claim(len(requests))
    assert [claim.request.id for claim in claims] == [request.id for request in requests]
    assert not gateway._commits


async def test_a_submit_whose_answer_was_lost_is_not_written_twice(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, _ = await rig.gateway()
    connection = gateway._connection
    run, tries = connection.run, []

    async def losing(script: Script, prefix: str, *arguments: Any, repeat: bool = False) -> Any:
        reply = await run(script, prefix, *arguments, repeat=repeat)
        if script is scripts.SUBMIT:
            tries.append(script)
            if len(tries) == 1:
                raise ConnectionLost("The connection to Redis broke.")
        return reply

    monkeypatch.setattr(connection, "run", losing)
    outcome = await gateway.submit([a_request(), a_request()], bounds())
    assert tries == [scripts.SUBMIT, scripts.SUBMIT]
    assert outcome.depth.waiting == 2
    replica = await rig.replica()
    assert len(await replica.queue.claim(5)) == 2


async def test_a_caller_that_leaves_takes_its_request_along(rig: Rig, own_redis: RedisServer) -> None:
    gateway, ear = await rig.gateway()
    staying, leaving = a_request(), a_request()
    own_redis.pause()
    first = asyncio.create_task(accept(gateway, staying))
    second = asyncio.create_task(accept(gateway, leaving))
    await await_until(lambda: gateway._commits)
    second.cancel()
    own_redis.resume()
    await first
    await await_until(lambda: ear.finish_of(leaving.id))
    assert (await gateway.depth(MODEL, REVISION)).waiting == 1
    assert ear.of(staying.id) == []


async def test_what_nobody_was_told_of_is_withdrawn(
    rig: Rig, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, ear = await rig.gateway()
    connection = gateway._connection
    run = connection.run
    request = a_request()

    async def failing(script: Script, prefix: str, *arguments: Any, repeat: bool = False) -> Any:
        await run(script, prefix, *arguments, repeat=repeat)
        raise QueueUnavailable("Redis is away.")

    monkeypatch.setattr(connection, "run", failing)
    with pytest.raises(QueueUnavailable):
        await gateway.submit([request], bounds())
    monkeypatch.undo()
    assert (await gateway.depth(MODEL, REVISION)).waiting == 1
    own_redis.kill()
    own_redis.start()
    await await_until(lambda: ear.losses)

    async def is_cancelled() -> bool:
        log = await gateway.replay(request.id)
        return bool(log and log[-1].finish and log[-1].finish.reason == "cancelled")

    await await_until(is_cancelled)
    assert (await gateway.depth(MODEL, REVISION)).waiting == 0


async def test_closing_answers_everybody(rig: Rig, own_redis: RedisServer) -> None:
    gateway, _ = await rig.gateway()
    own_redis.pause()
    submits = [asyncio.create_task(gateway.submit([a_request()], bounds())) for _ in range(3)]
    await await_until(lambda: gateway._commits)
    await gateway.close()
    own_redis.resume()
    outcomes = await asyncio.gather(*submits, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [QueueUnavailable] * 3
