"""Answers that follow a grammar, on a model that knows none: random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher, LLParserLimits
from msgspec.structs import replace
from transformers import AutoTokenizer

from tests.checkpoints import tiny
from tests.engine_requests import Result, a_request, run, run_one, run_steps
from tests.schemas import FOLLOWED
from tidegate.engines.base import Engine
from tidegate.engines.transformers import grammars
from tidegate.engines.transformers.sequence import RunningSequence

FORMATS = jsonschema.FormatChecker()
PROMPT = "The gate opens when"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["low", "high"]}, "level": {"type": "integer", "maximum": 99}},
    "required": ["name", "level"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def schema(wanted: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(wanted, overrides={"whitespace_flexible": False})


def regex(wanted: str) -> str:
    return LLMatcher.grammar_from_regex(wanted)


def ended(result: Result) -> tuple[str, str]:
    assert result.finish is not None
    return result.finish.reason, result.finish.code


def test_each_row_of_a_batch_follows_its_own_grammar(llama: Engine) -> None:
    requests = [
        a_request("object", PROMPT, max_tokens=60, grammar=schema(SCHEMA)),
        a_request("warm", PROMPT, max_tokens=60, grammar=schema(SCHEMA), temperature=1.5, top_p=0.9),
        a_request("digits", PROMPT, max_tokens=40, grammar=regex("[0-9]{7}")),
        a_request("choice", PROMPT, max_tokens=40, grammar='start: "yes" | "no"', ignore_eos=False),
        a_request("free", PROMPT, max_tokens=20),
    ]
    together = run(llama, requests, apart=1)
    for request in requests:
        assert together[request.id].tokens == run_one(llama, request).tokens, request.id
    for name in ("object", "warm"):
        assert set(json.loads(together[name].text)) == {"name", "level"}
        assert ended(together[name]) == ("stop", "")
    assert re.fullmatch("[0-9]{7}", together["digits"].text)
    assert together["choice"].text in ("yes", "no")
    assert ended(together["free"]) == ("length", "")


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_grammar_goes_on_where_the_log_ends(llama: Engine, steps: int) -> None:
    request = a_request("r", PROMPT, max_tokens=60, grammar=schema(SCHEMA), temperature=1.0)
    whole = run_one(llama, request)
    begun = run_steps(llama, request, steps)
    rest = run_one(llama, request, begun.log)
    assert (begun.tokens + rest.tokens, begun.text + rest.text) == (whole.tokens, whole.text)
    last = run_one(llama, request, whole.log[:-1]).finish
    assert last is not None and whole.finish is not None
    # A continuation may find the prompt held.
    assert replace(last, cached_tokens=0) == replace(whole.finish, cached_tokens=0)


def test_a_tokenizer_may_have_more_tokens_than_the_logits(
    load: Callable[..., Engine], tmp_path: Path
) -> None:
    path = tiny(tmp_path / "wide", "llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<extra_{at}>" for at in range(40)])
    tokenizer.save_pretrained(path)

    result = run_one(
        load(path), a_request("wide", PROMPT, max_tokens=60, grammar=schema(SCHEMA), temperature=1.0)
    )

    assert ended(result) == ("stop", "")
    assert set(json.loads(result.text)) == {"name", "level"}


def test_a_model_without_an_end_token_says_so(load: Callable[..., Engine], tmp_path: Path) -> None:
    path = tiny(tmp_path / "endless", "llama")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        said = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**said, "eos_token_id": None, "eos_token": None}))

    endless = load(path)
    refused = run_one(endless, a_request("r", PROMPT, max_tokens=9, grammar=schema(SCHEMA)))

    assert ended(refused) == ("error", "GrammarFailed")
    assert refused.finish is not None and "no end token" in refused.finish.message
    assert ended(run_one(endless, a_request("free", PROMPT, max_tokens=4))) == ("length", "")


@pytest.mark.parametrize("part", ["accept", "accept_forced", "take_prefill"])
def test_a_row_that_cannot_be_taken_up_ends_alone(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    unbroken = getattr(RunningSequence, part)

    def broken(sequence: RunningSequence, *args: Any) -> Any:
        if sequence.id == "first":
            raise RecursionError
        return unbroken(sequence, *args)

    monkeypatch.setattr(RunningSequence, part, broken)
    wanted = {"max_tokens": 60, "grammar": schema(SCHEMA)}
    if part == "take_prefill":
        wanted["prompt_logprobs"] = 0
    results = run(llama, [a_request("first", PROMPT, **wanted), a_request("second", PROMPT, **wanted)])

    assert ended(results["first"]) == ("error", "EngineError")
    assert ended(results["second"]) == ("stop", "")


def test_a_finish_by_length_leaves_a_beginning(llama: Engine) -> None:
    wanted = {"type": "array", "items": {"type": "integer"}, "minItems": 30}
    result = run_one(llama, a_request("r", PROMPT, max_tokens=12, grammar=schema(wanted)))
    assert ended(result) == ("length", "")
    assert re.fullmatch(r"\[(-?\d+,)*(-?\d*)", result.text)


def test_what_leaves_no_token_ends_with_an_error_and_disturbs_nobody(llama: Engine) -> None:
    digits = regex("[0-9]{3}")
    requests = [
        a_request("free", PROMPT, max_tokens=10),
        a_request("no digit", PROMPT, max_tokens=10, grammar=digits, allowed_token_ids=(100, 101)),
        a_request(
            "warm",
            PROMPT,
            max_tokens=9,
            grammar=digits,
            allowed_token_ids=(100,),
            temperature=1.0,
            top_logprobs=1,
        ),
        a_request("unread", PROMPT, max_tokens=10, grammar="start: nowhere"),
    ]
    together = run(llama, requests)
    assert ended(together["free"]) == ("length", "")
    for name, word in [
        ("no digit", "allowed_token_ids"),
        ("warm", "allowed_token_ids"),
        ("unread", "nowhere"),
    ]:
        finish = together[name].finish
        assert finish is not None
        assert ended(together[name]) == ("error", "GrammarFailed")
        assert word in finish.message


def test_a_complete_answer_ends_whatever_else_is_asked(llama: Engine) -> None:
    more = {"min_tokens": 30, "ignore_eos": True, "max_tokens": 40}
    result = run_one(llama, a_request("r", PROMPT, grammar=regex("[0-9]{3}"), **more))
    assert (ended(result), len(result.text)) == (("stop", ""), 3)


def test_a_lazy_grammar_binds_from_its_trigger_on(llama: Engine) -> None:
    compact = '{"const": [1, 2], "x-guidance": {"whitespace_flexible": false}}'
    grammar = f'start: TEXT "<" call\nTEXT: /[a-d]{{2}}/\ncall: %json {compact}'
    result = run_one(llama, a_request("r", PROMPT, max_tokens=60, grammar=grammar))
    assert re.fullmatch(r"[a-d]{2}<\[1,2\]", result.text)


KEYS = {
    "type": "object",
    "properties": {name: {"enum": [1, 2]} for name in ("first_of_all", "second_of_all", "third_of_all")},
    "required": ["first_of_all", "second_of_all", "third_of_all"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2", "mistral"])
def test_forced_tokens_take_fewer_steps_for_the_same_tokens(load: Callable[..., Engine], arch: str) -> None:
    engine = load(arch)
    keys = schema(KEYS)
    alone = a_request("r", PROMPT, max_tokens=90, grammar=keys, temperature=1.0)
    result = run_one(engine, alone)
    # With log probabilities every token has a step.
    told = a_request("r", PROMPT, max_tokens=90, grammar=keys, temperature=1.0, top_logprobs=0)
    each = run_one(engine, told)
    assert (result.tokens, result.text, result.finish) == (each.tokens, each.text, each.finish)
    assert len(each.log) == len(each.tokens) > 2 * len(result.log)
    others = [
        a_request("free", "an other prompt of more tokens than the first one", max_tokens=60),
        a_request("warm", PROMPT, max_tokens=60, temperature=1.0, seed=3),
        a_request("s", PROMPT + " the tide", max_tokens=90, grammar=keys, temperature=1.0),
    ]
    together = run(engine, [alone, *others], apart=1)
    assert together["r"].tokens == result.tokens
    for other in others:
        assert together[other.id].tokens == run_one(engine, other).tokens, other.id


def test_runs_that_no_row_is_long_enough_to_prove_are_not_taken(load: Callable[..., Engine]) -> None:
    assert load("llama", context_length=2)._batch.has_runs is False  # type: ignore[attr-defined]
    assert load("llama", context_length=64)._batch.has_runs is True  # type: ignore[attr-defined]


def test_forced_tokens_of_a_step_keep_to_the_bound_of_prompts(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load("llama", args={"prefill_tokens_per_step": 24})
    batch = engine._batch  # type: ignore[attr-defined]
    taken, whole = [], batch.run

    def counted(tails: list[list[int]], counts: list[int], last: int = 1) -> Any:
        taken.append(sum(map(len, tails)))
        return whole(tails, counts, last)

    monkeypatch.setattr(batch, "run", counted)
    requests = [a_request(f"r{at}", PROMPT, max_tokens=60, grammar=schema(KEYS)) for at in range(3)]
    run(engine, requests)

    assert 3 < max(taken) <= 24


@pytest.mark.parametrize("min_tokens", [0, 200])
def test_a_grammar_that_met_a_limit_begins_anew(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, min_tokens: int
) -> None:
    monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(max_lexer_states=200, verbose_errors=False))
    long = schema({"type": "string", "minLength": 300, "maxLength": 500})
    wanted = {"max_tokens": 200, "min_tokens": min_tokens, "ignore_eos": False, "grammar": long}
    costly = run_one(llama, a_request("r", PROMPT, **wanted))
    assert ended(costly) == ("error", "GrammarFailed")
    assert costly.finish is not None and "states" in costly.finish.message
    assert ended(run_one(llama, a_request("r", PROMPT, max_tokens=4, grammar=long))) == ("length", "")


@pytest.mark.parametrize("most", range(1, 12, 3))
def test_forced_tokens_end_at_the_limit_and_at_a_stop_string(llama: Engine, most: int) -> None:
    cut = run_one(llama, a_request("r", PROMPT, max_tokens=most, grammar=schema(KEYS)))
    assert (ended(cut), len(cut.tokens)) == (("length", ""), most)
    assert '{"first_of_all":1,"second_of_all":'.startswith(cut.text.replace("2", "1"))
    stopped = run_one(llama, a_request("r", PROMPT, max_tokens=90, grammar=schema(KEYS), stop=("rst_o",)))
    assert (ended(stopped), stopped.text) == (("stop", ""), '{"fi')


def test_answers_that_end_are_valid_for_their_schemas(llama: Engine) -> None:
    requests = [
        a_request(name, PROMPT, max_tokens=60, grammar=schema(wanted), temperature=1.0)
        for name, wanted in FOLLOWED.items()
    ]
    results = run(llama, requests)
    whole = [name for name, result in results.items() if ended(result) == ("stop", "")]
    for name in whole:
        jsonschema.validate(json.loads(results[name].text), FOLLOWED[name], format_checker=FORMATS)
    assert len(whole) > len(FOLLOWED) // 2
    assert all(ended(result)[0] == "length" for name, result in results.items() if name not in whole)


@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_answers_of_encoder_decoders_follow_a_grammar(load: Callable[..., Engine], arch: str) -> None:
    """Also behind the tokens from which a decoder starts."""
    form = LLMatcher.grammar_from_json_schema(
        {
            "type": "object",
            "properties": {"level": {"enum": ["low", "high"]}, "gate": {"const": "open"}},
            "required": ["level", "gate"],
            "additionalProperties": False,
        },
        overrides={"whitespace_flexible": False},
    )
    wanted = {"max_tokens": 80, "grammar": form, "ignore_eos": False, "temperature": 1.0}
    requests = [a_request(str(seed), "Level?", seed=seed, **wanted) for seed in range(3)]
    engine = load(arch)
    results = run(engine, requests, apart=1)
    for request in requests:
        before = run_steps(engine, request, 4)
        after = run_one(engine, request, before.log)
        whole = results[request.id]
        assert before.text + after.text == whole.text
        assert json.loads(whole.text) in [{"level": level, "gate": "open"} for level in ("low", "high")]
