"""A claim prefers the replica that holds how a prompt begins, and nobody waits for that."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.queue_rig import QUEUE, Rig, Worker, a_request, a_token, accept, bounds
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.messages.queue import QueueLimits
from tidegate.messages.work import ChatPrompt, Claim, Prompt, Request, TextPrompt

WINDOW = 16  # of `claim.lua`
ROOM = 64


def a_prompt(prefix: str, end: str = "") -> Prompt:
    return TextPrompt(prefix * 4000 + end)


async def hold(worker: Worker, *requests: Request) -> None:
    """The replica has run these to their end, and has room."""
    claims = await worker.queue.claim(ROOM)
    assert ids(claims) == [request.id for request in requests]
    await worker.queue.emit([(claim.attempt, a_token(claim, 0, finish="stop")) for claim in claims])


def ids(claims: list[Claim]) -> list[str]:
    return [claim.request.id for claim in claims]


async def test_of_those_that_wait_a_replica_takes_what_it_holds_first(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    one, two = await rig.replica(), await rig.replica()
    for worker, prefix in ((one, "1"), (two, "2")):
        request = a_request(a_prompt(prefix))
        await accept(gateway, request)
        await hold(worker, request)
    of_two, of_nobody, of_one = (a_request(a_prompt(prefix, "?")) for prefix in "231")
    await accept(gateway, of_two, of_nobody, of_one)
    assert ids(await one.queue.claim(1)) == [of_one.id]
    assert ids(await two.queue.claim(2)) == [of_two.id, of_nobody.id]


async def test_a_conversation_goes_on_where_it_was(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    one, two = await rig.replica(), await rig.replica()
    system = {"role": "system", "content": "s" * 4000}
    first = [system, {"role": "user", "content": "first" * 500}]
    other = [system, {"role": "user", "content": "other" * 500}]
    for worker, messages in ((one, first), (two, other)):
        request = a_request(ChatPrompt(messages))
        await accept(gateway, request)
        # Both begin alike, and the first one is offered what the second asks.
        await hold(worker, request) if worker is one else await _take(two, request)
    answer = [{"role": "assistant", "content": "a" * 1000}, {"role": "user", "content": "more"}]
    goes_on = a_request(ChatPrompt([*other, *answer]))
    await accept(gateway, a_request(ChatPrompt([*first, *answer])), goes_on)
    assert ids(await two.queue.claim(1)) == [goes_on.id]


async def _take(worker: Worker, request: Request) -> None:
    claims = await worker.queue.claim(ROOM) or await worker.queue.claim(ROOM)
    assert ids(claims) == [request.id]
    await worker.queue.emit([(claims[0].attempt, a_token(request, 0, finish="stop"))])


async def test_what_an_idle_replica_holds_is_left_to_it_for_one_claim(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    holder, other = await rig.replica(), await rig.replica()
    first, again = a_request(a_prompt("1")), a_request(a_prompt("1", "?"))
    await accept(gateway, first)
    await hold(holder, first)
    await accept(gateway, again)
    await await_until(lambda: other.wakes == 3)  # when it came, and for each that was accepted
    assert await other.queue.claim(ROOM) == []
    assert other.wakes == 4, "it looks again at once"
    assert ids(await other.queue.claim(ROOM)) == [again.id]


@pytest.mark.parametrize("why", ["full", "busier", "another tenant's"])
async def test_nothing_is_left_to_a_replica_that_is_no_better(rig: Rig, why: str) -> None:
    gateway, _ = await rig.gateway()
    holder, other = await rig.replica(), await rig.replica()
    first = a_request(a_prompt("1"))
    await accept(gateway, first)
    await hold(holder, first)
    running = [a_request() for _ in range(5 if why == "busier" else 1)]
    await accept(gateway, *running)
    await holder.queue.claim(len(running) + (why != "full"))
    again = a_request(a_prompt("1", "?"), tenant="other" if why == "another tenant's" else first.tenant)
    await accept(gateway, again)
    assert ids(await other.queue.claim(ROOM)) == [again.id]


async def test_nothing_of_a_lower_priority_comes_before_what_is_left(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    holder, other = await rig.replica(), await rig.replica()
    first = a_request(a_prompt("1"))
    await accept(gateway, first)
    await hold(holder, first)
    left, behind = a_request(a_prompt("1", "?"), priority=1), a_request()
    await accept(gateway, left, behind)
    assert await other.queue.claim(1) == []
    assert ids(await other.queue.claim(1)) == [left.id]


async def test_what_is_known_of_prefixes_is_bounded(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    worker = await rig.replica()
    connection = await rig.connect()
    requests = [a_request(TextPrompt(f"{number:4}" * 1100)) for number in range(1100)]
    limits = bounds(model=QueueLimits(max_requests=2000))
    for at in range(0, len(requests), 100):
        await accept(gateway, *requests[at : at + 100], limits=limits)
        assert len(await worker.queue.claim(100)) == 100
    key = f"{rig.key_prefix}:prefixes:{QUEUE}"
    assert await connection.call("HLEN", key) == 4096
    assert 0 < await connection.call("TTL", key) <= 3600


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 1)),
        st.tuples(st.just("claim"), st.integers(0, 2), st.integers(1, 5)),
        st.tuples(st.just("finish"), st.integers(0, 2), st.just(0)),
    ),
    max_size=40,
)


@given(steps=STEPS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_who_comes_first_is_passed_over_a_bounded_number_of_times(
    redis_server: RedisServer, steps: list[tuple[str, list[int] | int, int]]
) -> None:
    asyncio.run(_passed_over(redis_server.url, steps))


async def _passed_over(url: str, steps: list[tuple[str, list[int] | int, int]]) -> None:
    """Whatever three replicas hold and claim: within a priority, at most the others of a window come before
    one that came sooner; nothing comes before a higher priority; and whoever waits is found in two claims."""
    async with AsyncExitStack() as stack:
        rig = Rig(url, "test-" + secrets.token_hex(6), stack)
        gateway, _ = await rig.gateway()
        workers = [await rig.replica() for _ in range(3)]
        waiting: dict[str, Request] = {}  # in order
        passed: Counter[str] = Counter()
        running: list[list[Claim]] = [[], [], []]

        async def claim(number: int, most: int) -> list[Claim]:
            claims = await workers[number].queue.claim(most)
            running[number] += claims
            order = list(waiting)
            for one in claims:
                request = waiting.pop(one.request.id)
                for name in order[: order.index(request.id)]:
                    if name in waiting and waiting[name].priority == request.priority:
                        passed[name] += 1
            if claims:
                least = min(one.request.priority for one in claims)
                assert all(request.priority <= least for request in waiting.values())
            return claims

        for what, first, second in steps:
            if isinstance(first, list):
                prompts = [a_prompt(str(each)) if each else TextPrompt("short") for each in first]
                requests = [a_request(prompt, priority=second) for prompt in prompts]
                await accept(gateway, *requests)
                waiting |= {request.id: request for request in requests}
            elif what == "claim":
                await claim(first, second)
            else:
                ended, running[first] = running[first], []
                await workers[first].queue.emit([(1, a_token(one, 0, finish="stop")) for one in ended])
        if waiting:
            assert await claim(0, 1) or await claim(0, 1)
        while waiting:
            await claim(1, 3)
        assert not passed or max(passed.values()) < WINDOW


async def test_what_four_replicas_hold_is_taken_in_its_order(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    workers = [await rig.replica() for _ in range(4)]
    for worker in workers:  # one after the other runs it, while those before have no room
        await accept(gateway, a_request(a_prompt("1")))
        assert len(await worker.queue.claim(1)) == 1
    first, second = a_request(), a_request(a_prompt("1", "?"))
    await accept(gateway, first, second)
    assert ids(await workers[0].queue.claim(1)) == [first.id]
    assert ids(await (await rig.replica()).queue.claim(1)) == [second.id]


async def test_what_four_replicas_held_long_ago_finds_a_place_again(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    workers = [await rig.replica() for _ in range(4)]
    for worker in workers:
        await accept(gateway, a_request(a_prompt("1")))
        assert len(await worker.queue.claim(1)) == 1
    last = workers[3].queue
    for _ in range(30):  # with the one above
        assert await last.claim(1) == []
    again, held, behind = a_request(a_prompt("1")), a_request(a_prompt("1", "?")), a_request()
    await accept(gateway, again)
    assert ids(await last.claim(2)) == [again.id]
    await accept(gateway, held, behind)
    assert ids(await workers[0].queue.claim(1)) == [behind.id]
    assert ids(await last.claim(1)) == [held.id]
