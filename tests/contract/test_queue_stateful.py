"""Random histories of one queue: in whatever order things happen, the books balance and promises hold."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.contract.queue_rig import HELLO, MODEL, REVISION, Rig, Worker, a_request, a_token, bounds
from tests.redis_server import RedisServer
from tidegate.messages.codec import encode_request
from tidegate.messages.queue import Accepted, QueueLimits, Rejected
from tidegate.messages.work import TERMINAL_STATES, FinishReason, Prompt, Request, TextPrompt
from tidegate.store.connection import Connection
from tidegate.store.queue import GatewayQueue, Sweeper
from tidegate.store.registry import Registry

MAX_REQUESTS = 12  # of each queue
REPLICAS = 4
OTHER, OTHER_REPLICA = "r2", 3  # its revision; the others have the first
QUEUES = {revision: f"{MODEL}--{revision}" for revision in (REVISION, OTHER)}


@dataclass
class Expected:
    """What the history says of one request. `holder` is the replica that runs it."""

    request: Request
    revision: str  # in whose queue it is
    holder: int | None = None
    attempt: int = 0
    emitted: int = 0
    ended: str = ""
    old_attempts: list[tuple[int, int]] = field(default_factory=list)  # (replica, attempt)


class QueueHistory(RuleBasedStateMachine):
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.expected: dict[str, Expected] = {}

    def wait(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    @initialize()
    def open(self) -> None:
        self.wait(self._open())

    async def _open(self) -> None:
        self.rig = Rig(self.url, "test-" + secrets.token_hex(6), self.stack)
        self.gateway: GatewayQueue = (await self.rig.gateway())[0]
        revisions = [OTHER if number == OTHER_REPLICA else REVISION for number in range(REPLICAS)]
        self.replicas: list[Worker] = [await self.rig.replica(revision=each) for each in revisions]
        self.registry: Registry = await self.rig.registry()
        self.sweeper: Sweeper = await self.rig.sweeper()
        self.connection: Connection = await self.rig.connect()
        self.prefix = self.rig.key_prefix + ":"

    def teardown(self) -> None:
        self.wait(self.stack.aclose())
        self.runner.close()

    def running(self) -> list[Expected]:
        return [e for e in self.expected.values() if e.holder is not None]

    def open_ones(self) -> list[Expected]:
        return [e for e in self.expected.values() if not e.ended]

    @rule(
        count=st.integers(1, 4),
        priority=st.integers(-2, 2),
        tenant=st.sampled_from(["a", "b"]),
        revision=st.sampled_from([REVISION, REVISION, OTHER]),
        prompt=st.sampled_from([HELLO, TextPrompt("a" * 2000), TextPrompt("b" * 2000)]),
    )
    def submit(self, count: int, priority: int, tenant: str, revision: str, prompt: Prompt) -> None:
        requests = [
            a_request(prompt, priority=priority, tenant=tenant, key="of " + tenant, revision=revision)
            for _ in range(count)
        ]
        limits = bounds(model=QueueLimits(max_requests=MAX_REQUESTS))
        outcome = self.wait(self.gateway.submit(requests, limits))
        there = [e for e in self.open_ones() if e.revision == revision]
        fits = len(there) + count <= MAX_REQUESTS
        assert isinstance(outcome, Accepted if fits else Rejected)
        if fits:
            self.expected.update({request.id: Expected(request, revision) for request in requests})

    @rule(replica=st.integers(0, REPLICAS - 1), most=st.integers(1, 4), is_lost=st.booleans())
    def claim(self, replica: int, most: int, is_lost: bool) -> None:
        queue = self.replicas[replica].queue
        claims = self.wait(queue.claim(most))
        if is_lost and claims:
            queue._claim_number -= 1
            again = self.wait(queue.claim(most))
            assert [(c.request.id, c.attempt) for c in again] == [(c.request.id, c.attempt) for c in claims]
        assert len(claims) <= most
        for claim in claims:
            e = self.expected[claim.request.id]
            assert e.holder is None
            assert not e.ended
            assert e.revision == (OTHER if replica == OTHER_REPLICA else REVISION)
            assert claim.request == e.request
            assert claim.attempt > e.attempt
            assert [segment.seq for segment in claim.log] == list(range(e.emitted))
            e.holder, e.attempt = replica, claim.attempt

    @precondition(lambda self: self.running())
    @rule(data=st.data(), is_repeated=st.booleans())
    def emit(self, data: st.DataObject, is_repeated: bool) -> None:
        replica = data.draw(
            st.sampled_from(sorted({e.holder for e in self.running() if e.holder is not None}))
        )
        step = []
        for e in self.running():
            if e.holder == replica and data.draw(st.booleans()):
                reason: FinishReason | None = data.draw(st.sampled_from([None, None, None, "stop", "error"]))
                step.append((e.attempt, a_token(e.request, e.emitted, "x" * 1500, finish=reason)))
                e.emitted += 1
                if reason:
                    e.holder, e.ended = None, "done" if reason == "stop" else "failed"
        queue = self.replicas[replica].queue
        for _ in range(1 + is_repeated):
            assert self.wait(queue.emit(step)) == []

    @precondition(lambda self: any(e.old_attempts for e in self.expected.values()))
    @rule(data=st.data(), ahead=st.integers(-1, 2))
    def emit_stale(self, data: st.DataObject, ahead: int) -> None:
        e = data.draw(st.sampled_from([e for e in self.expected.values() if e.old_attempts]))
        replica, attempt = data.draw(st.sampled_from(e.old_attempts))
        seq = max(0, e.emitted + ahead)
        stale = self.wait(self.replicas[replica].queue.emit([(attempt, a_token(e.request, seq))]))
        assert stale == [e.request.id]

    @precondition(lambda self: self.running())
    @rule(data=st.data(), way=st.sampled_from(["hand_back", "fault", "expiry"]))
    def give_up(self, data: st.DataObject, way: str) -> None:
        e = data.draw(st.sampled_from(self.running()))
        assert e.holder is not None
        queue, lease = self.replicas[e.holder].queue, (e.request.id, e.attempt)
        if way == "expiry":
            self.wait(self.connection.call("ZADD", self.prefix + "leases", "XX", 1, e.request.id))
            assert self.wait(self.sweeper.sweep()) == 1
        else:
            self.wait(queue.hand_back([lease], "r") if way == "hand_back" else queue.fault([lease], "r"))
        e.old_attempts.append((e.holder, e.attempt))
        e.holder = None
        fields = ("state", "deaths")
        state, deaths = self.wait(self.connection.call("HMGET", self.prefix + "req:" + e.request.id, *fields))
        if state == b"failed":
            assert way != "hand_back"
            assert deaths == b"2"
            e.ended, e.emitted = "failed", e.emitted + 1

    @precondition(lambda self: self.expected)
    @rule(is_back=st.booleans(), may_continue=st.booleans())
    def move(self, is_back: bool, may_continue: bool) -> None:
        there, other = (OTHER, REVISION) if is_back else (REVISION, OTHER)
        assert self.wait(self.registry.move_revision(MODEL, there, other, may_continue)) == 0
        for e in self.open_ones():
            if e.holder is None and e.revision == there:
                if e.emitted and not may_continue:
                    e.ended, e.emitted = "failed", e.emitted + 1
                else:
                    e.revision = other

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        e = data.draw(st.sampled_from(list(self.expected.values())))
        self.wait(self.gateway.cancel([e.request.id], "left"))
        if not e.ended:
            if e.holder is not None:
                e.old_attempts.append((e.holder, e.attempt))
            e.holder, e.ended, e.emitted = None, "cancelled", e.emitted + 1

    @precondition(lambda self: any(not e.ended and e.holder is None for e in self.expected.values()))
    @rule(data=st.data())
    def pass_the_deadline(self, data: st.DataObject) -> None:
        waiting = [e for e in self.expected.values() if not e.ended and e.holder is None]
        e = data.draw(st.sampled_from(waiting))
        self.wait(self.connection.call("ZADD", self.prefix + "deadlines", "XX", 1, e.request.id))
        assert self.wait(self.sweeper.sweep()) == (0 if e.emitted else 1)
        if not e.emitted:  # one that has emitted reached its engine in time
            e.ended, e.emitted = "expired", 1

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "connection"):
            return
        self.wait(self._check())

    async def _check(self) -> None:
        call, prefix = self.connection.call, self.prefix
        waiting = {e.request.id for e in self.open_ones() if e.holder is None}
        running = {e.request.id for e in self.open_ones() if e.holder is not None}
        for revision, queue in QUEUES.items():
            placed = await call("ZRANGE", prefix + "waiting:" + queue, 0, -1)
            placed += await call("ZRANGE", prefix + "suspects:" + queue, 0, -1)
            expected = [i for i in waiting if self.expected[i].revision == revision]
            assert sorted(name.decode() for name in placed) == sorted(expected)
        assert {n.decode() for n in await call("ZRANGE", prefix + "leases", 0, -1)} == running
        held = [await call("HKEYS", f"{prefix}held:replica-{n}") for n in range(REPLICAS)]
        for number, names in enumerate(held):
            assert {n.decode() for n in names} == {e.request.id for e in self.running() if e.holder == number}
        assert {n.decode() for n in await call("SMEMBERS", prefix + "open:gw")} == waiting | running
        logged = {e.request.id: await call("STRLEN", f"{prefix}log:{e.request.id}") for e in self.open_ones()}
        written = {request_id: size - size % 4096 for request_id, size in logged.items()}
        sizes = {e.request.id: len(encode_request(e.request)) for e in self.open_ones()}
        open_ones = self.open_ones()
        counters = {"total": list(sizes)}
        for tenant in ("a", "b"):
            counters["tenant:" + tenant] = [e.request.id for e in open_ones if e.request.tenant == tenant]
        for revision, queue in QUEUES.items():
            there = [e for e in open_ones if e.revision == revision]
            counters["queue:" + queue] = [e.request.id for e in there]
            for tenant in ("a", "b"):
                ids = [e.request.id for e in there if e.request.tenant == tenant]
                counters[f"share:{queue}:of {tenant}"] = ids
        for key, ids in counters.items():
            counted = [int(n or 0) for n in await call("HMGET", prefix + key, "requests", "bytes", "written")]
            assert counted == [
                len(ids),
                *(sum(of[request_id] for request_id in ids) for of in (sizes, written)),
            ]
        logs = await asyncio.gather(*map(self.gateway.replay, self.expected))
        states = await asyncio.gather(*(call("HGET", f"{prefix}req:{i}", "state") for i in self.expected))
        for e, log, state in zip(self.expected.values(), logs, map(bytes.decode, states), strict=True):
            assert log is not None
            assert [segment.seq for segment in log] == list(range(e.emitted))
            assert [bool(segment.finish) for segment in log] == [
                bool(e.ended) and n == e.emitted - 1 for n in range(e.emitted)
            ]
            assert state == (e.ended or ("running" if e.holder is not None else "waiting"))
            assert (state in TERMINAL_STATES) == bool(e.ended)


@pytest.mark.timeout(240)
def test_random_histories_keep_every_promise(redis_server: RedisServer) -> None:
    machine = type("ThisQueueHistory", (QueueHistory,), {"url": redis_server.url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
