"""Each end counts once, where and as what it should."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.contract.queue_rig import MODEL, QUEUE, REVISION, Rig, Worker, a_request, a_token, accept
from tidegate.messages.outcomes import Tally, cohort_of
from tidegate.messages.queue import NO_LABEL, Label
from tidegate.messages.registry import ReplicaStats
from tidegate.messages.work import Claim, FinishReason
from tidegate.store.outcomes import OutcomeStore
from tidegate.store.queue import GatewayQueue

COHORT = cohort_of("65f0", 15)


async def a_claim(gateway: GatewayQueue, worker: Worker, label: Label = NO_LABEL, **changes: Any) -> Claim:
    await accept(gateway, a_request(**changes), label=label)
    [claim] = await worker.queue.claim(1)
    return claim


async def end(worker: Worker, claim: Claim, ends: str, reason: FinishReason = "stop") -> None:
    segment = a_token(claim, len(claim.log), finish=reason)
    assert await worker.queue.emit([(claim.attempt, segment)], {claim.request.id: ends}) == []


async def test_ends_are_counted_by_the_cohort_at_admission(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    worker = await rig.replica()
    for label in (Label(COHORT), Label(COHORT), NO_LABEL):
        await end(worker, await a_claim(gateway, worker, label), "ok instant t40 i3")
    tally = Tally({"ok": 2, "instant": 2}, {40: 2}, {3: 2})
    assert await rig.outcomes() == {
        COHORT: tally,
        "": Tally({"ok": 1, "instant": 1}, {40: 1}, {3: 1}),
    }


async def test_an_emit_that_is_repeated_counts_once(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    worker = await rig.replica()
    claim = await a_claim(gateway, worker)
    for _ in range(2):
        await end(worker, claim, "ok t1")
    assert await rig.outcomes() == {"": Tally({"ok": 1}, {1: 1})}


async def test_what_ends_outside_an_engine_is_ours_or_counts_nowhere(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    worker, sweeper = await rig.replica(), await rig.sweeper()
    cancelled = a_request(tenant="a")
    await accept(gateway, cancelled)
    await gateway.cancel([cancelled.id], "left")
    assert await rig.outcomes() == {}
    await accept(gateway, a_request(tenant="a", deadline=1.0))
    await sweeper.sweep()
    assert await rig.outcomes() == {"": Tally({"error": 1})}
    poison = await a_claim(gateway, worker, tenant="b")
    await worker.queue.fault([(poison.request.id, poison.attempt)], "crash")
    other = await rig.replica()
    [again] = await other.queue.claim(1)
    await other.queue.fault([(again.request.id, again.attempt)], "crash")
    assert await rig.outcomes() == {"": Tally({"error": 2, "lost": 2})}


async def test_a_replica_is_lost_once_however_many_requests_it_ran(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    worker, sweeper = await rig.replica(), await rig.sweeper()
    await accept(gateway, *(a_request() for _ in range(3)), label=Label(COHORT))
    claims = await worker.queue.claim(3)
    await worker.queue.fault([(claims[0].request.id, 1)], "crash")
    connection = await rig.connect()
    for claim in claims[1:]:
        await connection.call("ZADD", rig.key_prefix + ":leases", "XX", 1, claim.request.id)
    assert await sweeper.sweep() == 2
    assert (await rig.outcomes())[COHORT].ends == {"lost": 1}


async def test_a_burst_of_errors_counts_once_per_tenant_over_all_revisions(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    old, new = await rig.replica(), await rig.replica(revision="r2")
    claims = [(old, await a_claim(gateway, old, tenant=tenant)) for tenant in ("a", "a", "b")]
    claims.append((new, await a_claim(gateway, new, tenant="a", revision="r2")))
    for worker, claim in claims:
        await end(worker, claim, "error", "error")
    assert await rig.outcomes() == {"": Tally({"error": 2, "again": 1})}
    assert await rig.outcomes("r2") == {"": Tally({"again": 1})}
    # The second is over.
    await (await rig.connect()).call("DEL", f"{rig.key_prefix}:burst:{MODEL}:a")
    await end(new, await a_claim(gateway, new, tenant="a", revision="r2"), "error", "error")
    assert await rig.outcomes("r2") == {"": Tally({"error": 1, "again": 1})}


async def test_of_a_session_one_error_counts(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    worker, connection = await rig.replica(), await rig.connect()
    for label in (Label("", "s1"), Label("", "s1"), Label("", "s2")):
        await end(worker, await a_claim(gateway, worker, label), "error", "error")
        await connection.call("DEL", f"{rig.key_prefix}:burst:{MODEL}:default")
    assert await rig.outcomes() == {"": Tally({"error": 2, "again": 1})}


async def test_of_a_session_the_first_request_stands_for_the_others_while_revisions_are_compared(
    rig: Rig,
) -> None:
    gateway, _ = await rig.gateway()
    worker = await rig.replica()
    for session in ("s1", "s1", "s2", ""):
        await end(worker, await a_claim(gateway, worker, Label(COHORT, session)), "ok length t40 i3")
        await end(worker, await a_claim(gateway, worker, Label("", session)), "ok length t40 i3")
    assert await rig.outcomes() == {
        COHORT: Tally({"ok": 4, "length": 3}, {40: 3}, {3: 3}),
        "": Tally({"ok": 4, "length": 4}, {40: 4}, {3: 4}),
    }
    # At another weight other sessions go to the target.
    label = Label(cohort_of("65f0", 50), "s1")
    await end(worker, await a_claim(gateway, worker, label), "ok t40")
    assert (await rig.outcomes())[label.cohort] == Tally({"ok": 1}, {40: 1})


async def test_of_a_session_s_requests_that_wait_one_is_seen(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    for session in ("s1", "s1", "s2", "", ""):
        await accept(gateway, a_request(), label=Label(COHORT, session))
    await accept(gateway, a_request(tenant="other"), label=Label(COHORT, "s1"))
    assert sum((await rig.outcomes())[COHORT].waiting_first.values()) == 5


async def test_who_waits_for_a_first_token_is_seen_wherever_it_is(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    worker, registry = await rig.replica(), await rig.registry()
    name = worker.queue._replica_id
    await registry.beat(ReplicaStats(name, MODEL, REVISION, 1, "node", 1.0, 2.0, 8, 2, 0, 0.0))
    spoken, silent = [await a_claim(gateway, worker, Label(COHORT)) for _ in range(2)]
    await worker.queue.emit([(1, a_token(spoken, 0))])
    waiting = a_request()
    await accept(gateway, waiting)
    connection = await rig.connect()
    for request_id, age_seconds in ((silent.request.id, 100), (waiting.id, 10_000)):
        key = f"{rig.key_prefix}:req:{request_id}"
        created = float(await connection.call("HGET", key, "created"))
        await connection.call("HSET", key, "created", created - age_seconds)
    found = await rig.outcomes()
    assert {cohort: sum(tally.waiting_first.values()) for cohort, tally in found.items()} == {
        COHORT: 1,
        "": 1,
    }
    [(young, _)], [(old, _)] = found[COHORT].waiting_first.items(), found[""].waiting_first.items()
    assert 60 < young < old


async def test_a_rollout_that_is_over_is_forgotten_with_those_before_it(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    worker = await rig.replica()
    for rollout in ("65f0", "65f1", "65f2", ""):
        label = Label(cohort_of(rollout, 50)) if rollout else NO_LABEL
        await end(worker, await a_claim(gateway, worker, label), "ok t7")
    await OutcomeStore(await rig.connect(), rig.key_prefix).forget([(MODEL, REVISION)], "65f1")
    assert set(await rig.outcomes()) == {cohort_of("65f2", 50), ""}


@pytest.mark.parametrize("is_last_running", [False, True])
async def test_a_queue_takes_its_counters_along(rig: Rig, is_last_running: bool) -> None:
    gateway, _ = await rig.gateway()
    worker, registry = await rig.replica(), await rig.registry()
    await end(worker, await a_claim(gateway, worker), "ok")
    last = await a_claim(gateway, worker)
    if not is_last_running:
        await end(worker, last, "ok")
    await registry.drop_revision(MODEL, REVISION, "gone")
    if is_last_running:
        await end(worker, last, "ok")
    assert await (await rig.connect()).call("EXISTS", f"{rig.key_prefix}:outcomes:{QUEUE}") == 0


async def test_ends_of_many_at_once_are_all_counted(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    workers = [await rig.replica() for _ in range(3)]
    await asyncio.gather(*(accept(gateway, a_request(), label=Label(COHORT)) for _ in range(90)))
    claims = [await worker.queue.claim(30) for worker in workers]
    await asyncio.gather(
        *(
            worker.queue.emit(
                [(claim.attempt, a_token(claim, 0, finish="length")) for claim in mine],
                {claim.request.id: f"ok length t{number % 5}" for number, claim in enumerate(mine)},
            )
            for worker, mine in zip(workers, claims, strict=True)
        )
    )
    assert await rig.outcomes() == {
        COHORT: Tally({"ok": 90, "length": 90}, dict.fromkeys(range(5), 18)),
    }
