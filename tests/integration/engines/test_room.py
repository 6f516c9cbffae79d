"""How many requests run follows from the tokens that they hold; what outgrows the memory goes on later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import LLAMA, save_model, save_tokenizer
from tests.engine_requests import Result, a_request, add, run_one
from tidegate.engines.base import Engine
from tidegate.engines.transformers import selfcheck
from tidegate.messages.work import Request
from tidegate.sources.facts import CONTEXT_SLACK

Load = Callable[..., Engine]
CONTEXT, TOKEN_BYTES = 2048, 1024
ROW = (CONTEXT + CONTEXT_SLACK) * TOKEN_BYTES


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "llama"
    save_model(folder, "llama", {**LLAMA, "max_position_embeddings": CONTEXT})
    save_tokenizer(folder)
    return folder


def served(engine: Engine, requests: Sequence[Request]) -> tuple[dict[str, Result], Counter[str], int]:
    """Run requests as a replica with a queue does: it claims for the slots that are free, the first first,
    and what is given back goes on from its log. Returns what came, how often each was given back, and how
    many ran at once."""
    results = {request.id: Result() for request in requests}
    queue, back, most = list(requests), Counter[str](), 0
    order = {request.id: place for place, request in enumerate(requests)}
    by_id = {request.id: request for request in requests}
    for _ in range(5000):
        for request in [queue.pop(0) for _ in range(min(len(queue), max(0, engine.free_slots())))]:
            assert add(engine, request, results[request.id].log) is None
        if not engine.has_work():
            assert not queue
            return results, back, most
        outputs = engine.step()
        most = max(most, sum(bool(output.output.token_ids) for output in outputs))
        for output in outputs:
            if output.is_given_back:
                assert (output.output.token_ids, output.finish) == ([], None)
                back[output.request_id] += 1
                queue = sorted([*queue, by_id[output.request_id]], key=lambda one: order[one.id])
            else:
                results[output.request_id].take(output)
    raise AssertionError("not finished")


def many(count: int, prompt: int, **sampling: Any) -> list[Request]:
    return [
        a_request(f"{number:03}", [3 + number, *range(5, 4 + prompt + number)], **sampling)
        for number in range(count)
    ]


def test_many_short_requests_run_where_few_of_full_length_would(load: Load, long_context: Path) -> None:
    engine = load(long_context, kv_cache_bytes=3 * ROW)
    assert engine.free_slots() >= 12
    requests = many(16, 6, max_tokens=12)
    results, back, most = served(engine, requests)
    assert (most, back) == (16, {})
    assert [result.finish and result.finish.reason for result in results.values()] == ["length"] * 16


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.1, "top_p": 0.95, "presence_penalty": 0.3}])
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"prefix_cache": False, "prompt_lookup_num_tokens": 8},
        {"kv_pages": True, "prompt_lookup_num_tokens": 8},
        {"async_scheduling": True},
        {"async_scheduling": True, "kv_pages": True},
    ],
)
def test_what_outgrows_the_memory_goes_on_where_it_was(
    load: Load, long_context: Path, sampling: dict[str, Any], args: dict[str, Any]
) -> None:
    engine = load(
        long_context,
        context_length=512,
        kv_cache_bytes=768 * TOKEN_BYTES,
        args=args,
    )
    requests = many(8, 20, max_tokens=150, **sampling)
    results, back, most = served(engine, requests)
    assert most > 2
    assert len(back) > 1
    assert requests[0].id not in back, "the oldest goes on"
    for request in requests:
        assert results[request.id].tokens == run_one(engine, request).tokens
        finish = results[request.id].finish
        assert finish is not None and finish.cached_tokens == 0, "what it left itself is not cached"
    assert engine.free_slots() > 0


@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_an_encoder_decoder_gives_back_what_it_has_no_room_for(load: Load, arch: str) -> None:
    engine = load(arch, context_length=256, kv_cache_bytes=4 * TOKEN_BYTES * (256 + CONTEXT_SLACK) * 2)
    requests = many(6, 40, max_tokens=180)
    results, back, most = served(engine, requests)
    assert most > 2
    assert back
    for request in requests:
        assert results[request.id].tokens == run_one(engine, request).tokens


def test_rows_that_run_one_by_one_take_what_they_hold(
    load: Load, long_context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "why_alone", lambda *_: "it is asked to")
    engine = load(long_context, context_length=512, kv_cache_bytes=900 * TOKEN_BYTES)
    requests = many(6, 20, max_tokens=150)
    results, back, most = served(engine, requests)
    assert most == 6, "six prompts of 20 tokens"
    assert back
    for request in requests:
        assert results[request.id].tokens == run_one(engine, request).tokens
