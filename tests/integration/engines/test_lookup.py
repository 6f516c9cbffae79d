"""Tokens that are proposed from what a request has seen change how many steps it takes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import DECODERS, save_model, save_tokenizer
from tests.engine_requests import Result, a_request, add, run, run_one, run_steps
from tests.integration.engines.test_grammars import KEYS, ended, schema
from tests.integration.engines.test_states import STATEFUL
from tidegate.engines.base import Engine
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.messages.work import Request
from tidegate.replica_args import EngineSpec

LOOKUP = {"prompt_lookup_num_tokens": 6}
REPEATING = [7, 8, 9, 10, 11, 12, 13, 14] * 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def many_kinds() -> list[Request]:
    """Requests whose choices hang on everything that a choice may hang on."""
    return [
        a_request("greedy", REPEATING, max_tokens=60),
        a_request("short", [5], max_tokens=40),
        a_request("seeded", REPEATING[3:], max_tokens=50, temperature=0.3, seed=3),
        a_request("filtered", REPEATING[1:], max_tokens=50, temperature=0.8, top_p=0.7, top_k=9, seed=5),
        a_request("penalties", REPEATING, max_tokens=40, frequency_penalty=0.3, presence_penalty=0.2),
        a_request("repetition", REPEATING, max_tokens=40, repetition_penalty=1.1),
        a_request("words", REPEATING[2:], max_tokens=40, bad_words=("a", "the")),
        a_request("logprobs", REPEATING, max_tokens=30, top_logprobs=3),
        a_request("grammar", REPEATING, max_tokens=60, grammar=schema(KEYS)),
        a_request("least", REPEATING, max_tokens=30, min_tokens=20, ignore_eos=False),
    ]


def said(results: dict[str, Result]) -> dict[str, Any]:
    return {
        name: (one.tokens, one.text, [entry.token_id for entry in one.logprobs], ended(one))
        for name, one in results.items()
    }


def steps_of(engine: Engine, request: Request) -> int:
    add(engine, request)
    count = 0
    while engine.has_work():
        engine.step()
        count += 1
    return count


@pytest.mark.parametrize("apart", [0, 3])
def test_all_kinds_of_requests_get_the_same(load: Callable[..., Engine], apart: int) -> None:
    expected = run(load("llama"), many_kinds(), apart=apart)
    assert said(run(load("llama", args=LOOKUP), many_kinds(), apart=apart)) == said(expected)


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_says_the_same(name: str, tmp_path: Path, load: Callable[..., Engine]) -> None:
    kind, size = DECODERS[name]
    save_model(tmp_path, kind, size)
    save_tokenizer(tmp_path)
    requests = [a_request(str(row), REPEATING[row:], max_tokens=24 + row) for row in range(3)]
    assert said(run(load(tmp_path, args=LOOKUP), requests)) == said(run(load(tmp_path), requests))


def test_what_repeats_takes_fewer_steps(load: Callable[..., Engine]) -> None:
    # With so few words to choose from even a model of random weights repeats itself.
    request = a_request("r", REPEATING, max_tokens=120, allowed_token_ids=(20, 21, 22))
    plain, ahead = load("llama"), load("llama", args=LOOKUP)
    assert run_one(ahead, request).tokens == run_one(plain, request).tokens
    assert steps_of(ahead, request) < 0.6 * steps_of(plain, request) == 0.6 * 120


def test_what_goes_on_elsewhere_says_the_same(load: Callable[..., Engine]) -> None:
    plain, ahead = load("llama"), load("llama", args=LOOKUP)
    for sampling in ({}, {"temperature": 0.4, "top_p": 0.9, "seed": 11}):
        request = a_request("r", REPEATING, max_tokens=60, **sampling)
        expected = run_one(plain, request).tokens
        for first, then in ((ahead, plain), (plain, ahead), (ahead, ahead)):
            begun = run_steps(first, request, 12)
            assert begun.finish is None
            assert begun.tokens + run_one(then, request, begun.log).tokens == expected


def test_nothing_is_said_beyond_the_end(load: Callable[..., Engine]) -> None:
    plain, ahead = load("llama"), load("llama", args=LOOKUP)
    whole = run_one(plain, a_request("r", REPEATING, max_tokens=60))
    for limit in range(1, 20):
        found = run_one(ahead, a_request("r", REPEATING, max_tokens=limit))
        assert found.tokens == whole.tokens[:limit]
        assert found.finish is not None
        assert (found.finish.reason, found.finish.completion_tokens) == ("length", limit)
    stop = whole.tokens[30]
    stopped = run_one(ahead, a_request("r", REPEATING, max_tokens=60, stop_token_ids=(stop,)))
    assert stopped.tokens == whole.tokens[: 1 + whole.tokens.index(stop)]
    assert not ahead.has_work()


def test_the_context_may_be_filled_to_its_end(load: Callable[..., Engine]) -> None:
    plain, ahead = (load("llama", context_length=64, args=args) for args in ({}, LOOKUP))
    requests = [a_request(str(row), REPEATING[row:]) for row in range(3)]
    expected = run(plain, requests)
    assert [len(one.tokens) for one in expected.values()] == [32, 33, 34]
    assert said(run(ahead, requests)) == said(expected)


def test_rows_that_end_leave_what_others_may_begin_with(load: Callable[..., Engine]) -> None:
    """What is kept of an answer for later prompts is what was said, not what was proposed."""
    plain, ahead = load("llama", args={"prefix_cache": False}), load("llama", args=LOOKUP)
    first = run_one(ahead, a_request("first", REPEATING, max_tokens=40))
    later = a_request("later", [*REPEATING, *first.tokens, 3, 4], max_tokens=20)
    found = run_one(ahead, later)
    assert found.finish is not None and found.finish.cached_tokens >= 48
    assert found.tokens == run_one(plain, later).tokens


def test_an_aborted_request_leaves_the_others_alone(load: Callable[..., Engine]) -> None:
    plain, ahead = load("llama"), load("llama", args=LOOKUP)
    kept = a_request("kept", REPEATING, max_tokens=40)
    expected = run_one(plain, kept).tokens
    for name in ("gone", "kept"):
        add(ahead, a_request(name, REPEATING, max_tokens=40))
    found = Result()
    for step in range(200):
        for output in ahead.step():
            if output.request_id == "kept":
                found.take(output)
        if step == 5:
            ahead.abort("gone")
        if found.finish is not None:
            break
    assert found.tokens == expected
    assert not ahead.has_work()


def test_a_model_that_cannot_take_a_token_back_says_so(tmp_path: Path) -> None:
    save_model(tmp_path, "mamba2", STATEFUL["mamba2"])
    save_tokenizer(tmp_path)
    spec = EngineSpec("transformers", str(tmp_path), precision="float32", device="cpu", args=LOOKUP)
    engine = TransformersEngine(spec)
    assert any("prompt_lookup_num_tokens does nothing" in note for note in engine.load().notes)
    assert len(run_one(engine, a_request("r", REPEATING, max_tokens=9)).tokens) == 9
    engine.close()
