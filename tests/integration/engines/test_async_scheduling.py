"""Steps that begin before the host has seen the tokens of the one before give the same, a step later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import DECODERS, save_model, save_tokenizer
from tests.engine_requests import Result, a_request, add, run, run_one
from tests.integration.engines.test_lookup import many_kinds, said
from tests.integration.engines.test_states import STATEFUL
from tidegate.engines.base import Engine

Load = Callable[..., Engine]
AHEAD = {"async_scheduling": True}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def alone(**sampling: Any) -> dict[str, Any]:
    return {"max_tokens": 40, **sampling}


@pytest.mark.parametrize("apart", [0, 3, 7])
@pytest.mark.parametrize("args", [{}, {"kv_pages": True}, {"prefix_cache": False}])
def test_all_kinds_of_requests_get_the_same(load: Load, apart: int, args: dict[str, Any]) -> None:
    expected = run(load("llama", args=args), many_kinds(), apart=apart)
    assert said(run(load("llama", args=args | AHEAD), many_kinds(), apart=apart)) == said(expected)


@pytest.mark.parametrize("name", [*list(DECODERS)[::4], *list(STATEFUL)[::3]])
def test_families_say_the_same(name: str, tmp_path: Path, load: Load) -> None:
    kind, size = DECODERS[name] if name in DECODERS else (name, STATEFUL[name])
    save_model(tmp_path, kind, size)
    save_tokenizer(tmp_path)
    requests = [a_request(str(row), [5 + row, 9, 8, 7], max_tokens=24 + row, seed=row) for row in range(3)]
    assert said(run(load(tmp_path, args=AHEAD), requests)) == said(run(load(tmp_path), requests))


@pytest.mark.parametrize("arch", ["t5", "bart", "llama-gptq"])
def test_encoder_decoders_and_quantized_ones_too(load: Load, arch: str) -> None:
    requests = [a_request(str(row), [5 + row] * (4 + row), max_tokens=20 + row) for row in range(4)]
    assert said(run(load(arch, args=AHEAD), requests, apart=2)) == said(run(load(arch), requests, apart=2))


def outputs_by_step(engine: Engine, **sampling: Any) -> list[int]:
    """How many tokens each step lets out of one request."""
    add(engine, a_request("r", [5, 6, 7], **alone(**sampling)))
    counts = []
    while engine.has_work():
        counts.append(sum(len(output.output.token_ids) for output in engine.step()))
    return counts


@pytest.mark.parametrize(
    ("sampling", "is_ahead"),
    [
        ({}, True),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "seed": 4}, True),
        ({"top_logprobs": 3, "logit_bias": ((9, 1.5),)}, True),
        ({"frequency_penalty": 0.5}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"min_tokens": 5, "ignore_eos": False}, False),
    ],
)
def test_a_step_is_ahead_where_no_choice_hangs_on_the_last(
    load: Load, sampling: dict[str, Any], is_ahead: bool
) -> None:
    counts = outputs_by_step(load("llama", args=AHEAD), **sampling)
    assert sum(counts) == 40
    # The first token comes at once; then one step tells nothing, and the last two tell what was behind.
    assert counts == ([1, 0, *[1] * 39] if is_ahead else [1] * 40)


def test_who_ends_unforeseen_leaves_nothing_behind(load: Load) -> None:
    """Stop strings and end tokens are seen a step late; the token that was chosen meanwhile is nobody's."""
    engine = load("llama", args=AHEAD)
    whole = run_one(engine, a_request("whole", [5, 6, 7], **alone()))
    stop = whole.text[10:14]
    requests = [
        a_request("stopped", [5, 6, 7], **alone(stop=(stop,))),
        a_request("ended", [5, 6, 7], **alone(stop_token_ids=(whole.tokens[12],))),
        a_request("longer", [5, 6, 7], **alone()),
        a_request("other", [8, 6, 7], **alone()),
    ]
    found = run(engine, requests)
    assert said(found) == said(run(load("llama"), requests))
    assert found["longer"].tokens == whole.tokens
    # What they leave in the prefix cache is right as well.
    again = a_request("again", [5, 6, 7, *whole.tokens[:35]], max_tokens=5)
    assert run_one(engine, again).tokens == whole.tokens[35:40]


def test_who_is_aborted_in_between_takes_only_its_own(load: Load) -> None:
    engine = load("llama", args=AHEAD)
    expected = run(load("llama"), [a_request(str(row), [5 + row, 6], **alone()) for row in range(4)])
    for row in range(4):
        add(engine, a_request(str(row), [5 + row, 6], **alone()))
    results = {str(row): Result() for row in range(4)}
    steps = 0
    while engine.has_work():
        for output in engine.step():
            results[output.request_id].take(output)
        steps += 1
        if steps == 10:
            engine.abort("0")
        if steps == 20:
            engine.abort("3")
            add(engine, a_request("4", [5, 6], **alone()))
            results["4"] = Result()
    assert results["1"].tokens == expected["1"].tokens
    assert results["2"].tokens == expected["2"].tokens
    assert results["4"].tokens == expected["0"].tokens
    assert len(results["0"].tokens) < 12
    for name in "12":
        engine.abort(name)
    assert not engine.has_work()
    for name in "ab":
        add(engine, a_request(name, [5, 6], **alone()))
    for _ in range(3):
        engine.step()
    for name in "ab":
        engine.abort(name)
    assert not engine.has_work()
    assert run_one(engine, a_request("c", [6, 6], **alone())).tokens == expected["1"].tokens
