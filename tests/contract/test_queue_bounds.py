"""Q3: bounds on requests and bytes, and Q5: deadlines."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from msgspec.structs import replace

from tests.contract.queue_rig import BY_HAND, HELLO, MODEL, REVISION, Rig, a_request, a_token, accept, bounds
from tests.waiting import await_until
from tidegate.errors import RequestTooLarge
from tidegate.messages.codec import encode_request
from tidegate.messages.queue import Accepted, QueueLimits, Rejected
from tidegate.messages.work import Embed, Inputs, PairPrompt, Score, TextPrompt

KIB = 1024
SIZE = len(encode_request(a_request()))


@pytest.mark.parametrize(
    ("limits", "bound", "unit", "limit"),
    [
        ({"model": QueueLimits(max_requests=2)}, "model", "requests", 2),
        ({"model": QueueLimits(max_bytes=2 * SIZE + 50)}, "model", "bytes", 2 * SIZE + 50),
        ({"key_max_requests": 2}, "key", "requests", 2),
        ({"key_max_bytes": 2 * SIZE + 50}, "key", "bytes", 2 * SIZE + 50),
        ({"tenant_max_requests": 2}, "tenant", "requests", 2),
        ({"tenant_max_bytes": 2 * SIZE + 50}, "tenant", "bytes", 2 * SIZE + 50),
        ({"total_max_requests": 2}, "total", "requests", 2),
        ({"total_max_bytes": 2 * SIZE + 50}, "total", "bytes", 2 * SIZE + 50),
    ],
)
async def test_each_bound_refuses_and_names_itself(
    rig: Rig, limits: dict[str, Any], bound: str, unit: str, limit: int
) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    for _ in range(2):
        await accept(gateway, a_request(), limits=bounds(**limits))
    [claim] = await replica.queue.claim(1)
    refused = await gateway.submit([a_request()], bounds(**limits))
    assert isinstance(refused, Rejected)
    assert (refused.bound, refused.unit, refused.limit) == (bound, unit, limit)
    assert (refused.depth.waiting, refused.depth.running) == (1, 1)
    await replica.queue.emit([(1, a_token(claim, 0, finish="stop"))])
    await accept(gateway, a_request(), limits=bounds(**limits))


async def test_a_call_that_does_not_fit_whole_writes_nothing(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    limits = bounds(model=QueueLimits(max_requests=3))
    await accept(gateway, a_request(), limits=limits)
    assert isinstance(await gateway.submit([a_request() for _ in range(3)], limits), Rejected)
    assert (await gateway.depth(MODEL, REVISION)).waiting == 1


@pytest.mark.parametrize(
    ("limits", "whose"),
    [
        ({"model": QueueLimits(max_requests=3)}, "the queue of the model"),
        ({"key_max_requests": 3}, "one key's share"),
        ({"tenant_max_requests": 3}, "a tenant's share"),
        ({"total_max_requests": 3}, "the queue holds"),
    ],
)
async def test_a_call_that_no_empty_queue_would_take_is_too_large(
    rig: Rig, limits: dict[str, Any], whose: str
) -> None:
    """It would be told to come again for ever."""
    gateway, _ = await rig.gateway()
    with pytest.raises(RequestTooLarge, match=f"4 sequences .*{whose}.*fewer choices"):
        await gateway.submit([a_request() for _ in range(4)], bounds(**limits))
    inputs = [Embed(Inputs([HELLO] * count)) for count in (8, 8, 8, 3)]
    with pytest.raises(RequestTooLarge, match=f"27 inputs .*{whose}.*at most 24 inputs"):
        await gateway.submit([a_request(work=work) for work in inputs], bounds(**limits))
    await accept(gateway, *(a_request() for _ in range(3)), limits=bounds(**limits))


async def test_what_the_lengths_show_to_be_too_large_is_not_encoded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, _ = await rig.gateway()
    monkeypatch.setattr("tidegate.store.scripts.encode_prompt", lambda _: pytest.fail("it was encoded"))
    pair = PairPrompt("q" * 40 * KIB, "d")
    works = [Score(Inputs([pair] * count)) for count in (5, 3)]
    with pytest.raises(RequestTooLarge, match="8 inputs"):
        await gateway.submit([a_request(work=work) for work in works], bounds(key_max_bytes=300 * KIB))


async def test_calls_of_one_group_are_judged_one_by_one(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    limits = bounds(model=QueueLimits(max_requests=5))
    calls = [[a_request() for _ in range(n)] for n in (2, 4, 3, 1)]
    outcomes = await asyncio.gather(*(gateway.submit(call, limits) for call in calls))
    assert [type(outcome) for outcome in outcomes] == [Accepted, Rejected, Accepted, Rejected]
    assert (await gateway.depth(MODEL, REVISION)).waiting == 5


async def test_bounds_of_one_model_or_tenant_leave_others_alone(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    limits = bounds(model=QueueLimits(max_requests=1), tenant_max_requests=2)
    await accept(gateway, a_request(), limits=limits)
    await accept(gateway, a_request(model="other"), limits=limits)
    assert isinstance(await gateway.submit([a_request(model="third")], limits), Rejected)
    await accept(gateway, a_request(model="third", tenant="second"), limits=limits)


async def test_what_one_key_may_hold_is_counted_for_each_model_by_itself(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    limits = bounds(key_max_requests=1)
    await accept(gateway, a_request(key="a"), limits=limits)
    assert isinstance(await gateway.submit([a_request(key="a")], limits), Rejected)
    await accept(gateway, a_request(key="b"), limits=limits)
    await accept(gateway, a_request(key="a", model="other"), limits=limits)


BYTE_BOUNDS: dict[str, dict[str, Any]] = {
    "model": {"model": QueueLimits(max_bytes=64 * KIB)},
    "key": {"key_max_bytes": 64 * KIB},
    "tenant": {"tenant_max_bytes": 64 * KIB},
    "total": {"total_max_bytes": 64 * KIB},
}


@pytest.mark.parametrize("bound", BYTE_BOUNDS)
async def test_what_runs_is_charged_for_what_it_writes(rig: Rig, bound: str) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    limits = bounds(**BYTE_BOUNDS[bound])
    await accept(gateway, a_request(), limits=limits)
    [claim] = await replica.queue.claim(1)
    await replica.queue.emit([(1, a_token(claim, 0, "x" * 40 * KIB))])
    large = a_request(prompt=TextPrompt("y" * 30 * KIB))
    refused = await gateway.submit([large], limits)
    assert isinstance(refused, Rejected)
    assert (refused.bound, refused.unit) == (bound, "bytes")
    await replica.queue.emit([(1, a_token(claim, 1, finish="stop"))])
    await accept(gateway, large, limits=limits)


@pytest.mark.parametrize("bound", BYTE_BOUNDS)
async def test_past_a_bound_the_largest_answer_ends_and_the_others_go_on(rig: Rig, bound: str) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    large, small, third = a_request(), a_request(), a_request()
    await accept(gateway, large, small, third, limits=bounds(**BYTE_BOUNDS[bound]))
    await replica.queue.claim(3)
    step = "x" * 6 * KIB
    for seq in range(10):
        assert await replica.queue.emit([(1, a_token(large, seq, step))]) == []
    assert await replica.queue.emit([(1, a_token(small, 0, step)), (1, a_token(large, 10, step))]) == [
        large.id
    ]
    await await_until(lambda: replica.cancelled == [large.id])
    finish = await await_until(lambda: ear.finish_of(large.id))
    assert finish is not None
    assert (finish.reason, finish.code) == ("error", "AnswerTooLarge")
    assert str(64 * KIB) in finish.message
    assert [segment.seq for segment in ear.of(large.id)] == list(range(11))
    assert await replica.queue.emit([(1, a_token(small, 1, step)), (1, a_token(third, 0, step))]) == []
    assert ear.finish_of(small.id) is None


async def test_one_log_has_a_bound_of_its_own(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    request = a_request()
    await accept(gateway, request)
    await replica.queue.claim(1)
    for seq in range(16):
        assert await replica.queue.emit([(1, a_token(request, seq, "x" * 1023 * KIB))]) == []
    log = await gateway.replay(request.id, from_seq=14)
    assert [segment.seq for segment in log or ()] == [14, 15]
    assert await replica.queue.emit([(1, a_token(request, 16, "x" * 17 * KIB))]) == [request.id]
    finish = await await_until(lambda: ear.finish_of(request.id))
    assert finish is not None
    assert (finish.code, str(16 * KIB * KIB) in finish.message) == ("AnswerTooLarge", True)


async def test_a_claim_ends_where_redis_would_end_the_connection(rig: Rig) -> None:
    """Redis does so over a reply of 32 MB to who hears channels; the same claim again would get the same."""
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    large = TextPrompt("y" * 1024 * KIB)
    requests = [a_request(large) for _ in range(40)]
    await accept(gateway, *requests)
    before = replica.wakes
    claims = await replica.queue.claim(40)
    assert 1 <= len(claims) < 10
    await await_until(lambda: replica.wakes > before)  # it claims again
    while len(claims) < 40:
        claims += await replica.queue.claim(40 - len(claims))
    assert [claim.request.id for claim in claims] == [request.id for request in requests]


async def test_what_was_charged_moves_with_the_request_to_another_replica(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica, other = await rig.replica(), await rig.replica()
    limits = bounds(total_max_bytes=64 * KIB)
    request, large = a_request(), a_request(prompt=TextPrompt("y" * 30 * KIB))
    await accept(gateway, request, limits=limits)
    await replica.queue.claim(1)
    await replica.queue.emit([(1, a_token(request, 0, "x" * 40 * KIB))])
    await replica.queue.hand_back([(request.id, 1)], "r")
    assert isinstance(await gateway.submit([large], limits), Rejected)
    [claim] = await other.queue.claim(1)
    await other.queue.emit([(claim.attempt, a_token(request, 1, "x" * 5 * KIB))])
    assert isinstance(await gateway.submit([large], limits), Rejected)
    await gateway.cancel([request.id], "left")
    await accept(gateway, large, limits=limits)


async def test_what_has_ended_can_be_forgotten_and_nothing_else(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    ended, running, waiting = a_request(), a_request(), a_request()
    await accept(gateway, ended, running, waiting)
    await replica.queue.claim(2)
    await replica.queue.emit([(1, a_token(ended, 0, finish="stop")), (1, a_token(running, 0))])
    gateway.forget([ended.id, running.id, waiting.id, "unknown"])

    async def is_gone() -> bool:
        return await gateway.replay(ended.id) is None

    await await_until(is_gone)
    # The same final segment again, after a lost reply: nobody waits for it any more.
    assert await replica.queue.emit([(1, a_token(ended, 0, finish="stop"))]) == [ended.id]
    assert len(await gateway.replay(running.id) or ()) == 1
    assert await gateway.replay(waiting.id) == []
    await replica.queue.emit([(1, a_token(running, 1, finish="stop"))])


async def test_a_request_past_its_deadline_never_reaches_an_engine(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    late, fine = a_request(deadline=time.time() - 1), a_request()
    await accept(gateway, late, fine)
    assert [claim.request.id for claim in await replica.queue.claim(2)] == [fine.id]
    finish = await await_until(lambda: ear.finish_of(late.id))
    assert finish is not None
    assert (finish.reason, finish.code) == ("expired", "DeadlineExceeded")


async def test_a_sweep_expires_what_waits_too_long_without_any_replica(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    late, fine = a_request(deadline=time.time() + 0.05), a_request()
    await accept(gateway, late, fine)
    sweeper = await rig.sweeper()
    await await_until(sweeper.sweep)
    await await_until(lambda: ear.finish_of(late.id))
    assert (await gateway.depth(MODEL, REVISION)).waiting == 1
    assert ear.of(fine.id) == []


async def test_a_running_request_has_no_deadline(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica(times=replace(BY_HAND, lease_seconds=0.05))
    request = a_request(deadline=time.time() + 0.3)
    await accept(gateway, request)
    await replica.queue.claim(1)
    await replica.queue.emit([(1, a_token(request, 0))])
    await await_until(lambda: time.time() > request.deadline)
    sweeper = await rig.sweeper()
    await sweeper.sweep()  # its lease is over, so it goes back; it has emitted, so it does not expire
    [claim] = await replica.queue.claim(1)
    assert claim.attempt == 2
    assert ear.finish_of(request.id) is None


async def test_a_deadline_is_a_span_whatever_the_gateways_clock_says(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    an_hour_ago = time.time() - 3600
    monkeypatch.setattr("tidegate.store.gateway_queue.time.time", lambda: an_hour_ago)
    request = a_request(created=an_hour_ago, deadline=an_hour_ago + 60, prompt=TextPrompt("clock"))
    await accept(gateway, request)
    assert [claim.request for claim in await replica.queue.claim(1)] == [request]
