"""Tools in chat completions: what of a body reaches the model, and how calls come back."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.unit.gateway.dialects.segments import events
from tidegate.errors import InvalidRequest
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.chat import Chat, ChatCall
from tidegate.gateway.dialects.tools import (
    INVALID,
    MAX_TOOLS_DEPTH,
    NO_TOOLS,
    FunctionDefinition,
    NamedFunction,
    NamedTool,
    Tool,
    asked_functions,
    asked_tools,
    called,
)
from tidegate.messages.work import CallDelta, ChatPrompt, Finish, Segment, Tokens

HEAD = AnswerHead("chatcmpl-1", 5, "m", "r1")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Of a city", "parameters": SCHEMA}
TOOL = {"type": "function", "function": WEATHER}
NOW = {"type": "function", "function": {"name": "now"}}
SHOWN_NOW = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
}
NAMED = {"type": "function", "function": {"name": "now"}}
SEGMENTS = [
    Segment("x.0", 0, output=Tokens([1], "", reasoning="Hm")),
    Segment("x.0", 1, output=Tokens([2], "So:", calls=[CallDelta(0, "a1", "weather", "")])),
    Segment(
        "x.0",
        2,
        output=Tokens([3, 4], "", calls=[CallDelta(0, "", "", '{"city":'), CallDelta(0, "", "", '"Ü"}')]),
    ),
    Segment("x.0", 3, Finish("stop"), Tokens([5], "", calls=[CallDelta(1, "a2", "now", "{}")])),
]


def allowed(mode: str, *tools: dict[str, Any]) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def a_call(**fields: Any) -> ChatCall:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return Chat().read(orjson.dumps(body))


def prompt_of(**fields: Any) -> ChatPrompt:
    prompt = a_call(**fields).asks(7)[0].work.prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


def refused(**fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as error:
        a_call(**fields)
    return error.value.param


@pytest.mark.parametrize(
    ("fields", "tools", "choice", "is_parallel"),
    [
        ({}, [], "", True),
        ({"tools": []}, [], "", True),
        ({"tools": [TOOL, NOW]}, [TOOL, SHOWN_NOW], "auto", True),
        ({"tools": [TOOL], "tool_choice": "none"}, [], "", True),
        (
            {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
            [TOOL],
            "required",
            False,
        ),
        ({"tools": [TOOL, NOW], "tool_choice": NAMED}, [TOOL, SHOWN_NOW], "now", False),
        (
            {
                "tools": [TOOL, NOW],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [NAMED]},
                },
            },
            [SHOWN_NOW],
            "required",
            True,
        ),
        ({"functions": [WEATHER]}, [TOOL], "auto", False),
        ({"functions": [WEATHER], "function_call": "none"}, [], "", True),
        ({"functions": [WEATHER], "function_call": {"name": "weather"}}, [TOOL], "weather", False),
    ],
)
def test_tools_reach_the_model(fields: Any, tools: Any, choice: str, is_parallel: bool) -> None:
    prompt = prompt_of(**fields)

    assert (prompt.tools, prompt.tool_choice, prompt.parallel_tool_calls) == (tools, choice, is_parallel)


def a_function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [NOW] * 129}, "tools"),
        ({"tools": [TOOL, {"type": "function"}]}, "tools[1].function"),
        (a_function(name="a b"), "tools[0].function.name"),
        (a_function(name="x" * 65), "tools[0].function.name"),
        (a_function(colour=1), "tools[0].function.colour"),
        (a_function(parameters=[]), "tools[0].function.parameters"),
        (a_function(parameters={"type": "string"}), "tools[0].function.parameters.type"),
        (a_function(parameters={"properties": []}), "tools[0].function.parameters.properties"),
        (a_function(parameters={"required": [1]}), "tools[0].function.parameters.required"),
        (a_function(description="x" * (1 << 19)), "tools"),
        (a_function(parameters={"x": orjson.loads("[" * 70 + "]" * 70)}), "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED, "tools": []}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice.function.name"),
        (
            {"tools": [TOOL], "tool_choice": allowed("auto", NAMED)},
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"tools": [TOOL], "functions": [WEATHER]}, "functions"),
        ({"function_call": {"name": "weather"}}, "function_call"),
        ({"functions": [WEATHER], "function_call": {"name": "now"}}, "function_call.name"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
def test_wrong_tools_are_refused_by_name(fields: Any, param: str) -> None:
    assert refused(**fields) == param


def test_calls_and_results_come_back_in_the_history() -> None:
    call = {
        "id": "a1",
        "type": "function",
        "index": 0,
        "function": {"name": "weather", "arguments": '{"city":"Ü"}'},
    }
    broken = {"id": "a2", "type": "function", "function": {"name": "now", "arguments": "{oh"}}
    prompt = prompt_of(
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "reasoning_content": "Hm", "tool_calls": [call, broken]},
            {"role": "tool", "tool_call_id": "a2", "content": "no"},
            {
                "role": "tool",
                "tool_call_id": "a1",
                "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}],
            },
        ]
    )
    assert prompt.messages[1:] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm",
            "tool_calls": [
                {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Ü"}}},
                {
                    "id": "a2",
                    "type": "function",
                    "function": {"name": "now", "arguments": {"invalid_json": "{oh"}},
                },
            ],
        },
        {"role": "tool", "content": "no", "tool_call_id": "a2", "name": "now"},
        {"role": "tool", "content": "1\n2", "tool_call_id": "a1", "name": "weather"},
    ]


def test_functions_in_the_history_are_calls_to_the_model() -> None:
    function = {"name": "now", "arguments": ""}
    prompt = prompt_of(
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "function_call": function},
            {"role": "function", "name": "now", "content": "12"},
        ]
    )
    called, result = prompt.messages[1:]
    [call] = called["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": {}}
    assert result == {"role": "tool", "content": "12", "tool_call_id": call["id"], "name": "now"}


def test_an_answer_with_calls() -> None:
    answer = ChatCompletion.model_validate_json(a_call(tools=[TOOL]).answer(HEAD, [SEGMENTS], Usage(1, 5, 6)))
    [choice] = answer.choices
    message = choice.message.model_dump(exclude_unset=True)

    assert choice.finish_reason == "tool_calls"
    assert message["reasoning_content"] == "Hm"
    assert message["content"] == "So:"
    assert message["tool_calls"] == [
        {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ü"}'}},
        {"id": "a2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]


def test_an_answer_of_calls_alone_has_no_content() -> None:
    segments = [Segment("x.0", 0, Finish("stop"), Tokens([1], calls=[CallDelta(0, "a1", "now", "{}")]))]
    answer = orjson.loads(a_call(tools=[TOOL]).answer(HEAD, [segments], Usage(1, 5, 6)))
    assert answer["choices"][0]["message"]["content"] is None


def test_a_call_that_ends_by_length_says_so() -> None:
    segments = [*SEGMENTS[:2], Segment("x.0", 2, Finish("length"))]
    call = a_call(tools=[TOOL])
    answer = orjson.loads(call.answer(HEAD, [segments], Usage(1, 5, 6)))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert streamed(call, segments)[-1]["choices"][0]["finish_reason"] == "length"


def streamed(call: ChatCall, segments: list[Segment]) -> list[dict[str, Any]]:
    rendered = call.events(HEAD)
    raw = b"".join(rendered.render(0, segment) for segment in segments)
    return [orjson.loads(data) for _, data in events(raw)]


def test_a_stream_with_calls_is_put_together_by_the_official_client() -> None:
    chunks = streamed(a_call(tools=[TOOL], stream=True), SEGMENTS)
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk, strict=True))
    [choice] = state.get_final_completion().choices

    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "So:"
    calls = [(c.id, c.type, c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    assert calls == [("a1", "function", "weather", '{"city":"Ü"}'), ("a2", "function", "now", "{}")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm"
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert [part["function"]["arguments"] for part in parts] == ["", '{"city":', '"Ü"}', "", "{}"]


def test_functions_are_answered_in_their_own_shape() -> None:
    call = a_call(functions=[WEATHER])
    [choice] = orjson.loads(call.answer(HEAD, [SEGMENTS], Usage(1, 5, 6)))["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": '{"city":"Ü"}'}
    assert "tool_calls" not in choice["message"]

    chunks = [chunk["choices"][0] for chunk in streamed(call, SEGMENTS)]
    parts = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
    assert parts[0] == {"name": "weather", "arguments": ""}
    assert "".join(part["arguments"] for part in parts) == '{"city":"Ü"}'
    assert chunks[-1]["finish_reason"] == "function_call"


def test_reasoning_is_left_out_where_it_is_not_wanted() -> None:
    call = a_call(tools=[TOOL], include_reasoning=False)
    assert (
        "reasoning_content"
        not in orjson.loads(call.answer(HEAD, [SEGMENTS], Usage(1, 5, 6)))["choices"][0]["message"]
    )
    assert all("reasoning_content" not in chunk["choices"][0]["delta"] for chunk in streamed(call, SEGMENTS))


def test_tools_are_charged_at_admission() -> None:
    assert a_call(tools=[TOOL]).asks(7)[0].cost > a_call().asks(7)[0].cost + 20


def test_arguments_that_are_too_deep_for_what_reads_them_stay_text() -> None:
    deep = '{"a":' * 2 * MAX_TOOLS_DEPTH + "1" + "}" * 2 * MAX_TOOLS_DEPTH
    assert called("f", deep, "c")["function"]["arguments"] == {INVALID: deep}
    assert called("f", '{"a":{"b":[1]}}', "c")["function"]["arguments"] == {"a": {"b": [1]}}


def a_tool(name: str) -> Tool:
    return Tool(function=FunctionDefinition(name=name))


def test_none_is_a_name_where_it_is_said_as_one() -> None:
    named = NamedTool(function=NamedFunction(name="none"))
    assert asked_tools([a_tool("none")], named, None)[1:3] == ("none", False)
    assert asked_functions([a_tool("none").function], NamedFunction(name="none"))[1:3] == ("none", False)
    assert asked_tools([a_tool("none")], "none", None) is NO_TOOLS


@pytest.mark.parametrize("name", ["auto", "required"])
def test_a_tool_that_cannot_be_told_from_a_way_to_choose_is_not_forced(name: str) -> None:
    with pytest.raises(InvalidRequest, match="tool_choice"):
        asked_tools([a_tool(name)], NamedTool(function=NamedFunction(name=name)), None)
    assert asked_tools([a_tool(name)], None, None).choice == "auto"
