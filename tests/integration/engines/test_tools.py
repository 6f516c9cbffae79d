"""Calls of tools by random weights: what makes them right is the grammar alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from msgspec.structs import replace
from transformers import AutoTokenizer

from tests.checkpoints import (
    LLAMA,
    TOOLS_TEMPLATE,
    VOCABULARY,
    save_model,
    save_tokenizer,
    tiny,
    with_tools,
)
from tests.engine_requests import Result, a_request, run, run_one, run_steps
from tidegate.engines.base import Engine
from tidegate.engines.create import create_engine
from tidegate.engines.transformers.prompt_process import answer_rules
from tidegate.engines.transformers.prompts import PromptError
from tidegate.messages.work import CallDelta, ChatPrompt, Generate, Request, Segment
from tidegate.replica_args import EngineSpec

AFTER_THOUGHT = VOCABULARY  # a token more, which is `</think>`
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Köln", "Ulm"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    path = str(with_tools(tmp_path_factory.mktemp("checkpoint") / "tools"))
    made = create_engine(
        EngineSpec("transformers", path=path, precision="float32", device="cpu", args={"threads": 1})
    )
    made.load()
    yield made
    made.close()


def asking(
    request_id: str, choice: str, *tools: dict[str, Any], parallel: bool = False, **sampling: Any
) -> Request:
    wanted = {"max_tokens": 120, "ignore_eos": False, "temperature": 1.0, **sampling}
    request = a_request(request_id, [{"role": "user", "content": "Weather?"}], **wanted)
    assert isinstance(request.work, Generate)
    prompt = ChatPrompt(
        [{"role": "user", "content": "Weather?"}],
        tools=list(tools),
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )
    return replace(request, work=replace(request.work, prompt=prompt))


def calls_of(*results: Result) -> list[tuple[str, str, Any]]:
    """(id, name, arguments) as a client puts them together."""
    calls: list[list[str]] = []
    for result in results:
        for segment in result.log:
            for part in segment.output.calls:
                if part.name:
                    assert part.index == len(calls)
                    calls.append([part.id, part.name, ""])
                calls[part.index][2] += part.arguments
    return [(call_id, name, json.loads(arguments)) for call_id, name, arguments in calls]


def deltas(log: list[Segment]) -> list[CallDelta]:
    return [part for segment in log for part in segment.output.calls]


def is_right(name: str, arguments: dict[str, Any]) -> bool:
    if name == "now":
        return arguments == {}
    days = arguments.get("days", 0)
    return (
        arguments["city"] in ("Köln", "Ulm")
        and isinstance(days, int)
        and arguments.keys() <= {"city", "days"}
    )


def test_calls_that_must_be_are_right(engine: Engine) -> None:
    requests = [
        *(asking(f"any.{seed}", "required", WEATHER, NOW, seed=seed) for seed in range(4)),
        asking("named.0", "weather", WEATHER, NOW, temperature=0.0),
        asking("with.0", "weather", WEATHER, top_logprobs=1, stop=("never seen",)),
    ]
    results = run(engine, requests)

    for request_id, result in results.items():
        [(_, name, arguments)] = calls_of(result)
        assert is_right(name, arguments), request_id
        assert result.text == ""
        assert result.finish is not None and result.finish.reason == "stop"
        assert result.finish.completion_tokens == len(result.tokens)
    assert calls_of(results["named.0"])[0][1] == "weather"
    assert len(results["with.0"].logprobs) == len(results["with.0"].tokens)
    assert len({calls_of(result)[0][0] for result in results.values()}) == len(results)  # ids


def test_arguments_are_streamed_as_they_are_written(engine: Engine) -> None:
    result = run_one(engine, asking("x.0", "weather", WEATHER))
    parts = [segment.output.calls for segment in result.log if segment.output.calls]
    assert len(parts) > 3


def test_an_answer_that_may_call_is_text_or_calls(engine: Engine) -> None:
    result = run_one(engine, asking("x.0", "auto", WEATHER, max_tokens=20))
    assert result.text and calls_of(result) == []


def test_a_continued_call_goes_on_where_it_was(engine: Engine) -> None:
    request = asking("x.0", "required", WEATHER, NOW, parallel=True, max_tokens=90, seed=11)
    whole = run_one(engine, request)
    for steps in range(1, len(whole.tokens), 7):
        before = run_steps(engine, request, steps)
        after = run_one(engine, request, before.log)
        assert before.tokens + after.tokens == whole.tokens
        joined = [
            part for result in (before, after) for segment in result.log for part in segment.output.calls
        ]
        assert joined == [part for segment in whole.log for part in segment.output.calls]
        assert before.text + after.text == whole.text


def test_a_stop_string_within_a_call_leaves_what_was_said(engine: Engine) -> None:
    result = run_one(engine, asking("x.0", "weather", WEATHER, stop=('"arguments"',)))
    assert result.finish is not None and result.finish.reason == "stop"
    assert result.text.replace(" ", "").replace("\n", "") == '<tool_call>{"name":"weather",'
    assert calls_of(result) == []


def test_a_model_without_a_format_calls_in_the_default_one(tmp_path: Path) -> None:
    path = str(tiny(tmp_path / "plain", "llama"))
    engine = create_engine(
        EngineSpec("transformers", path=path, precision="float32", device="cpu", args={"threads": 1})
    )
    engine.load()
    [(_, name, arguments)] = calls_of(run_one(engine, asking("x.0", "weather", WEATHER)))
    assert is_right(name, arguments)
    plain = run_one(engine, asking("x.1", "auto", WEATHER, max_tokens=10))
    assert plain.text and calls_of(plain) == []
    engine.close()


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose prompts end within a thought."""
    folder = tmp_path_factory.mktemp("checkpoint") / "thinks"
    save_model(folder, "llama", {**LLAMA, "vocab_size": AFTER_THOUGHT + 1})
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["</think>"])
    tokenizer.chat_template = (
        f"{TOOLS_TEMPLATE}{{% if add_generation_prompt %}}<think>\n{{% endif %}}{{# <think></think> #}}"
    )
    tokenizer.save_pretrained(folder)
    engine = create_engine(
        EngineSpec("transformers", path=str(folder), precision="float32", device="cpu", args={"threads": 1})
    )
    engine.load()
    yield engine
    engine.close()


