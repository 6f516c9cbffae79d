"""Requests that an engine has no room for go back to the queue, and on: here, or on another replica."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import LLAMA, save_model, save_tokenizer
from tests.integration.serving.rig import Ear, a_request, open_ear, open_replica
from tests.waiting import await_until
from tidegate.engines.base import StepOutput
from tidegate.messages.work import Generate, Request, Sampling, TokenPrompt

TOKEN_BYTES = 1024
FULL = 600  # tokens of room: one of full context, or three to seven of these requests


@pytest.fixture
async def ear(redis_url: str, key_prefix: str) -> AsyncIterator[Ear]:
    async with open_ear(redis_url, key_prefix) as ear:
        yield ear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "llama"
    save_model(folder, "llama", {**LLAMA, "max_position_embeddings": 512})
    save_tokenizer(folder)
    return folder


def requests(count: int) -> list[Request]:
    return [
        a_request(
            f"The gate number {number} opens when",
            sampling=Sampling(seed=number, temperature=0.9, max_tokens=150, ignore_eos=True, top_logprobs=1),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_stream_that_made_room_goes_on_without_a_gap_or_a_double(
    ear: Ear, redis_url: str, key_prefix: str, folder: Path, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(8)
    engine = {"name": "transformers", "path": str(folder), "precision": "float32", "args": {"threads": 1}}
    back: set[str] = set()

    async with open_replica(redis_url, key_prefix, engine=engine) as roomy:
        await ear.submit(*asked)
        await ear.ended(*asked, timeout=60)
        assert roomy.loop.stats().slots > 8
    expected = [ear.ids_of(request) for request in asked]

    small = {**engine, "kv_cache_bytes": FULL * TOKEN_BYTES * 9 // 8}
    again = requests(8)
    async with open_replica(redis_url, key_prefix, engine=small) as first:
        step = first.loop._engine.step

        def watched() -> list[StepOutput]:
            outputs = step()
            back.update(output.request_id for output in outputs if output.is_given_back)
            return outputs

        monkeypatch.setattr(first.loop._engine, "step", watched)
        await ear.submit(*again)
        if replicas == 2:
            async with open_replica(redis_url, key_prefix, engine=small):
                await ear.ended(*again, timeout=120)
        else:
            await ear.ended(*again, timeout=120)
        assert first.loop.failure is None
        assert first.loop.stats().slots >= 1
    assert back & {request.id for request in again if ear.tokens_of(request) == 150}
    for request, tokens in zip(again, expected, strict=True):
        await ear.text(request.id)  # its log has no gap, and what was heard is the log
        assert ear.ids_of(request) == tokens
        logprobs = [entry.token_id for each in ear.heard[request.id] for entry in each.output.logprobs]
        assert logprobs == tokens
        assert ear.finished[request.id].completion_tokens == 150


async def test_what_was_claimed_and_finds_no_room_does_not_wait_for_it(
    ear: Ear, redis_url: str, key_prefix: str, folder: Path
) -> None:
    """A replica that knows nothing of the length of requests claims as many as if they were short."""
    engine: dict[str, Any] = {"name": "transformers", "path": str(folder), "precision": "float32"}
    engine |= {"args": {"threads": 1}, "kv_cache_bytes": 2 * FULL * TOKEN_BYTES}
    sampling = Sampling(seed=1, temperature=0, max_tokens=100, ignore_eos=True)
    asked = [a_request(work=Generate(TokenPrompt([3 + number] * 400), sampling)) for number in range(8)]
    await ear.submit(*asked)
    async with open_replica(redis_url, key_prefix, engine=engine) as replica:
        loop = replica.loop
        assert loop._slots.total > 4
        # Two run, one is the next: the others are there for whoever has room.
        await await_until(lambda: asked[0].id in ear.heard and 0 < len(loop._held) <= 3 and not ear.finished)
        await ear.ended(*asked, timeout=90)
        assert loop.failure is None
    for request in asked:
        await ear.text(request.id)
        assert ear.tokens_of(request) == 100
