"""Prompts that are prefilled over several steps, while others decode, give what `generate` gives for each
alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import DECODERS, save_model, save_tokenizer
from tests.engine_requests import a_request, add, run, run_one
from tests.integration.engines.test_families import ALONE, BATCHED, LENGTHS, generated, prompts
from tests.integration.engines.test_states import STATEFUL
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
