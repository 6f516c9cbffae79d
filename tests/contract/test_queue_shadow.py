"""Copies for a revision that is tried out: paired with the client's end, in nobody's way, gone in the end."""

from __future__ import annotations

import pytest

from tests.contract.queue_rig import MODEL, REVISION, Rig, Worker, a_request, a_token, accept, bounds
from tests.waiting import await_until
from tidegate.gateway.calls import shadow_of
from tidegate.messages.outcomes import Tally
from tidegate.messages.queue import Bounds, Label, QueueLimits, Rejected
from tidegate.messages.work import ChatPrompt, Claim, Request
from tidegate.store.queue import GatewayQueue
from tidegate.store.scripts import MOST_SHADOWS

TARGET = "r2"
COHORT = "65f0.0"
SHADOWED = Label(COHORT, "", True)


async def submit(
    rig: Rig, gateway: GatewayQueue, request: Request, limits: Bounds | None = None
) -> Request | None:
    """Accept a shadowed request; returns the shadow where there was room for it."""
    limits = limits or bounds()
    await accept(gateway, request, limits=limits, label=SHADOWED)
    shadow = shadow_of(request, TARGET)
    is_taken = await gateway._scripts.shadow(request.id, shadow, limits, COHORT)
    return shadow if is_taken else None


async def finish(worker: Worker, ends: str, expected: str) -> None:
    [claim] = await worker.queue.claim(1)
    assert claim.request.id == expected
    reason = "error" if "error" in ends else "stop"
    segments = [(claim.attempt, a_token(claim, 0)), (claim.attempt, a_token(claim, 1, finish=reason))]  # type: ignore[arg-type]
    for segment in segments:
        assert await worker.queue.emit([segment], {expected: ends}) == []


async def keys(rig: Rig) -> set[str]:
    found = await (await rig.connect()).call("KEYS", rig.key_prefix + ":*")
    return {key.decode().removeprefix(rig.key_prefix + ":") for key in found}


@pytest.mark.parametrize("is_client_first", [True, False])
@pytest.mark.parametrize(
    ("stable", "target", "pair"),
    [
        ("ok", "ok", "00"),
        ("ok", "error", "01"),
        ("error", "ok", "10"),
        ("error", "error", "11"),
        ("", "ok", ""),
    ],
)
async def test_both_ends_make_a_pair_of_the_target(
    rig: Rig, stable: str, target: str, pair: str, is_client_first: bool
) -> None:
    gateway, ear = await rig.gateway()
    client, other = await rig.replica(), await rig.replica(revision=TARGET)
    request = a_request()
    shadow = await submit(rig, gateway, request)
    assert shadow is not None
    ends = [(client, stable, request.id), (other, target, shadow.id)]
    for each in ends if is_client_first else reversed(ends):
        await finish(*each)
    assert (await rig.outcomes(TARGET))[COHORT] == Tally({target: 1}, pairs={pair: 1} if pair else {})
    await await_until(lambda: ear.finish_of(request.id))
    assert {segment.request_id for segment in ear.segments} == {request.id}


