"""Prompts that are prefilled over several steps, while others decode, give what `generate` gives for each
alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from tests.checkpoints import DECODERS, save_model, save_tokenizer
from tests.engine_requests import a_request, add, run, run_one, run_steps
from tests.integration.engines.test_families import ALONE, BATCHED, LENGTHS, generated, prompts
from tests.integration.engines.test_states import STATEFUL
from tidegate.engines.transformers.decoder_step import DecoderStep
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.replica_args import EngineSpec

# Those whose recurrence takes one token at a time from a state.
WHOLE = {"mamba", "falcon_mamba", "jamba", "zamba"}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **DECODERS,
    **BATCHED,
    **{name: (name, size) for name, size in STATEFUL.items()},
    "dynamic": ALONE["phi3"][:2],
}
LONG = list(range(30, 130))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def loaded(folder: Path, tokens_per_step: int = 16) -> TransformersEngine:
    args = {"threads": 1, "prefill_tokens_per_step": tokens_per_step}
    engine = TransformersEngine(
        EngineSpec("transformers", str(folder), precision="float32", device="cpu", args=args)
    )
    engine.load()
    return engine


@pytest.fixture(scope="module")
def llama_in_parts(checkpoints: Callable[[str], Path]) -> Any:
    engine = loaded(checkpoints("llama"))
    yield engine
    engine.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_in_parts_equal_generate(name: str, tmp_path: Path) -> None:
    kind, size = FAMILIES[name]
    save_model(tmp_path, kind, size)
    save_tokenizer(tmp_path)
    engine = loaded(tmp_path)
    assert engine._batch.can_stage == (name not in {*WHOLE, "dynamic"})
    expected = generated(tmp_path, prompts(), LENGTHS)
    requests = [
        a_request(str(index), prompt, max_tokens=length)
        for index, (prompt, length) in enumerate(zip(prompts(), LENGTHS, strict=True))
    ]
    results = run(engine, requests, apart=4)
    assert [results[request.id].tokens for request in requests] == expected
    engine.close()


def test_a_burst_joins_by_halves(checkpoints: Callable[[str], Path]) -> None:
    """And those who have joined do not hold up the others, whatever their steps take."""
    engine = loaded(checkpoints("llama"), tokens_per_step=4096)
    for row in range(16):
        add(engine, a_request(str(row), [5 + row] * 40, max_tokens=9))
    assert [len(engine.step()) for _ in range(3)] == [8, 12, 15]
    engine.close()


def test_a_long_prompt_takes_a_part_of_each_step(llama_in_parts: TransformersEngine) -> None:
    """Others go on meanwhile, and who comes later waits behind it."""
    engine = llama_in_parts
    add(engine, a_request("runs", [5, 6], max_tokens=40))
    engine.step()
    add(engine, a_request("long", LONG, max_tokens=3))
    add(engine, a_request("short", [7], max_tokens=3))
    steps = [{output.request_id for output in engine.step()} for _ in range(8)]
    whole = -(-len(LONG) // 16)
    assert steps[: whole - 1] == [{"runs"}] * (whole - 1)
    assert steps[whole - 1] == {"runs", "long", "short"}
    for name in ("runs", "long", "short"):
        engine.abort(name)
    assert not engine.has_work()


def test_an_abort_ends_a_prompt_that_is_half_prefilled(llama_in_parts: TransformersEngine) -> None:
    engine = llama_in_parts
    free, request = engine.free_slots(), a_request("r", LONG, max_tokens=6)
    expected = run_one(engine, request).tokens
    add(engine, a_request("gone", LONG[::-1]))
    engine.step()
    assert engine.free_slots() == free - 1
    engine.abort("gone")
    assert (engine.free_slots(), engine.has_work()) == (free, False)
    assert run_one(engine, request).tokens == expected


def test_a_part_that_fails_ends_its_request_alone(
    llama_in_parts: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama_in_parts
    requests = [a_request("a", [5] * 10, max_tokens=20), a_request("b", [9], max_tokens=5)]
    expected = {name: one.tokens for name, one in run(engine, requests).items()}
    advance = engine._batch.advance

    def failing(staged: Any, count: int) -> Any:
        if staged.held:
            raise ValueError("no more")
        return advance(staged, count)

    monkeypatch.setattr(engine._batch, "advance", failing)
    results = run(engine, [requests[0], a_request("bad", LONG), requests[1]], apart=1)
    finish = results["bad"].finish
    assert finish is not None and (finish.code, "no more" in finish.message) == ("GenerationFailed", True)
    assert {name: results[name].tokens for name in expected} == expected


def test_a_part_that_fails_beside_rows_fails_without_them(
    llama_in_parts: TransformersEngine, llama: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have taken their step; what is wrong with the part, if it is the part, shows where it is alone."""
    engine = llama_in_parts
    long = [4, *LONG]  # which nothing is kept of
    requests = [a_request("a", [5] * 10, max_tokens=30), a_request("long", long, max_tokens=5)]
    compute, failed = DecoderStep.compute, list[int]()

    def failing(self: DecoderStep, *given: Any) -> torch.Tensor:
        if len(given[-1]) > 1:
            failed.append(given[-1][1].width)
            raise RuntimeError("no two blocks")
        return compute(self, *given)

    monkeypatch.setattr(DecoderStep, "compute", failing)
    found = run(engine, requests, apart=1)
    assert failed[0] == 16 and sum(failed) == len(long) - 16
    monkeypatch.undo()
    assert {name: one.tokens for name, one in found.items()} == {
        request.id: run_one(llama, request).tokens for request in requests
    }


