"""A replica's loop on a real queue, with the simulated engine."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.engine_requests import sampling_of
from tests.integration.serving.rig import (
    MODEL,
    REVISION,
    Ear,
    a_request,
    heard_from,
    open_ear,
    open_replica,
    undisturbed,
)
from tests.waiting import await_until
from tidegate.engines.base import EngineLoadError
from tidegate.messages.work import Sampling
from tidegate.store.connection import Connection
from tidegate.store.outcomes import OutcomeStore
from tidegate.store.registry import Registry


@pytest.fixture
async def ear(redis_url: str, key_prefix: str) -> AsyncIterator[Ear]:
    async with open_ear(redis_url, key_prefix) as ear:
        yield ear


async def test_answers_are_complete_in_order_and_exact(ear: Ear, redis_url: str, key_prefix: str) -> None:
    requests = [a_request(f"prompt {number}", max_tokens=5 + number % 30) for number in range(60)]
    async with open_replica(redis_url, key_prefix, slots=8):
        await ear.submit(*requests)
        finishes = await ear.ended(*requests)
    for request, finish in zip(requests, finishes, strict=True):
        assert await ear.text(request.id) == undisturbed(request)
        assert finish.reason == "length"
        assert finish.completion_tokens == sampling_of(request).max_tokens


async def test_requests_that_waited_before_the_replica_came_are_served(
    ear: Ear, redis_url: str, key_prefix: str
) -> None:
    request = a_request()
    await ear.submit(request)
    async with open_replica(redis_url, key_prefix):
        assert [finish.reason for finish in await ear.ended(request)] == ["length"]


async def test_a_stop_string_and_an_end_of_answer_end_with_stop(
    ear: Ear, redis_url: str, key_prefix: str
) -> None:
    plain = a_request(max_tokens=40)
    words = undisturbed(plain).split()
    stopped = a_request(sampling=Sampling(seed=7, max_tokens=40, stop=(" " + words[10],)))
    natural = a_request(max_tokens=None)
    async with open_replica(redis_url, key_prefix, engine_args={"answer_tokens": 6}):
        await ear.submit(stopped, natural)
        finishes = await ear.ended(stopped, natural)
    assert [finish.reason for finish in finishes] == ["stop", "stop"]
    assert await ear.text(stopped.id) == "".join(f" {word}" for word in words[:10])


async def test_each_end_is_counted_as_what_it_was(
    ear: Ear, redis_url: str, key_prefix: str, connection: Connection
) -> None:
    limited, natural = a_request(max_tokens=5), a_request(max_tokens=None)
    too_long, broken = a_request(max_tokens=1 << 23), a_request("boom")
    asked = [limited, natural, too_long, broken]
    engine_args = {"answer_tokens": 6, "test_fault": {"marker": "boom", "kind": "error", "at_token": 2}}
    async with open_replica(redis_url, key_prefix, engine_args=engine_args):
        await ear.submit(*asked)
        finishes = await ear.ended(*asked)
    assert [finish.reason for finish in finishes] == ["length", "stop", "error", "error"]
    found = (await OutcomeStore(connection, key_prefix).read([(MODEL, REVISION)]))[MODEL, REVISION]
    [(cohort, tally)] = found.items()
    assert (cohort, tally.ends) == ("", {"ok": 2, "length": 1, "error": 1})
    assert sum(tally.first_token.values()) == sum(tally.between_tokens.values()) == 3


async def test_no_more_is_claimed_than_slots_and_what_ends_next(
    ear: Ear, redis_url: str, key_prefix: str
) -> None:
    requests = [a_request(max_tokens=2000) for _ in range(10)]
    async with open_replica(redis_url, key_prefix, slots=3, drain_seconds=0.01) as replica:
        await ear.submit(*requests)
        await await_until(lambda: len(replica.loop._held) == 3)
        await heard_from(ear, requests[0], 20)
        assert len(replica.loop._held) == 3
        depth = await ear.queue.depth(MODEL, REVISION)
        assert (depth.waiting, depth.running) == (7, 3)


async def test_requests_for_one_token_are_not_hoarded(ear: Ear, redis_url: str, key_prefix: str) -> None:
    """Each ends with its very next token; what is claimed ahead of the slots is bounded all the same."""
    requests = [a_request("boom", max_tokens=1) for _ in range(10)]
    await ear.submit(*requests)
    fault = {"test_fault": {"marker": "boom", "kind": "hang"}}
    async with open_replica(redis_url, key_prefix, slots=2, engine_args=fault) as replica:
        loop = replica.loop
        await await_until(lambda: len(loop._held) >= 4 and loop._claiming is None)
        depth = await ear.queue.depth(MODEL, REVISION)
        loop._engine.close()  # lets the hanging step go
        assert (len(loop._held), depth.waiting) == (4, 6)


async def test_cancel_frees_the_slot_for_the_next(ear: Ear, redis_url: str, key_prefix: str) -> None:
    endless, following = a_request(max_tokens=4000), a_request(max_tokens=3)
    async with open_replica(redis_url, key_prefix, slots=1):
        await ear.submit(endless)
        await heard_from(ear, endless, 3)
        await ear.submit(following)
        await ear.queue.cancel([endless.id], "the client left")
        cancelled, served = await ear.ended(endless, following)
    assert (cancelled.reason, served.reason) == ("cancelled", "length")
    assert ear.tokens_of(endless) < 4000


async def test_draining_hands_back_and_another_continues_the_same_stream(
    ear: Ear, redis_url: str, key_prefix: str
) -> None:
    request = a_request(max_tokens=400)
    async with open_replica(redis_url, key_prefix, drain_seconds=0.01):
        await ear.submit(request)
        await heard_from(ear, request, 5)
    assert request.id not in ear.finished
    depth = await ear.queue.depth(MODEL, REVISION)
    assert (depth.waiting, depth.running) == (1, 0)
    async with open_replica(redis_url, key_prefix):
        await ear.ended(request)
    assert await ear.text(request.id) == undisturbed(request)


async def test_draining_lets_what_runs_finish(ear: Ear, redis_url: str, key_prefix: str) -> None:
    request = a_request(max_tokens=50)
    async with open_replica(redis_url, key_prefix, drain_seconds=20.0):
        await ear.submit(request)
        await heard_from(ear, request, 1)
    assert [finish.reason for finish in await ear.ended(request)] == ["length"]


async def test_a_request_that_cannot_run_ends_alone(ear: Ear, redis_url: str, key_prefix: str) -> None:
    too_long, good = a_request("x" * 200_000), a_request()
    async with open_replica(redis_url, key_prefix):
        await ear.submit(too_long, good)
        refused, served = await ear.ended(too_long, good)
    assert (refused.reason, refused.code) == ("error", "ContextLengthExceeded")
    assert served.reason == "length"


async def test_an_engine_that_crashes_hands_over_and_says_why(
    ear: Ear, connection: Connection, redis_url: str, key_prefix: str
) -> None:
    innocent, poison = a_request(max_tokens=300), a_request("boom", max_tokens=10)
    fault = {"test_fault": {"marker": "boom", "kind": "crash", "at_token": 2}}
    async with open_replica(redis_url, key_prefix, engine_args=fault) as replica:
        await ear.submit(innocent)
        await heard_from(ear, innocent, 3)
        await ear.submit(poison)
        crash = await replica.loop.ended
        assert replica.loop.trouble() == f"EngineCrashed: {crash.message}"
    assert crash.reason == "EngineCrashed"
    report = (await Registry(connection, key_prefix=key_prefix).reports())[(MODEL, REVISION)]
    assert (report.proved, report.reason, report.slots) == (False, "EngineCrashed", 8)
    depth = await ear.queue.depth(MODEL, REVISION)
    assert (depth.waiting, depth.running) == (2, 0)


async def test_a_poison_request_fails_and_the_innocent_survive(
    ear: Ear, redis_url: str, key_prefix: str
) -> None:
    innocents = [a_request(f"innocent {number}", max_tokens=200) for number in range(4)]
    poison = a_request("boom", max_tokens=10)
    fault = {"test_fault": {"marker": "boom", "kind": "crash", "at_token": 0}}
    await ear.submit(*innocents[:2], poison, *innocents[2:])
    deaths = 0
    while poison.id not in ear.finished:
        async with open_replica(redis_url, key_prefix, engine_args=fault) as replica:
            await await_until(lambda: replica.loop.ended.done() or poison.id in ear.finished)
            deaths += replica.loop.failure is not None  # set before the fault that ends the poison
    assert deaths == 2
    assert ear.finished[poison.id].code == "PoisonRequest"
    async with open_replica(redis_url, key_prefix, engine_args=fault):
        await ear.ended(*innocents)
    for request in innocents:
        assert await ear.text(request.id) == undisturbed(request)


async def test_an_engine_that_hangs_is_noticed(
    ear: Ear, connection: Connection, redis_url: str, key_prefix: str
) -> None:
    stuck = a_request("boom", max_tokens=10)
    fault = {"test_fault": {"marker": "boom", "kind": "hang", "at_token": 3}}
    replica_changes = {"engine_args": fault, "step_timeout_seconds": 0.4}
    async with open_replica(redis_url, key_prefix, **replica_changes) as replica:
        await ear.submit(stuck)
        crash = await replica.loop.ended
        replica.loop._engine.close()  # lets the hanging step go: a thread cannot be killed
    assert crash.reason == "EngineHung"
    report = (await Registry(connection, key_prefix=key_prefix).reports())[(MODEL, REVISION)]
    assert report.reason == "EngineHung"
    async with open_replica(redis_url, key_prefix):
        await ear.ended(stuck)
    report = (await Registry(connection, key_prefix=key_prefix).reports())[(MODEL, REVISION)]
    assert report.proved
    assert "EngineHung" in report.notes[0]
    assert await ear.text(stuck.id) == undisturbed(stuck)


async def test_arguments_that_the_engine_does_not_know_are_reported(
    connection: Connection, redis_url: str, key_prefix: str
) -> None:
    with pytest.raises(EngineLoadError):
        async with open_replica(redis_url, key_prefix, engine_args={"step_milliseconds": 2}):
            pass
    report = (await Registry(connection, key_prefix=key_prefix).reports())[(MODEL, REVISION)]
    assert (report.proved, report.reason) == (False, "InvalidEngineArgs")
    assert "step_milliseconds" in report.message


async def test_a_model_that_does_not_load_is_reported(
    connection: Connection, redis_url: str, key_prefix: str
) -> None:
    with pytest.raises(EngineLoadError):
        async with open_replica(redis_url, key_prefix, engine_args={"test_load_failure": "WeightsMissing"}):
            pytest.fail("it must not serve")
    report = (await Registry(connection, key_prefix=key_prefix).reports())[(MODEL, REVISION)]
    assert (report.proved, report.reason) == (False, "WeightsMissing")


YES: dict[str, Any] = {"words": ["yes"]}


async def test_a_replica_serves_once_its_probes_are_answered(
    ear: Ear, connection: Connection, redis_url: str, key_prefix: str
) -> None:
    probes = [{"prompt": "Well?", "expect": "yes"}, {"prompt": "Sure?", "pattern": "^yes"}]
    request = a_request(max_tokens=3)
    async with open_replica(redis_url, key_prefix, slots=1, engine_args=YES, probes=probes):
        await ear.submit(request)
        assert [finish.reason for finish in await ear.ended(request)] == ["length"]
    assert await ear.text(request.id) == "yesyesyes"
    found = (await OutcomeStore(connection, key_prefix).read([(MODEL, REVISION)]))[MODEL, REVISION]
    assert found[""].ends == {"ok": 1, "length": 1}


@pytest.mark.parametrize(
    ("probe", "engine_args", "words"),
    [
        ({"prompt": "Well?", "expect": "no", "max_tokens": 1}, YES, "expected the text 'no' and got 'yes'"),
        (
            {"prompt": "boom", "expect": "yes"},
            {"test_fault": {"marker": "boom", "kind": "crash"}},
            "The engine broke at a probe: ",
        ),
    ],
)
async def test_a_probe_that_fails_is_reported_and_nothing_is_served(
    connection: Connection,
    redis_url: str,
    key_prefix: str,
    probe: dict[str, Any],
    engine_args: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(EngineLoadError):
        async with open_replica(redis_url, key_prefix, engine_args=engine_args, probes=[probe]):
            pytest.fail("it must not serve")
    report = (await Registry(connection, key_prefix=key_prefix).reports())[(MODEL, REVISION)]
    assert (report.proved, report.reason, report.slots) == (False, "ProbeFailed", 0)
    assert words in report.message
    assert not any(thread.name == "engine" for thread in threading.enumerate())


async def test_the_proof_and_the_statistics_are_published(
    ear: Ear, connection: Connection, redis_url: str, key_prefix: str
) -> None:
    registry = Registry(connection, key_prefix=key_prefix)
    async with open_replica(redis_url, key_prefix, slots=5) as replica:
        stats = (await await_until(registry.replicas))[0]
        assert (stats.replica, stats.slots) == (replica.replica_id, 5)
        report = (await registry.reports())[(MODEL, REVISION)]
        assert (report.proved, report.slots, report.reason) == (True, 5, "")
    assert await registry.replicas() == []


async def test_since_when_it_is_idle_is_published(ear: Ear, redis_url: str, key_prefix: str) -> None:
    async with open_replica(redis_url, key_prefix, engine_args={"step_ms": 20.0}) as replica:
        fresh = replica.loop.stats()
        assert (fresh.idle_since, fresh.tokens_total) == (fresh.started, 0)
        request = a_request(max_tokens=40)
        await ear.submit(request)
        await heard_from(ear, request, tokens=1)
        assert replica.loop.stats().idle_since == 0
        await ear.ended(request)
        await await_until(lambda: replica.loop.stats().running == 0)
        assert replica.loop.stats().idle_since > fresh.idle_since


async def test_a_drained_replica_leaves_no_thread(redis_url: str, key_prefix: str) -> None:
    async with open_replica(redis_url, key_prefix):
        assert any(thread.name == "engine" for thread in threading.enumerate())
    assert not any(thread.name == "engine" for thread in threading.enumerate())
