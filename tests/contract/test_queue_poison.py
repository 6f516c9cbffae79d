"""A request that kills replicas ends, and takes no innocent with it."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.queue_rig import MODEL, REVISION, Rig, Worker, a_request, a_token, accept
from tests.waiting import await_until
from tidegate.messages.work import Claim, Request


async def die(rig: Rig, worker: Worker, claims: list[Claim], way: str) -> None:
    """The replica fails with what it holds: it says so itself, or its leases expire."""
    leases = [(claim.request.id, claim.attempt) for claim in claims]
    if way == "fault":
        await worker.queue.fault(leases, "the engine crashed")
        return
    sweeper = await rig.sweeper()
    for lease in leases:  # judged one by one, in any order, as leases expire
        connection = await rig.connect()
        await connection.call("ZADD", f"{rig.key_prefix}:leases", "XX", 1, lease[0])
        assert await sweeper.sweep() == 1


@pytest.mark.parametrize("way", ["fault", "expiry"])
async def test_poison_ends_after_two_deaths_and_the_innocents_of_its_batch_survive(
    rig: Rig, way: str
) -> None:
    gateway, ear = await rig.gateway()
    poison, *innocents = (a_request() for _ in range(6))
    await accept(gateway, *innocents[:3], poison, *innocents[3:])
    deaths = 0
    done: set[str] = set()
    while ear.finish_of(poison.id) is None:
        replica = await rig.replica()
        held: list[Claim] = []
        while claims := await replica.queue.claim(8):
            held += claims
            if any(claim.request.id == poison.id for claim in held):
                deaths += 1
                await die(rig, replica, held, way)
                break
            await replica.queue.emit([(claim.attempt, a_token(claim, 0, finish="stop")) for claim in claims])
            done |= {claim.request.id for claim in claims}
            held = []
        assert deaths <= 2
        if deaths == 2:
            await await_until(lambda: ear.finish_of(poison.id))
    finish = ear.finish_of(poison.id)
    assert finish is not None
    assert (finish.reason, finish.code) == ("error", "PoisonRequest")
    last = await rig.replica()
    while claims := await last.queue.claim(8):
        await last.queue.emit([(claim.attempt, a_token(claim, 0, finish="stop")) for claim in claims])
        done |= {claim.request.id for claim in claims}
    assert done == {request.id for request in innocents}
    assert (await gateway.depth(MODEL, REVISION)).waiting == 0


@pytest.mark.parametrize("way", ["fault", "expiry"])
async def test_a_replica_holds_one_suspect_at_a_time(rig: Rig, way: str) -> None:
    gateway, _ = await rig.gateway()
    first, second, fresh = (a_request() for _ in range(3))
    await accept(gateway, first, second)
    killed = await rig.replica()
    await die(rig, killed, await killed.queue.claim(2), way)
    await accept(gateway, fresh)
    replica, other = await rig.replica(), await rig.replica()
    held = await replica.queue.claim(8)
    assert {claim.request.id for claim in held} == {first.id, fresh.id}
    assert await replica.queue.claim(8) == []
    wakes = replica.wakes
    await replica.queue.emit([(2, a_token(first, 0))])  # its first new segment clears it
    await await_until(lambda: replica.wakes > wakes)
    assert [claim.request.id for claim in await replica.queue.claim(8)] == [second.id]
    assert await other.queue.claim(8) == []


@pytest.mark.parametrize("way", ["fault", "expiry"])
async def test_who_dies_with_a_suspect_is_not_blamed(rig: Rig, way: str) -> None:
    gateway, _ = await rig.gateway()
    poison = a_request()
    await accept(gateway, poison)
    killed = await rig.replica()
    await die(rig, killed, await killed.queue.claim(1), way)
    beside = [a_request(), a_request()]
    await accept(gateway, *beside)
    killed = await rig.replica()
    held = await killed.queue.claim(8)
    assert held[0].request.id == poison.id
    await die(rig, killed, held, way)  # the suspect first: its note must outlive its own end
    replica = await rig.replica()
    assert [claim.request.id for claim in await replica.queue.claim(8)] == [r.id for r in beside]


async def test_a_request_that_makes_progress_is_not_blamed_for_a_death(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    request = a_request()
    await accept(gateway, request)
    for attempt in (1, 2):
        replica = await rig.replica()
        [claim] = await replica.queue.claim(1)
        await replica.queue.emit([(attempt, a_token(request, attempt - 1))])
        await replica.queue.fault([(request.id, attempt)], "the engine crashed")
    replica = await rig.replica()
    [claim] = await replica.queue.claim(1)
    assert claim.attempt == 3
    assert ear.finish_of(request.id) is None


async def test_poison_further_down_a_stream_ends_too(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    request = a_request()
    await accept(gateway, request)
    for attempt in range(1, 6):
        replica = await rig.replica()
        assert len(await replica.queue.claim(1)) == 1
        await replica.queue.emit([(attempt, a_token(request, attempt - 1))])
        await replica.queue.fault([(request.id, attempt)], "the engine crashed")
    finish = await await_until(lambda: ear.finish_of(request.id))
    assert finish is not None
    assert finish.code == "PoisonRequest"


async def test_cancelling_a_suspect_lets_its_replica_take_the_next(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    first, second = a_request(), a_request()
    await accept(gateway, first, second)
    killed = await rig.replica()
    await die(rig, killed, await killed.queue.claim(2), "fault")
    replica = await rig.replica()
    [claim] = await replica.queue.claim(8)
    await gateway.cancel([claim.request.id], "left")
    [claim] = await replica.queue.claim(8)
    assert claim.request.id == second.id


async def test_suspects_wait_at_their_old_place(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    suspect = a_request()
    await accept(gateway, suspect)
    killed = await rig.replica()
    await die(rig, killed, await killed.queue.claim(1), "fault")
    ahead: list[Request] = [a_request(priority=1), a_request(priority=1)]
    behind = a_request()
    await asyncio.gather(*(accept(gateway, request) for request in (*ahead, behind)))
    replica = await rig.replica()
    order = [claim.request.id for _ in range(4) for claim in await replica.queue.claim(1)]
    assert order == [*(request.id for request in ahead), suspect.id, behind.id]