def test_logprobs_of_a_prompt_in_parts_are_those_of_it_whole(
    llama_in_parts: TransformersEngine, llama: TransformersEngine
) -> None:
    request = a_request("r", LONG, max_tokens=4, prompt_logprobs=2, echo=True, top_logprobs=1)
    whole, parts = run_one(llama, request), run_one(llama_in_parts, request)
    assert parts.tokens == whole.tokens
    assert len(parts.logprobs) == len(LONG) + 4
    for one, other in zip(parts.logprobs[1:], whole.logprobs[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    (mine,), (its,) = ([s for s in result.log if s.output.prompt_logprobs] for result in (parts, whole))
    found, wanted = mine.output.prompt_logprobs, its.output.prompt_logprobs
    assert [(entry.token_id, entry.rank) for entry in found] == [(e.token_id, e.rank) for e in wanted]


def test_numbers_that_are_not_finite_stay_with_their_request(
    llama_in_parts: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama_in_parts
    good = [a_request(str(at), [5 + at] * 60, max_tokens=9) for at in range(5)]
    expected = [run_one(engine, request).tokens for request in good]
    batch: Any = engine._batch
    advance = batch.advance

    def poisoned(staged: Any, count: int) -> Any:
        if 3 in staged.tokens:
            for layer in batch._arena._arena_layers:
                layer.keys[-1] = layer.values[-1] = float("nan")
        logits = advance(staged, count)
        return logits * float("nan") if 3 in staged.tokens and logits is not None else logits

    monkeypatch.setattr(batch, "advance", poisoned)
    results = run(engine, [a_request("bad", [3] * 100), *good], apart=1)
    finish = results["bad"].finish
    assert finish is not None and finish.code == "NumericalError"
    assert [results[request.id].tokens for request in good] == expected


BEGIN = [17 + at * 7 % 400 for at in range(70)]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_that_begin_alike_equal_generate(name: str, tmp_path: Path) -> None:
    """Once the cache holds what the first one began with, and its answer."""
    kind, size = FAMILIES[name]
    save_model(tmp_path, kind, size)
    save_tokenizer(tmp_path)
    engine = loaded(tmp_path, 4096)
    asked = [BEGIN, [*BEGIN, 5, 6, 7], [*BEGIN[:40], 9], [3, *BEGIN]]
    expected = generated(tmp_path, asked, [20] * len(asked))
    asked.append([*BEGIN, *expected[0], 8])
    expected += generated(tmp_path, asked[-1:], [20])
    results = [run_one(engine, a_request("r", prompt, max_tokens=20)) for prompt in asked]
    assert [result.tokens for result in results] == expected
    is_kept = name not in STATEFUL and name != "dynamic"
    cached = [result.finish and result.finish.cached_tokens for result in results]
    assert cached == ([0, 64, 32, 0, 80] if is_kept else [0] * 5)
    engine.close()


def test_a_prompt_is_kept_for_its_tenant_alone(llama: TransformersEngine) -> None:
    mine = a_request("r", [*BEGIN[::-1], 4], max_tokens=2)
    cached = []
    for tenant in ("one", "one", "two", "two"):
        finish = run_one(llama, replace(mine, tenant=tenant)).finish
        assert finish is not None
        cached.append(finish.cached_tokens)
    assert cached == [0, 64, 0, 64]


def test_a_continuation_and_prompt_logprobs(
    llama: TransformersEngine, load: Callable[..., TransformersEngine]
) -> None:
    """What goes on elsewhere begins with what is kept, and tells of what its first attempt found; who asks
    for log probabilities gets them all."""
    prompt = [BEGIN[0] + 1, *BEGIN]
    request = a_request("r", prompt, max_tokens=20, temperature=0.9)
    begun = run_steps(llama, request, 9)
    whole = run_one(llama, request)
    assert whole.finish is not None and whole.finish.cached_tokens == 64
    again = run_steps(llama, request, 9)
    other = load("llama")
    run_one(other, request)
    # What a request has left there itself does not count, and what the first one found does.
    for engine, first, cached in (
        (llama, begun, 0),
        (other, begun, 0),
        (llama, again, 64),
        (other, again, 64),
    ):
        rest = run_one(engine, request, first.log)
        assert first.tokens + rest.tokens == whole.tokens
        assert rest.finish is not None and rest.finish.cached_tokens == cached
    told = run_one(llama, a_request("r", prompt, max_tokens=1, prompt_logprobs=1))
    assert told.finish is not None and told.finish.cached_tokens == 0
    assert len(told.log[0].output.prompt_logprobs) == len(prompt)


def test_prompts_that_arrive_while_the_first_one_runs_begin_with_it(
    llama: TransformersEngine,
) -> None:
    prompt = [BEGIN[0] + 2, *BEGIN]
    requests = [a_request(str(at), [*prompt, at + 3], max_tokens=12) for at in range(4)]
    alone = [run_one(llama, replace(request, tenant="other")).tokens for request in requests]
    results = run(llama, requests, apart=2)
    assert [results[request.id].tokens for request in requests] == alone
    finishes = [results[request.id].finish for request in requests]
    assert [finish and finish.cached_tokens for finish in finishes] == [0, 64, 64, 64]


def test_an_argument_turns_the_cache_off(load: Callable[..., TransformersEngine]) -> None:
    engine = load("llama", args={"prefix_cache": False})
    finishes = [run_one(engine, a_request("r", BEGIN, max_tokens=2)).finish for _ in range(2)]
    assert [finish and finish.cached_tokens for finish in finishes] == [0, 0]


def test_an_argument_bounds_the_cache(load: Callable[..., TransformersEngine]) -> None:
    row_bytes = 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, size, bytes of a token
    engine = load("llama", args={"prefix_cache_bytes": 3 * 16 * row_bytes})
    finishes = [run_one(engine, a_request("r", BEGIN, max_tokens=2)).finish for _ in range(2)]
    assert [finish and finish.cached_tokens for finish in finishes] == [0, 48]
