"""Requests in, tokens out: order, priority, delivery, replay, and what is left behind."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.queue_rig import MODEL, QUEUE, REVISION, Rig, a_request, a_token, accept
from tests.waiting import await_until
from tidegate.messages.queue import Depth, Place
from tidegate.messages.work import ChatPrompt, Finish, Segment, TokenPrompt, Tokens
from tidegate.store.replica_queue import SEGMENTS_PER_SCRIPT


async def test_a_request_goes_through_and_its_stream_arrives_in_order(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    request = a_request(prompt=ChatPrompt([{"role": "user", "content": "hé"}]))
    await accept(gateway, request)
    [claim] = await replica.queue.claim(8)
    assert (claim.request, claim.attempt, claim.log) == (request, 1, [])
    assert await replica.queue.emit([(1, a_token(request, 0, "a"))]) == []
    assert (
        await replica.queue.emit([(1, a_token(request, 1, "b")), (1, a_token(request, 2, "c", "stop"))]) == []
    )
    await await_until(lambda: ear.finish_of(request.id))
    assert "".join(segment.output.text for segment in ear.segments) == "abc"
    assert await gateway.replay(request.id) == ear.segments


async def test_claims_follow_priority_then_submission(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    low, first, second, high = (
        a_request(priority=-1),
        a_request(),
        a_request(),
        a_request(priority=5),
    )
    for request in (low, first, second, high):
        await accept(gateway, request)
    claims = await replica.queue.claim(3) + await replica.queue.claim(3)
    assert [claim.request.id for claim in claims] == [high.id, first.id, second.id, low.id]


async def test_submits_of_one_moment_keep_their_order_and_each_gets_its_own_answer(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    requests = [a_request() for _ in range(500)]
    outcomes = await asyncio.gather(*(accept(gateway, request) for request in requests))
    assert [outcome.waiting_ahead for outcome in outcomes] == list(range(500))
    claims = await replica.queue.claim(500)
    assert [claim.request.id for claim in claims] == [request.id for request in requests]


async def test_the_requests_of_one_call_enter_together(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    await accept(gateway, a_request())
    outcome = await accept(gateway, *(a_request(prompt=TokenPrompt([1, 2])) for _ in range(4)))
    assert (outcome.waiting_ahead, outcome.depth.waiting) == (1, 5)


async def test_segments_go_to_the_gateway_of_their_request_only(rig: Rig) -> None:
    (one, ear_one), (two, ear_two) = await rig.gateway("one"), await rig.gateway("two")
    replica = await rig.replica()
    mine, other = a_request(gateway="one"), a_request(gateway="two")
    await accept(one, mine)
    await accept(two, other)
    await replica.queue.claim(2)
    await replica.queue.emit([(1, a_token(mine, 0, finish="stop")), (1, a_token(other, 0, finish="length"))])
    await await_until(lambda: ear_one.segments and ear_two.segments)
    assert [segment.request_id for segment in ear_one.segments] == [mine.id]
    assert [segment.request_id for segment in ear_two.segments] == [other.id]


async def test_replay_tells_unknown_from_silent(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    request = a_request()
    assert await gateway.replay(request.id) is None
    await accept(gateway, request)
    assert await gateway.replay(request.id) == []


async def test_places_count_who_is_in_front(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    running, front, back = a_request(), a_request(), a_request()
    elsewhere = a_request(model="other")
    for request in (running, front, back, elsewhere):
        await accept(gateway, request)
    await replica.queue.claim(1)
    asked = [(request.id, request.model, request.revision) for request in (running, front, back, elsewhere)]
    depth, other_depth = Depth(2, 1, 0.0), Depth(1, 0, 0.0)
    assert await gateway.places(asked) == [
        Place(None, depth),
        Place(0, depth),
        Place(1, depth),
        Place(0, other_depth),
    ]
    assert await gateway.depth(MODEL, REVISION) == depth


async def test_the_drain_estimate_comes_from_departures_while_others_wait(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    await accept(gateway, *(a_request() for _ in range(6)))
    for _ in range(4):
        [claim] = await replica.queue.claim(1)
        await replica.queue.emit([(1, a_token(claim, 0, finish="stop"))])
    assert (await gateway.depth(MODEL, REVISION)).drain_seconds > 0


@pytest.mark.parametrize("reason", ["stop", "length", "error"])
async def test_nothing_is_left_of_a_finished_request_but_its_result(rig: Rig, reason: str) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    request = a_request()
    await accept(gateway, request)
    await replica.queue.claim(1)
    finish = Finish(reason, "SomeCode", "Some words.", 3, 1)  # type: ignore[arg-type]
    await replica.queue.emit([(1, Segment(request.id, 0, output=Tokens([5], "x"), finish=finish))])
    await await_until(lambda: ear.finish_of(request.id) == finish)
    connection = await rig.connect()
    prefix = rig.key_prefix + ":"
    state = {"stop": "done", "length": "done", "error": "failed"}[reason]
    assert await connection.call("HGET", prefix + "req:" + request.id, "state") == state.encode()
    assert await connection.call("HGET", prefix + "req:" + request.id, "body") == b""
    for key in ("req:", "log:"):
        assert 0 < await connection.call("TTL", prefix + key + request.id) <= 60
    gone = ["leases", "deadlines", "open:gw", "waiting:" + QUEUE, "suspects:" + QUEUE, "tenant:default"]
    assert await connection.call("EXISTS", *(prefix + key for key in gone)) == 0
    for key in ("total", "queue:" + QUEUE):
        assert await connection.call("HMGET", prefix + key, "requests", "bytes") == [b"0", b"0"]


async def test_a_step_of_many_requests_is_written_whole(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    worker = await rig.replica()
    requests = [a_request() for _ in range(3 * SEGMENTS_PER_SCRIPT + 1)]
    await accept(gateway, *requests)
    claims = await worker.queue.claim(len(requests))
    gone = [(claim.attempt + 1, a_token(claim, 0)) for claim in claims[::50]]
    tokens = [(claim.attempt, a_token(claim, 0)) for claim in claims]
    assert set(await worker.queue.emit([*gone, *tokens])) == {claim.request.id for claim in claims[::50]}
    ends = [(claim.attempt, a_token(claim, 1, finish="stop")) for claim in claims]
    assert await worker.queue.emit(ends) == []
    assert await worker.queue.emit(ends) == []
    await await_until(lambda: len(ear.segments) == 2 * len(requests))
    assert all([segment.seq for segment in ear.of(request.id)] == [0, 1] for request in requests)
    assert await gateway.depth(MODEL, REVISION) == Depth(0, 0, 0.0)


async def test_calls_of_one_group_know_their_place_among_each_other(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    await accept(gateway, a_request(priority=1))
    priorities = [0, 2, 0, 1, -1, 2]
    accepted = await asyncio.gather(*(accept(gateway, a_request(priority=each)) for each in priorities))
    assert [each.waiting_ahead for each in accepted] == [1, 0, 3, 2, 5, 1]
