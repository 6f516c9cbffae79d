from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.engine_requests import a_request, add, run, run_one, run_steps
from tidegate.engines.base import EngineLoadError
from tidegate.engines.simulated import SimulatedEngine
from tidegate.messages.work import Detokenize, TextPrompt, Tokenize, TokenPrompt, Tokens
from tidegate.replica_args import EngineSpec


def an_engine(*, slots: int = 0, context_length: int = 0, **args: Any) -> SimulatedEngine:
    spec = EngineSpec(
        "simulated", max_slots=slots, context_length=context_length, args={"step_ms": 0, **args}
    )
    engine = SimulatedEngine(spec)
    engine.load()
    return engine


def test_tokens_depend_on_prompt_and_seed_only() -> None:
    requests = [
        a_request(str(index), f"prompt {index % 2}", seed=index // 2, temperature=1, max_tokens=30)
        for index in range(4)
    ]
    together = run(an_engine(), requests)
    alone = {request.id: run_one(an_engine(), request) for request in requests}
    assert {key: result.tokens for key, result in together.items()} == {
        key: result.tokens for key, result in alone.items()
    }
    assert len({tuple(result.tokens) for result in together.values()}) == 4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 25), st.integers(0, 1000), st.booleans())
def test_continued_from_its_log_a_stream_is_the_undisturbed_one(
    steps: int, seed: int, has_logprobs: bool
) -> None:
    engine = an_engine(words=["a", "b", "ab", " "])
    request = a_request(
        "r",
        "tide",
        seed=seed,
        temperature=1,
        max_tokens=25,
        stop=("ababa",),
        top_logprobs=1 if has_logprobs else None,
    )
    whole = run_one(engine, request)
    begun = run_steps(engine, request, steps)
    rest = run_one(engine, request, begun.log)
    assert rest.finish == whole.finish
    assert begun.tokens + rest.tokens == whole.tokens
    if begun.finish is None:
        assert begun.text + rest.text == whole.text


def test_a_stop_string_over_several_tokens_never_shows() -> None:
    result = run_one(
        an_engine(words=["x", "y"]), a_request("r", "p", max_tokens=500, stop=("xyx", "yyy", "xxx"))
    )
    assert result.finish is not None
    assert result.finish.reason == "stop"
    assert not any(stop in result.text for stop in ("xyx", "yyy", "xxx"))
    assert len(result.text) == len(result.tokens) - 3
    assert result.finish.completion_tokens == len(result.tokens)


def test_limits_and_counts() -> None:
    engine = an_engine(answer_tokens=5, context_length=20)
    by_request = run_one(engine, a_request("a", [1, 2, 3], max_tokens=4)).finish
    by_engine = run_one(engine, a_request("b", [1, 2, 3], ignore_eos=False)).finish
    by_context = run_one(engine, a_request("c", [1, 2, 3])).finish
    too_long = run_one(engine, a_request("d", [1] * 21)).finish
    assert (
        by_request is not None and by_engine is not None and by_context is not None and too_long is not None
    )
    assert (by_request.reason, by_request.prompt_tokens, by_request.completion_tokens) == ("length", 3, 4)
    assert (by_engine.reason, by_engine.completion_tokens) == ("stop", 5)
    assert (by_context.reason, by_context.completion_tokens) == ("length", 17)
    assert (too_long.reason, too_long.code) == ("error", "ContextLengthExceeded")


def test_echo_and_logprobs() -> None:
    result = run_one(an_engine(), a_request("r", "say it", max_tokens=3, echo=True, top_logprobs=2))
    assert result.text.startswith("say it")
    first, *rest = result.logprobs
    assert first.logprob is None
    assert len(rest) == result.prompt_tokens - 1 + 3
    assert all(len(item.top) == 2 and item.top[0][0] == item.token_id for item in rest)


def test_max_tokens_zero_gives_the_echo_alone() -> None:
    result = run_one(an_engine(), a_request("r", "say it", max_tokens=0, echo=True))
    assert (result.text, result.tokens) == ("say it", [])


def test_slots_and_abort() -> None:
    engine = an_engine(slots=2)
    add(engine, a_request("a", "x"))
    add(engine, a_request("b", "x"))
    assert engine.free_slots() == 0
    engine.abort("a")
    engine.abort("unknown")
    assert engine.free_slots() == 1
    assert [output.request_id for output in engine.step()] == ["b"]


def test_fault_crash_and_error() -> None:
    fault = {"marker": "BOOM", "kind": "crash", "at_token": 2}
    engine = an_engine(test_fault=fault)
    add(engine, a_request("r", "now BOOM"))
    assert len(engine.step() + engine.step()) == 2
    with pytest.raises(RuntimeError, match="crash"):
        engine.step()
    assert engine.health() is not None
    failed = run_one(an_engine(test_fault={**fault, "kind": "error"}), a_request("r", "BOOM"))
    assert failed.finish is not None
    assert (failed.finish.reason, failed.finish.code, len(failed.tokens)) == ("error", "GenerationFailed", 2)
    quiet = an_engine(test_fault=fault)
    assert len(run_one(quiet, a_request("r", "quiet", max_tokens=5)).tokens) == 5
    assert quiet.health() is None


