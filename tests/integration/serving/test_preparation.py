"""A replica's loop while requests are being prepared: whatever happens to them, no other one notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.checkpoints import CHAT_TEMPLATE, tiny
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
from tidegate.engines.base import Engine, Prepared, StepOutput
from tidegate.engines.simulated import SimulatedEngine
from tidegate.messages.work import (
    ChatPrompt,
    Claim,
    Detokenize,
    Finish,
    Generate,
    Request,
    Sampling,
    Segment,
    TextPrompt,
    Tokenize,
    TokenPrompt,
    Tokens,
)
from tidegate.replica_args import EngineSpec
from tidegate.serving import process
from tidegate.store.replica_queue import ReplicaQueue

LOOP = (
    "{% if messages[0]['content'] == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}"
)


class Hesitant(SimulatedEngine):
    """Prepares a prompt "slow" only when `gate` opens, and raises at one that is "broken"."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.gate = asyncio.Event()
        self.preparing: list[str] = []
        self.seen: list[str] = []

    async def prepare(self, request: Request) -> Prepared | Tokens | Finish:
        prompt = request.work.prompt
        assert isinstance(prompt, TextPrompt)
        if prompt.text == "slow":
            self.preparing.append(request.id)
            await self.gate.wait()
        if prompt.text == "broken":
            raise LookupError(prompt.text)
        return await super().prepare(request)

    def add(self, prepared: Prepared, log: list[Segment]) -> StepOutput | None:
        self.seen.append(prepared.request.id)
        return super().add(prepared, log)


@pytest.fixture
def hesitant(monkeypatch: pytest.MonkeyPatch) -> list[Hesitant]:
    """The engines that replicas of this test make."""
    made: list[Hesitant] = []

    def create(spec: EngineSpec, _record: Path | None) -> Engine:
        made.append(Hesitant(spec))
        return made[-1]

    monkeypatch.setattr(process, "create_engine", create)
    return made


@pytest.fixture
async def ear(redis_url: str, key_prefix: str) -> AsyncIterator[Ear]:
    async with open_ear(redis_url, key_prefix) as ear:
        yield ear


async def test_a_slow_preparation_holds_its_slot_and_nobody_up(
    hesitant: list[Hesitant], ear: Ear, redis_url: str, key_prefix: str
) -> None:
    slow = [a_request("slow") for _ in range(2)]
    quick = [a_request(f"quick {number}") for number in range(12)]
    async with open_replica(redis_url, key_prefix, slots=3) as replica:
        await ear.submit(*slow)
        await await_until(lambda: len(hesitant[0].preparing) == 2)
        await ear.submit(*quick)
        await ear.ended(*quick)
        assert replica.loop._slots.room() == 1
        assert replica.loop._thread.busy_since is None  # so it is not hung either
        hesitant[0].gate.set()
        await ear.ended(*slow)
    for request in (*slow, *quick):
        assert await ear.text(request.id) == undisturbed(request)


async def test_no_more_is_claimed_than_slots_while_all_are_being_prepared(
    hesitant: list[Hesitant], ear: Ear, redis_url: str, key_prefix: str
) -> None:
    slow = [a_request("slow", max_tokens=1) for _ in range(8)]
    async with open_replica(redis_url, key_prefix, slots=3) as replica:
        await ear.submit(*slow)
        await await_until(lambda: len(hesitant[0].preparing) == 3 and replica.loop._claiming is None)
        depth = await ear.queue.depth(MODEL, REVISION)
        assert (depth.waiting, depth.running) == (5, 3)
        hesitant[0].gate.set()
        await ear.ended(*slow)


async def test_a_cancelled_preparation_frees_its_slot_and_never_reaches_the_engine(
    hesitant: list[Hesitant], ear: Ear, redis_url: str, key_prefix: str
) -> None:
    slow, following = a_request("slow"), a_request()
    async with open_replica(redis_url, key_prefix, slots=1):
        await ear.submit(slow)
        await await_until(lambda: hesitant[0].preparing)
        await ear.submit(following)
        await ear.queue.cancel([slow.id], "the client left")
        cancelled, served = await ear.ended(slow, following)
        assert (cancelled.reason, served.reason) == ("cancelled", "length")
        hesitant[0].gate.set()
    assert hesitant[0].seen == [following.id]


async def test_a_request_whose_lease_is_lost_while_it_is_prepared_is_given_up(
    hesitant: list[Hesitant], ear: Ear, redis_url: str, key_prefix: str
) -> None:
    slow = a_request("slow")
    async with open_replica(redis_url, key_prefix, slots=1) as replica:
        await ear.submit(slow)
        await await_until(lambda: hesitant[0].preparing)
        held = replica.loop._held[slow.id]
        await replica.loop._queue.hand_back([(slow.id, held.attempt)], "taken from it")
        # Its next renewal tells, and it is claimed anew: by a later attempt, which alone is prepared on.
        await await_until(lambda: len(hesitant[0].preparing) == 2)
        assert replica.loop._held[slow.id].attempt > held.attempt
        hesitant[0].gate.set()
        await ear.ended(slow)
    assert hesitant[0].seen == [slow.id]
    assert await ear.text(slow.id) == undisturbed(slow)


async def test_draining_hands_back_what_is_still_being_prepared(
    hesitant: list[Hesitant], ear: Ear, redis_url: str, key_prefix: str
) -> None:
    slow = a_request("slow")
    async with open_replica(redis_url, key_prefix, drain_seconds=0.01):
        await ear.submit(slow)
        await await_until(lambda: hesitant[0].preparing)
    depth = await ear.queue.depth(MODEL, REVISION)
    assert (depth.waiting, depth.running) == (1, 0)
    assert hesitant[0].seen == []


