"""What waits for a revision that goes waits for another one: none is lost, none answered twice."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.queue_rig import MODEL, QUEUE, REVISION, Rig, a_request, a_token, accept
from tests.waiting import await_until
from tidegate.messages.outcomes import Tally
from tidegate.messages.queue import Depth, Label, Place
from tidegate.store.queue import QueueDepths

OTHER = "r2"


async def counters(rig: Rig, *names: str) -> list[tuple[int, int, int]]:
    connection = await rig.connect()
    found = [
        await connection.call("HMGET", f"{rig.key_prefix}:{name}", "requests", "bytes", "written")
        for name in names
    ]
    return [tuple(int(value or 0) for value in values) for values in found]  # type: ignore[misc]


async def test_requests_move_in_their_order_among_those_who_wait_there(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    registry, stable = await rig.registry(), await rig.replica(revision=OTHER)
    requests = [a_request(revision=(REVISION, OTHER)[number % 2]) for number in range(40)]
    urgent = a_request(priority=1)
    for request in (*requests, urgent):
        await accept(gateway, request)
    wakes = stable.wakes
    assert await registry.move_revision(MODEL, REVISION, OTHER, False) == 0
    await await_until(lambda: stable.wakes > wakes)
    claims = await stable.queue.claim(100)
    assert [claim.request.id for claim in claims] == [request.id for request in (urgent, *requests)]


async def test_the_books_balance_after_a_move_and_deadlines_stand(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    registry, stable, sweeper = await rig.registry(), await rig.replica(revision=OTHER), await rig.sweeper()
    request, late = a_request(key="k"), a_request(key="k", deadline=1.0)
    await accept(gateway, request, late, label=Label("65f0.15"))
    names = [f"queue:{QUEUE}", f"share:{QUEUE}:k", f"queue:{MODEL}--{OTHER}", f"share:{MODEL}--{OTHER}:k"]
    before = await counters(rig, *names, "tenant:default", "total")
    assert await registry.move_revision(MODEL, REVISION, OTHER, False) == 0
    nothing = (0, 0, 0)
    assert await counters(rig, *names, "tenant:default", "total") == [
        nothing,
        nothing,
        before[0],
        before[1],
        before[4],
        before[5],
    ]
    await sweeper.sweep()
    await await_until(lambda: ear.finish_of(late.id))
    [claim] = await stable.queue.claim(8)
    await stable.queue.emit([(claim.attempt, a_token(claim, 0, finish="stop"))], {request.id: "ok"})
    assert await counters(rig, *names, "tenant:default", "total") == [nothing] * 6
    # The cohort was of the revision that they did not get to.
    assert await rig.outcomes(OTHER) == {"": Tally({"ok": 1, "error": 1})}
    assert await rig.outcomes() == {}


@pytest.mark.parametrize("may_continue", [False, True])
async def test_an_answer_that_has_begun_goes_on_only_where_it_may(rig: Rig, may_continue: bool) -> None:
    gateway, ear = await rig.gateway()
    registry, bad, stable = await rig.registry(), await rig.replica(), await rig.replica(revision=OTHER)
    begun, untouched = a_request(), a_request()
    await accept(gateway, begun, untouched)
    claims = await bad.queue.claim(2)
    await bad.queue.emit([(1, a_token(begun, 0, "x" * 9000))])
    assert await registry.move_revision(MODEL, REVISION, OTHER, may_continue) == 0
    assert await stable.queue.claim(8) == []  # what runs is left alone
    await bad.queue.hand_back([(claim.request.id, claim.attempt) for claim in claims], "stopped")
    assert await registry.move_revision(MODEL, REVISION, OTHER, may_continue) == 0
    again = {claim.request.id: claim for claim in await stable.queue.claim(8)}
    assert again[untouched.id].log == []
    if may_continue:
        assert [segment.seq for segment in again[begun.id].log] == [0]
    else:
        assert begun.id not in again
        await await_until(lambda: ear.finish_of(begun.id))
        finish = ear.finish_of(begun.id)
        assert finish is not None
        assert (finish.reason, finish.code) == ("error", "RevisionAborted")
        assert "rolled back" in finish.message
    ends = [(claim.attempt, a_token(claim, len(claim.log), finish="stop")) for claim in again.values()]
    assert await stable.queue.emit(ends) == []
    await await_until(lambda: ear.finish_of(begun.id) and ear.finish_of(untouched.id))
    assert [segment.seq for segment in ear.of(begun.id)] == [0, 1]
    assert await counters(rig, f"queue:{QUEUE}", f"queue:{MODEL}--{OTHER}", "total") == [(0, 0, 0)] * 3


async def test_a_suspect_stays_one(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    registry, bad, stable = await rig.registry(), await rig.replica(), await rig.replica(revision=OTHER)
    await accept(gateway, *(a_request() for _ in range(2)))
    claims = await bad.queue.claim(2)
    await bad.queue.fault([(claim.request.id, claim.attempt) for claim in claims], "crash")
    assert await registry.move_revision(MODEL, REVISION, OTHER, False) == 0
    assert len(await stable.queue.claim(8)) == 1  # a replica holds at most one suspect


async def test_a_moved_request_still_knows_its_place(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    registry = await rig.registry()
    ahead, mine = a_request(revision=OTHER), a_request()
    await accept(gateway, ahead)
    await accept(gateway, mine)
    await registry.move_revision(MODEL, REVISION, OTHER, False)
    assert await gateway.places([(mine.id, MODEL, REVISION), (ahead.id, MODEL, OTHER)]) == [
        Place(1, Depth(2, 0, 0.0)),
        Place(0, Depth(2, 0, 0.0)),
    ]
    depths = QueueDepths(await rig.connect(), key_prefix=rig.key_prefix)
    assert await depths.poll([(MODEL, REVISION), (MODEL, OTHER)]) == {
        (MODEL, REVISION): Depth(0, 0, 0.0),
        (MODEL, OTHER): Depth(2, 0, 0.0),
    }


async def test_nothing_is_lost_or_answered_twice_while_all_go_on(rig: Rig) -> None:
    """Submits, claims on both sides, ends and moves interleave as they like."""
    gateway, ear = await rig.gateway()
    registry, bad, stable = await rig.registry(), await rig.replica(), await rig.replica(revision=OTHER)
    requests = [a_request() for _ in range(600)]
    is_submitted = False

    async def submit() -> None:
        nonlocal is_submitted
        for at in range(0, len(requests), 20):
            await asyncio.gather(*(accept(gateway, request) for request in requests[at : at + 20]))
        is_submitted = True

    async def move() -> None:
        while not is_submitted or await registry.move_revision(MODEL, REVISION, OTHER, True):
            await registry.move_revision(MODEL, REVISION, OTHER, True)

    async def claim_and_give_back() -> None:
        while not is_submitted:
            claims = await bad.queue.claim(7)
            leases = [(claim.request.id, claim.attempt) for claim in claims]
            await bad.queue.emit([(claim.attempt, a_token(claim, len(claim.log))) for claim in claims[::2]])
            await bad.queue.hand_back(leases, "stopped")

    async def serve() -> None:
        while sum(segment.finish is not None for segment in ear.segments) < len(requests):
            claims = await stable.queue.claim(16)
            await stable.queue.emit(
                [(claim.attempt, a_token(claim, len(claim.log), finish="stop")) for claim in claims]
            )

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        serving = group.create_task(serve())
        await asyncio.gather(submit(), move(), claim_and_give_back())
        await registry.move_revision(MODEL, REVISION, OTHER, True)
        await serving
    for request in requests:
        heard = ear.of(request.id)
        assert [segment.seq for segment in heard] == list(range(len(heard)))
        assert [segment.finish is not None for segment in heard] == [False] * (len(heard) - 1) + [True]
    assert await counters(rig, f"queue:{QUEUE}", f"queue:{MODEL}--{OTHER}", "total") == [(0, 0, 0)] * 3