def test_fault_hang_lasts_until_close() -> None:
    engine = an_engine(test_fault={"marker": "WAIT", "kind": "hang"})
    add(engine, a_request("r", "WAIT"))
    ended = threading.Event()

    def step() -> None:
        with pytest.raises(RuntimeError, match="hang"):
            engine.step()
        ended.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not ended.is_set()
    engine.close()
    thread.join(timeout=10)
    assert ended.is_set()


def test_a_share_of_the_requests_can_be_told_to_fail_or_to_be_empty() -> None:
    engine = an_engine(test_error_share=0.3, test_empty_share=0.2)
    results = [run_one(engine, a_request(f"r{number}", "Hi", max_tokens=2)) for number in range(200)]
    ends = [result.finish for result in results if result.finish is not None]
    errors = sum(finish.reason == "error" for finish in ends)
    empty = sum(finish.reason == "stop" and not finish.completion_tokens for finish in ends)
    assert 40 < errors < 80 and 20 < empty < 60
    assert errors + empty + sum(finish.completion_tokens == 2 for finish in ends) == 200


def test_a_load_can_be_told_to_fail() -> None:
    with pytest.raises(EngineLoadError) as caught:
        an_engine(test_load_failure="WeightsMissing")
    assert caught.value.reason == "WeightsMissing"


def test_what_a_request_may_see_of_its_prompt_comes_once() -> None:
    engine = an_engine()
    request = a_request(
        "r", "what was asked", max_tokens=5, returns_prompt_ids=True, prompt_logprobs=2, top_logprobs=0
    )
    whole = run_one(engine, request)
    first, *later = [segment.output for segment in whole.log]
    assert len(first.prompt_ids) == whole.prompt_tokens
    assert [entry.token_id for entry in first.prompt_logprobs] == first.prompt_ids
    assert first.prompt_logprobs[0].logprob is None
    assert all(entry.rank == 1 and len(entry.top) == 2 for entry in first.prompt_logprobs[1:])
    assert all(not output.prompt_ids and not output.prompt_logprobs for output in later)
    begun = run_steps(engine, request, 2)
    rest = run_one(engine, request, begun.log)
    assert begun.tokens + rest.tokens == whole.tokens
    assert all(not segment.output.prompt_ids for segment in rest.log)


def test_a_prompt_of_tokens_is_shown_as_it_came_and_cut_to_its_end() -> None:
    ids = [9000, 5, 6]
    shown = run_one(an_engine(), a_request("r", ids, max_tokens=1, returns_prompt_ids=True))
    assert shown.log[0].output.prompt_ids == ids
    cut = run_one(an_engine(), a_request("r", ids, max_tokens=1, returns_prompt_ids=True, truncate_prompt=2))
    assert (cut.log[0].output.prompt_ids, cut.prompt_tokens) == (ids[-2:], 2)


def test_a_stop_string_is_kept_or_passed_over() -> None:
    engine = an_engine()
    whole = run_one(engine, a_request("r", "x", max_tokens=8))
    word = whole.log[1].output.text
    kept = run_one(engine, a_request("r", "x", max_tokens=8, stop=(word,), includes_stop=True))
    assert kept.text == whole.log[0].output.text + word
    assert kept.finish is not None
    assert kept.finish.stopped_by == word
    passed = run_one(engine, a_request("r", "x", max_tokens=8, stop=(word,), min_tokens=2))
    assert len(passed.tokens) > 2


def test_tokenize_and_detokenize_take_no_step() -> None:
    engine = an_engine(words=[" a", " b"])
    plain = a_request("r", "")
    counted = asyncio.run(engine.prepare(replace(plain, work=Tokenize(TextPrompt("x" * 40), True))))
    assert isinstance(counted, Tokens)
    assert len(counted.prompt_ids) == 11
    assert {entry.token for entry in counted.prompt_logprobs} <= {" a", " b"}
    text = asyncio.run(engine.prepare(replace(plain, work=Detokenize(TokenPrompt([0, 1, 0])))))
    assert text == Tokens(text=" a b a")
    assert not engine.has_work()


def test_what_it_holds_of_a_prompt_is_told() -> None:
    engine = an_engine(prefix_cache_tokens=1024)

    def cached(prompt: str, tenant: str = "t") -> int:
        request = replace(a_request("r", prompt, max_tokens=1), tenant=tenant)
        finish = run_one(engine, request).finish
        assert finish is not None
        return finish.cached_tokens

    first, second, third = ("".join(f"{letter}{number:3}" for number in range(512)) for letter in "abc")
    assert [cached(first), cached(first), cached(first + "more")] == [0, 512, 512]
    assert cached(first[:1000] + "other" * 100) == 240, "whole blocks of what is alike"
    assert cached(first, "another tenant") == 0
    assert [cached(second), cached(third), cached(first)] == [0, 0, 0], "what was used last is kept"
    assert [cached(first), cached(third)] == [512, 512]


def test_without_a_prefix_cache_nothing_is_held() -> None:
    engine, request = an_engine(), a_request("r", "x" * 2048, max_tokens=1)
    finishes = [run_one(engine, request).finish for _ in range(2)]
    assert [finish and finish.cached_tokens for finish in finishes] == [0, 0]