async def test_a_shadow_leaves_nothing_and_is_charged_to_nobody(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    other = await rig.replica(revision=TARGET)
    request = a_request()
    shadow = await submit(rig, gateway, request)
    assert shadow is not None
    connection = await rig.connect()
    assert await connection.call("HGET", rig.key_prefix + ":tenant:default", "requests") == b"1"
    await finish(other, "ok t3", shadow.id)
    await gateway.cancel([request.id], "left")
    await gateway._scripts.forget([request.id])
    left = await keys(rig)
    assert {
        key for key in left if "shadow" in key or key.startswith(("req:", "log:", "pair:", "tenant:"))
    } == set()
    assert await connection.call("HGET", rig.key_prefix + ":total", "requests") == b"0"
    assert await connection.call("HGET", rig.key_prefix + ":total", "bytes") == b"0"


async def test_shadows_come_behind_everybody_and_are_few(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    other = await rig.replica(revision=TARGET)
    requests = [a_request() for _ in range(MOST_SHADOWS + 2)]
    taken = [await submit(rig, gateway, request) is not None for request in requests]
    assert taken == [True] * MOST_SHADOWS + [False] * 2
    client = a_request(revision=TARGET, priority=-999)
    await accept(gateway, client)
    claims = await other.queue.claim(2)
    assert [claim.request.id for claim in claims] == [client.id, requests[0].id + ".shadow"]


async def test_a_refused_shadow_makes_no_pair(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    client = await rig.replica()
    small = bounds(total_max_requests=2)
    request = a_request()
    assert await submit(rig, gateway, request, small) is None  # it would fill more than half
    await finish(client, "ok", request.id)
    assert {key for key in await keys(rig) if key.startswith("pair:")} == set()


async def test_a_client_that_leaves_before_its_shadow_comes_notes_nothing(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    request = a_request()
    await accept(gateway, request, label=SHADOWED)
    await gateway.cancel([request.id], "left")
    assert {key for key in await keys(rig) if key.startswith("pair:")} == set()


@pytest.mark.parametrize(
    "limits",
    [
        {"total_max_requests": 4},
        {"total_max_bytes": 4000},
        {"model": QueueLimits(max_requests=4)},
    ],
)
async def test_a_client_takes_the_place_of_shadows(rig: Rig, limits: dict[str, object]) -> None:
    gateway, _ = await rig.gateway()
    worker = await rig.replica(revision=TARGET)
    tight = bounds(**limits)
    shadowed = a_request()
    assert await submit(rig, gateway, shadowed) is not None
    accepted = []
    # Until nothing fits any more: the shadow has gone by then.
    while not isinstance(
        outcome := await gateway.submit([each := a_request(revision=TARGET)], tight), Rejected
    ):
        accepted.append(each.id)
    assert outcome.bound in ("total", "model")
    assert len(accepted) >= 2
    claims: list[Claim] = await worker.queue.claim(99)
    assert [claim.request.id for claim in claims] == accepted
    connection = await rig.connect()
    counted = await connection.call("HGET", f"{rig.key_prefix}:queue:{MODEL}--{TARGET}", "requests")
    assert int(counted) == len(accepted)


async def test_a_running_shadow_keeps_its_slot(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    other = await rig.replica(revision=TARGET)
    assert await submit(rig, gateway, a_request()) is not None
    [claim] = await other.queue.claim(1)
    outcome = await gateway.submit([a_request(revision=TARGET)], bounds(model=QueueLimits(max_requests=1)))
    assert isinstance(outcome, Rejected)
    assert await other.queue.emit([(claim.attempt, a_token(claim, 0, finish="stop"))]) == []


async def test_a_shadow_that_waits_too_long_is_nobodys_fault(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    sweeper, client = await rig.sweeper(), await rig.replica()
    request = a_request()
    shadow = await submit(rig, gateway, request)
    assert shadow is not None
    await (await rig.connect()).call("ZADD", rig.key_prefix + ":deadlines", "XX", 1, shadow.id)
    assert await sweeper.sweep() == 1
    await finish(client, "ok", request.id)
    assert await rig.outcomes(TARGET) == {}


async def test_shadows_do_not_move_to_another_revision(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    registry, client = await rig.registry(), await rig.replica()
    request = a_request()
    assert await submit(rig, gateway, request) is not None
    assert await registry.move_revision(MODEL, TARGET, REVISION, False) == 0
    assert [claim.request.id for claim in await client.queue.claim(9)] == [request.id]
    assert f"waiting:{MODEL}--{TARGET}" not in await keys(rig)


async def test_a_shadow_goes_on_when_its_replica_is_lost(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    one, two = await rig.replica(revision=TARGET), await rig.replica(revision=TARGET)
    shadow = await submit(rig, gateway, a_request())
    assert shadow is not None
    [claim] = await one.queue.claim(1)
    await one.queue.emit([(1, a_token(claim, 0))])
    await one.queue.fault([(claim.request.id, claim.attempt)], "crash")
    [again] = await two.queue.claim(1)
    assert (again.request, [segment.seq for segment in again.log]) == (shadow, [0])
    assert await two.queue.emit([(2, a_token(again, 1, finish="stop"))], {shadow.id: "ok"}) == []
    assert (await rig.outcomes(TARGET))[COHORT].ends == {"lost": 1, "ok": 1}


async def test_the_gateway_sends_shadows_by_itself(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    other = await rig.replica(revision=TARGET)
    requests = [a_request() for _ in range(5)]
    for request in requests:
        await accept(gateway, request, label=SHADOWED)
        assert gateway.takes_shadows
        gateway.shadow(request.id, shadow_of(request, TARGET), bounds(), COHORT)

    async def all_wait() -> bool:
        return (await gateway.depth(MODEL, TARGET)).waiting == len(requests)

    await await_until(all_wait)
    claims = await other.queue.claim(9)
    assert [claim.request.id for claim in claims] == [f"{request.id}.shadow" for request in requests]
    assert {claim.request.revision for claim in claims} == {TARGET}


async def test_a_shadow_may_hold_numbers_of_any_size(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    other = await rig.replica(revision=TARGET)
    request = a_request(ChatPrompt([{"role": "user", "content": "hi", "huge": 1 << 70}]))
    shadow = await submit(rig, gateway, request)
    assert shadow is not None
    [claim] = await other.queue.claim(1)
    assert claim.request.work == shadow.work