async def test_draining_lets_a_preparation_finish(
    hesitant: list[Hesitant], ear: Ear, redis_url: str, key_prefix: str
) -> None:
    slow = a_request("slow")
    async with open_replica(redis_url, key_prefix, drain_seconds=20.0) as replica:
        await ear.submit(slow)
        await await_until(lambda: hesitant[0].preparing)
        draining = asyncio.create_task(replica.loop.drain())
        await await_until(lambda: not replica.loop._can_claim)
        hesitant[0].gate.set()
        await draining
    assert [finish.reason for finish in await ear.ended(slow)] == ["length"]


async def test_an_engine_that_crashes_blames_nothing_that_it_never_saw(
    hesitant: list[Hesitant], ear: Ear, redis_url: str, key_prefix: str
) -> None:
    """Twice, which would make a poison of it."""
    fault = {"test_fault": {"marker": "boom", "kind": "crash", "at_token": 0}}
    slow = a_request("slow")
    await ear.submit(slow)
    for _ in range(2):
        async with open_replica(redis_url, key_prefix, engine_args=fault) as replica:
            await await_until(lambda: hesitant[-1].preparing)
            poison = a_request("boom")
            await ear.submit(poison)
            await replica.loop.ended
            assert replica.loop.failure is not None
            await ear.queue.cancel([poison.id], "enough of it")
    async with open_replica(redis_url, key_prefix):
        hesitant[-1].gate.set()
        await ear.ended(slow)
    assert await ear.text(slow.id) == undisturbed(slow)


async def test_a_preparation_that_raises_loses_only_its_request(
    hesitant: list[Hesitant], ear: Ear, redis_url: str, key_prefix: str
) -> None:
    broken, good = a_request("broken"), a_request()
    async with open_replica(redis_url, key_prefix, slots=1):
        await ear.submit(broken, good)
        refused, served = await ear.ended(broken, good)
    assert (refused.reason, refused.code, served.reason) == ("error", "EngineError", "length")
    assert "LookupError" in refused.message


async def test_a_claim_that_comes_back_after_the_failure_is_handed_back_at_once(
    ear: Ear, redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not left to its lease, which here outlives the test."""
    claimed, gate = asyncio.Event(), asyncio.Event()
    claim = ReplicaQueue.claim

    async def held_up(queue: ReplicaQueue, most: int) -> list[Claim]:
        claims = await claim(queue, most)
        if any(one.request.id == late.id for one in claims):
            claimed.set()
            await gate.wait()
        return claims

    monkeypatch.setattr(ReplicaQueue, "claim", held_up)
    fault = {"test_fault": {"marker": "boom", "kind": "crash", "at_token": 50}}
    poison, late = a_request("boom", max_tokens=100), a_request()
    async with open_replica(redis_url, key_prefix, engine_args=fault, lease_seconds=3600.0) as replica:
        await ear.submit(poison)
        await heard_from(ear, poison, 1)
        await ear.submit(late)
        await claimed.wait()
        await await_until(lambda: replica.loop.failure is not None)
        gate.set()
        await replica.loop.ended
        await await_until(lambda: replica.loop._claiming is None)
        depth = await ear.queue.depth(MODEL, REVISION)
    assert (depth.waiting, depth.running) == (2, 0)


async def test_streams_go_on_while_a_template_loops_and_megabytes_are_refused(
    ear: Ear, redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    folder = tiny(tmp_path / "llama", "llama")
    (folder / "chat_template.jinja").write_text(LOOP + CHAT_TEMPLATE)
    engine = {"name": "transformers", "path": str(folder), "precision": "float32", "max_slots": 4}
    engine["args"] = {"threads": 1}

    def chat(content: str) -> Request:
        prompt = ChatPrompt([{"role": "user", "content": content}])
        return a_request(work=Generate(prompt, Sampling(seed=7, max_tokens=5, ignore_eos=True)))

    stream = a_request("The tide", sampling=Sampling(seed=7, max_tokens=100, ignore_eos=True))
    loop, neighbour = chat("loop"), chat("hello")
    large = [a_request("x" * 5_000_000), chat("tide " * 1_000_000)]
    async with open_replica(redis_url, key_prefix, engine=engine) as replica:
        await ear.submit(loop)
        await await_until(lambda: loop.id in replica.loop._held)
        await ear.submit(stream, neighbour, *large)
        await ear.ended(stream, neighbour, *large)
        assert loop.id not in ear.finished
        (refused,) = await ear.ended(loop)
        assert replica.loop.failure is None
    assert ear.tokens_of(stream) == 100
    assert ear.tokens_of(neighbour) == 5
    assert (refused.reason, refused.code) == ("error", "PromptTooCostly")
    assert [ear.finished[request.id].code for request in large] == ["ContextLengthExceeded"] * 2


async def test_what_needs_no_step_is_answered_in_one_segment(
    ear: Ear, redis_url: str, key_prefix: str
) -> None:
    """Also while every slot but one generates, and in a claim with what does."""
    async with open_replica(redis_url, key_prefix, slots=2):
        generated = a_request(max_tokens=5)
        counted = a_request(work=Tokenize(TextPrompt("x" * 39), has_strings=True))
        shown = a_request(work=Detokenize(TokenPrompt([0, 1])))
        for request in (generated, counted, shown):
            await ear.submit(request)
        await ear.ended(generated, counted, shown)
        [tokens], [text] = ear.heard[counted.id], ear.heard[shown.id]
        assert len(tokens.output.prompt_ids) == len(tokens.output.prompt_logprobs) == 10
        assert text.output.text == " ba de"
        for segment in (tokens, text):
            assert segment.finish == Finish("stop")
            assert (segment.output.token_ids, segment.prompt_tokens) == ([], 0)