def thinking(grammar: str) -> Request:
    """One whose model ends its thought soon."""
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 120, "ignore_eos": False}
    bias = ((AFTER_THOUGHT, 6.0),)
    return a_request("x.0", [{"role": "user", "content": "?"}], grammar=grammar, logit_bias=bias, **sampling)


def test_what_a_model_thinks_comes_apart_and_what_follows_is_in_its_form(thinker: Engine) -> None:
    request = thinking("start: /[cd]{5}/")
    whole = run_one(thinker, request)
    before = run_steps(thinker, request, len(whole.tokens) // 2)
    after = run_one(thinker, request, before.log)

    assert len(reasoning(whole.log)) > 5 and re.fullmatch("[cd]{5}", whole.text)
    assert whole.finish is not None and whole.finish.reason == "stop"
    assert reasoning([*before.log, *after.log]) == reasoning(whole.log)
    assert before.text + after.text == whole.text


def reasoning(log: list[Segment]) -> str:
    return "".join(segment.output.reasoning for segment in log)


def test_a_schema_that_takes_forever_holds_up_nobody(engine: Engine) -> None:
    patterns = [{"type": "string", "pattern": f"(.*a.{{{width}}}){{3}}"} for width in range(20)]
    schema = {"type": "object", "properties": {"a": {"allOf": patterns}}}
    bomb = {"type": "function", "function": {"name": "f", "parameters": schema}}
    results = run(engine, [asking("bomb.0", "required", bomb), asking("x.0", "weather", WEATHER)])

    assert results["bomb.0"].finish is not None
    assert results["bomb.0"].finish.code == "PromptTooCostly"
    assert len(calls_of(results["x.0"])) == 1


def test_what_calls_nothing_is_in_the_form_that_was_asked_for(engine: Engine) -> None:
    form = LLMatcher.grammar_from_json_schema(
        '{"const": {"rain": true}}', overrides={"whitespace_flexible": False}
    )
    results = run(
        engine, [asking(f"x.{seed}", "auto", WEATHER, seed=seed, grammar=form) for seed in range(12)]
    )

    called = [calls_of(result) for result in results.values()]
    for result, calls in zip(results.values(), called, strict=True):
        assert result.finish is not None and result.finish.reason == "stop"
        assert (result.text == "") if calls else (json.loads(result.text) == {"rain": True})
    assert any(called) and not all(called)


def test_a_schema_may_hold_numbers_of_any_size(engine: Engine) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"enum": [1], "default": 1 << 70}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    result = run_one(engine, asking("x.0", "f", tool))

    assert [(name, arguments) for _, name, arguments in calls_of(result)] == [("f", {"a": 1})]


def test_an_answer_that_goes_on_has_a_bound(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(with_tools(tmp_path / "tools"))
    work = asking("x.0", "auto", WEATHER).work
    assert isinstance(work, Generate)
    begun = "<tool_call>x</tool_call>" * 2000
    assert answer_rules(f"<|im_start|>assistant\n{begun}", work, tokenizer).begun == begun
    with pytest.raises(PromptError, match="96000 characters"):
        answer_rules(f"<|im_start|>assistant\n{begun * 2}", work, tokenizer)
