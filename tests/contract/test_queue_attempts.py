"""Leases, attempts, cancelling, giving back: who may write, and who runs what next. Q6 and Q8."""

from __future__ import annotations

from msgspec.structs import replace

from tests.contract.queue_rig import BY_HAND, MODEL, REVISION, Rig, Worker, a_request, a_token, accept
from tests.waiting import await_until
from tidegate.messages.work import Claim
from tidegate.store.sweeper import Sweeper

SHORT = 0.05


async def claimed_again(sweeper: Sweeper, worker: Worker) -> Claim:
    """The claim of the next attempt, once the former lease is over."""

    async def one() -> list[Claim]:
        await sweeper.sweep()
        return await worker.queue.claim(1)

    [claim] = await await_until(one)
    return claim


async def test_another_replica_continues_from_the_log_and_the_first_cannot_write(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    stalled, other = await rig.replica(times=replace(BY_HAND, lease_seconds=SHORT)), await rig.replica()
    request = a_request()
    await accept(gateway, request)
    await stalled.queue.claim(1)
    await stalled.queue.emit([(1, a_token(request, 0, "a")), (1, a_token(request, 1, "b"))])
    claim = await claimed_again(await rig.sweeper(), other)
    assert (claim.attempt, [segment.output.text for segment in claim.log]) == (2, ["a", "b"])
    assert await stalled.queue.renew([(request.id, 1)]) == [request.id]
    assert await stalled.queue.emit([(1, a_token(request, 2, "stale"))]) == [request.id]
    assert await other.queue.emit([(2, a_token(request, 2, "c", "stop"))]) == []
    assert await stalled.queue.emit([(1, a_token(request, 3, "stale"))]) == [request.id]
    await await_until(lambda: ear.finish_of(request.id))
    assert "".join(segment.output.text for segment in ear.segments) == "abc"
    assert await gateway.replay(request.id) == ear.segments


async def test_a_stale_attempt_cannot_write_while_the_request_waits(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    stalled = await rig.replica(times=replace(BY_HAND, lease_seconds=SHORT))
    request = a_request()
    await accept(gateway, request)
    await stalled.queue.claim(1)
    sweeper = await rig.sweeper()
    await await_until(sweeper.sweep)
    assert await stalled.queue.emit([(1, a_token(request, 0))]) == [request.id]
    assert await gateway.replay(request.id) == []


async def test_renewing_keeps_a_lease(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica, other = await rig.replica(), await rig.replica()
    kept, dropped = a_request(), a_request()
    await accept(gateway, kept, dropped)
    await replica.queue.claim(2)
    connection = await rig.connect()
    for request in (kept, dropped):  # both leases are as good as over
        await connection.call("ZADD", f"{rig.key_prefix}:leases", "XX", 1, request.id)
    assert await other.queue.renew([(dropped.id, 1)]) == [dropped.id]  # not its own
    assert await replica.queue.renew([(kept.id, 1)]) == []
    sweeper = await rig.sweeper()
    assert await sweeper.sweep() == 1
    assert await replica.queue.renew([(kept.id, 1), (dropped.id, 1)]) == [dropped.id]


async def test_an_emit_may_be_repeated(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    request = a_request()
    await accept(gateway, request)
    await replica.queue.claim(1)
    step = [(1, a_token(request, 0, "a")), (1, a_token(request, 1, "b"))]
    last = [(1, a_token(request, 2, "c", "stop"))]
    for segments in (step, step, last, last, step):
        assert await replica.queue.emit(segments) == []
    assert await replica.queue.emit([(1, a_token(request, 3, "past the end"))]) == [request.id]
    await await_until(lambda: ear.finish_of(request.id))
    assert [segment.seq for segment in ear.segments] == [0, 1, 2]
    assert await gateway.replay(request.id) == ear.segments


async def test_a_stale_segment_does_not_hold_up_the_others_of_its_step(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    fine, gone = a_request(), a_request()
    await accept(gateway, fine, gone)
    await replica.queue.claim(2)
    await gateway.cancel([gone.id], "left")
    step = [(1, a_token(gone, 0)), (1, a_token(fine, 0)), (7, a_token(fine, 1)), (1, a_token("unknown", 0))]
    assert await replica.queue.emit(step) == [gone.id, fine.id, "unknown"]
    await await_until(lambda: ear.of(fine.id))
    assert len(ear.of(fine.id)) == 1


async def test_a_gap_in_seq_sends_the_request_to_a_new_attempt(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    request = a_request()
    await accept(gateway, request)
    await replica.queue.claim(1)
    await replica.queue.emit([(1, a_token(request, 0, "a"))])
    assert await replica.queue.emit([(1, a_token(request, 2, "c"))]) == [request.id]
    [claim] = await replica.queue.claim(1)
    assert (claim.attempt, [segment.output.text for segment in claim.log]) == (2, ["a"])


async def test_cancelling_a_waiting_request_ends_it_at_once(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    request, behind = a_request(), a_request()
    await accept(gateway, request, behind)
    await gateway.cancel([request.id, "unknown"], "The client left.")
    await gateway.cancel([request.id], "again")
    assert [claim.request.id for claim in await replica.queue.claim(2)] == [behind.id]
    await await_until(lambda: ear.of(request.id))
    [segment] = ear.of(request.id)
    assert segment.finish is not None
    assert (segment.seq, segment.finish.reason, segment.finish.code) == (0, "cancelled", "Cancelled")
    assert segment.finish.message == "The client left."
    assert replica.cancelled == []


async def test_cancelling_a_running_request_tells_its_replica_and_frees_its_place(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    replica, other = await rig.replica(), await rig.replica()
    request = a_request()
    await accept(gateway, request)
    await replica.queue.claim(1)
    await replica.queue.emit([(1, a_token(request, 0, "a"))])
    await gateway.cancel([request.id], "The client left.")
    await await_until(lambda: replica.cancelled == [request.id])
    assert other.cancelled == []
    assert (await gateway.depth(MODEL, REVISION)).running == 0
    assert await replica.queue.emit([(1, a_token(request, 1, "late"))]) == [request.id]
    assert await replica.queue.renew([(request.id, 1)]) == [request.id]
    await await_until(lambda: ear.finish_of(request.id))
    assert [segment.output.text for segment in ear.segments] == ["a", ""]


async def test_handed_back_requests_keep_their_place_and_their_innocence(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica, other = await rig.replica(), await rig.replica()
    first, second, third = (a_request() for _ in range(3))
    await accept(gateway, first, second, third)
    for attempt in range(1, 6):
        claims = await replica.queue.claim(2)
        assert [(claim.request.id, claim.attempt) for claim in claims] == [
            (first.id, attempt),
            (second.id, attempt),
        ]
        await replica.queue.hand_back([(claim.request.id, claim.attempt) for claim in claims], "draining")
    claims = await other.queue.claim(3)
    assert [claim.request.id for claim in claims] == [first.id, second.id, third.id]


async def test_giving_back_names_the_attempt(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    await accept(gateway, a_request())
    [claim] = await replica.queue.claim(1)
    await replica.queue.hand_back([(claim.request.id, 7)], "not mine")
    assert await replica.queue.claim(1) == []
    await replica.queue.hand_back([(claim.request.id, 1)], "draining")
    await replica.queue.hand_back([(claim.request.id, 1)], "said twice")
    [again] = await replica.queue.claim(2)
    assert again.attempt == 2


async def test_a_claim_whose_answer_was_lost_is_answered_again(rig: Rig) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    requests = [a_request() for _ in range(3)]
    await accept(gateway, *requests)
    await replica.queue.claim(2)
    replica.queue._claim_number -= 1  # as if the answer had never come
    again = await replica.queue.claim(2)
    assert [claim.request.id for claim in again] == [requests[0].id, requests[1].id]
    assert [claim.attempt for claim in again] == [1, 1]
    replica.queue._claim_number -= 1
    [one] = await replica.queue.claim(1)  # the other is handed back: there is no slot for it
    assert one.request.id == requests[0].id
    assert [claim.request.id for claim in await replica.queue.claim(5)] == [requests[1].id, requests[2].id]


async def test_requests_of_a_gateway_that_does_not_come_back_are_cancelled(rig: Rig) -> None:
    dead, ear = await rig.gateway("dead")
    replica = await rig.replica()
    running, waiting = a_request(gateway="dead"), a_request(gateway="dead")
    await accept(dead, running, waiting)
    await replica.queue.claim(1)
    alive, _ = await rig.gateway("alive", replace(BY_HAND, orphan_seconds=0.1))
    own = a_request(gateway="alive")
    await accept(alive, own)
    sweeper = alive._sweeper  # the heartbeat of `alive` is part of its sweep
    await await_until(sweeper.sweep)
    await await_until(lambda: ear.finish_of(running.id) and ear.finish_of(waiting.id))
    assert {segment.finish.code for segment in ear.segments if segment.finish} == {"GatewayLost"}
    await await_until(lambda: replica.cancelled == [running.id])
    assert [claim.request.id for claim in await replica.queue.claim(5)] == [own.id]


async def test_after_a_pause_without_sweeps_nobody_is_taken_for_dead_at_once(rig: Rig) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    request = a_request()
    await accept(gateway, request)
    await replica.queue.claim(1)
    connection = await rig.connect()
    # Redis was away: the last sweep, the lease and the gateway's heartbeat are all long ago.
    prefix = rig.key_prefix + ":"
    await connection.call("HSET", prefix + "swept", "at", 1)
    await connection.call("ZADD", prefix + "leases", "XX", 1, request.id)
    await connection.call("ZADD", prefix + "gateways", "XX", 1, "gw")
    times = replace(BY_HAND, orphan_seconds=1, sweep_pause_seconds=60, sweep_grace_seconds=60)
    sweeper = await rig.sweeper(times)
    assert await sweeper.sweep() == 0
    assert await sweeper.sweep() == 0
    assert await replica.queue.renew([(request.id, 1)]) == []
    await connection.call("HSET", prefix + "swept", "grace", 1)
    assert await sweeper.sweep() == 1  # the gateway did not come back
    await await_until(lambda: ear.finish_of(request.id))
    assert await replica.queue.renew([(request.id, 1)]) == [request.id]
