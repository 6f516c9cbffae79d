"""What a text in a chat format becomes: content, reasoning and calls, whatever pieces it comes in."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tidegate.engines.transformers.formats import read_format
from tidegate.engines.transformers.responses import (
    AnswerFormats,
    ResponseReader,
    begun_answer,
    reading_template,
)
from tidegate.messages.work import ChatPrompt

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
BODY = '{"name": "weather", "arguments": {"city": "K\\u00f6ln \\"}{", "days": [1, 2]}}'
CALL = f"<tool_call>\n{BODY}\n</tool_call>"
ARGUMENTS = {"city": 'Köln "}{', "days": [1, 2]}
HERMES = read_format("hermes").response_template
# As mistral's newer models write: the name before the region, which is the arguments.
NAMED = {
    "start_anchor": "[/INST]",
    "fields": {
        "content": {},
        "tool_calls": {
            "open_pattern": r"\[TOOL_CALLS\](?P<name>\w+)\[ARGS\]",
            "close_pattern": r"(?=\[TOOL_CALLS\])|</s>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
# As mistral's older models write: all calls in one list.
LISTED = {
    "start_anchor": "[/INST]",
    "fields": {
        "content": {},
        "tool_calls": {
            "open": "[TOOL_CALLS]",
            "close": "</s>",
            "content": "json",
            "transform_each": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        },
    },
}


class Read:
    """All parts of an answer together, and the calls as a client puts them together."""

    def __init__(
        self,
        template: Any,
        pieces: list[str],
        *,
        begun: str = "",
        has_tools: bool = True,
        tools: list[dict[str, Any]] = TOOLS,
    ) -> None:
        made = reading_template(template, has_tools=has_tools)
        assert made is not None
        reader = ResponseReader(made, begun, tools if has_tools else [], "call.0")
        self.parts = [*map(reader.push, pieces), reader.finish()]
        self.text = "".join(part.text for part in self.parts)
        self.reasoning = "".join(part.reasoning for part in self.parts)
        self.deltas = [delta for part in self.parts for delta in part.calls]
        msgspec.msgpack.encode(self.deltas)  # as they are sent
        self.calls: list[list[str]] = []
        for delta in self.deltas:
            assert bool(delta.id) == bool(delta.name)
            if delta.id:
                assert delta.index == len(self.calls)
                self.calls.append([delta.id, delta.name, ""])
            self.calls[delta.index][2] += delta.arguments

    def called(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for _, name, arguments in self.calls]


def pieces_of(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        ("  Just text.\n", "  Just text.\n", "", []),
        (CALL, "", "", [("weather", ARGUMENTS)]),
        (f"Let me see.\n\n{CALL}\n{CALL}\n", "Let me see.", "", [("weather", ARGUMENTS)] * 2),
        (f"<think>\nHm, {{}}.\n</think>\n\nSo:\n{CALL}", "So:", "Hm, {}.", [("weather", ARGUMENTS)]),
        ("<think>cut off ", "", "cut off", []),
        ('<tool_call>{"name": "now"}</tool_call>', "", "", [("now", {})]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "\\"</tool_call> }", "b": "</tool_call>"}}'
            "</tool_call>So.",
            "So.",
            "",
            [("f", {"a": '"</tool_call> }', "b": "</tool_call>"})],
        ),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", "", [("f", {"a": 1})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "", [("f", {"a": 1})]),
    ],
)
def test_an_answer_in_pieces(text: str, content: str, reasoning: str, calls: list[Any], size: int) -> None:
    read = Read(HERMES, pieces_of(text, size))

    assert (read.text, read.reasoning, read.called()) == (content, reasoning, calls)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot json\n</tool_call>",
        '<tool_call>{"nome": "f"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "argu',
        "<tool_call",
        '<tool_call>{"nome":"f","arguments":{"a":' + "[" * 2000,
        '<tool_call>{"arguments":{"a":"\\ud800"},"name":"f"}</tool_call>',
        '<tool_call>{"name":"\\ud800","arguments":{}}</tool_call>',
    ],
)
def test_what_is_no_call_is_content(text: str, size: int) -> None:
    read = Read(HERMES, pieces_of(f"Look: {text}", size))

    assert read.calls == []
    assert read.text.replace(" ", "") == f"Look:{text}".replace(" ", "")


@pytest.mark.parametrize("text", ["[f(from=1)]", "[get-weather(a=1)]"])
def test_what_is_no_python_is_content(text: str) -> None:
    read = Read(read_format("pythonic").response_template, pieces_of(text, 5))

    assert (read.text, read.calls) == (text, [])


@pytest.mark.parametrize("size", [1, 1000])
def test_marks_in_a_string_are_text_however_many(size: int) -> None:
    arguments = {"a": "</tool_call>" * 2000, "b": "\\"}
    call = f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>"
    read = Read(HERMES, pieces_of(f"{call}{CALL}", 1000 * size))

    assert (read.text, read.called()) == ("", [("f", arguments), ("weather", ARGUMENTS)])


@pytest.mark.parametrize("size", [1, 1000])
def test_what_follows_a_broken_call_is_read(size: int) -> None:
    read = Read(HERMES, pieces_of(f"<tool_call>broken</tool_call>\n{CALL}", size))

    assert (read.text, read.called()) == ("<tool_call>broken</tool_call>", [("weather", ARGUMENTS)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pythonic", '[f(a="\\ud800")]'),
        ("pythonic", "[f(a=" + "[" * 300 + "]" * 300 + ")]"),
        (
            "qwen3-coder",
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
def test_no_text_and_no_schema_breaks_the_reader(name: str, text: str) -> None:
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"anyOf": 5}}}}}
    ]
    read = Read(read_format(name).response_template, [text], tools=tools)

    for part in read.parts:
        msgspec.msgpack.encode(part)
    assert read.calls == []
    assert read.text.split() == text.split()


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (NAMED, '[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}[TOOL_CALLS]now[ARGS]{}</s>'),
        (
            LISTED,
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Ulm"}},'
            '{"name": "now", "arguments": {}}]</s>',
        ),
    ],
)
def test_other_shapes(template: dict[str, Any], text: str, size: int) -> None:
    read = Read(template, pieces_of(text, size))

    assert (read.text, read.called()) == ("", [("weather", {"city": "Ulm"}), ("now", {})])


def test_arguments_come_piece_by_piece_with_the_name_first() -> None:
    read = Read(HERMES, pieces_of(CALL, 4))

    assert len(read.deltas) > 5
    assert [delta.name for delta in read.deltas] == ["weather"] + [""] * (len(read.deltas) - 1)


def test_a_call_that_is_cut_off_keeps_what_was_sent() -> None:
    read = Read(HERMES, pieces_of(CALL[:60], 3))

    assert read.text == ""
    assert read.calls[0][2].startswith('{"city": "K')


def test_without_tools_a_call_is_text() -> None:
    assert Read(HERMES, [CALL], has_tools=False).text == CALL


def test_a_prompt_may_have_begun_the_answer() -> None:
    template = reading_template(HERMES, has_tools=True)
    assert template is not None
    prompt = "<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n<think>\n"
    begun = begun_answer(template, prompt)
    assert begun == "<think>\n"
    assert begun_answer(template, "no anchor <think>") == ""

    read = Read(HERMES, pieces_of("Hm.\n</think>\nYes.", 2), begun=begun)

    assert (read.reasoning, read.text) == ("Hm.", "Yes.")


def test_calls_of_a_request_have_the_same_ids_each_time_and_no_two_the_same() -> None:
    first, second = (Read(HERMES, pieces_of(f"{CALL}\n{CALL}", size)) for size in (3, 50))

    ids = [call[0] for call in first.calls]
    assert ids == [call[0] for call in second.calls]
    assert len(set(ids)) == 2
    assert all(len(name) == 9 and name.isalnum() for name in ids)  # as Mistral's templates want them


def test_a_long_answer_is_not_kept() -> None:
    made = reading_template(HERMES, has_tools=True)
    assert made is not None
    reader = ResponseReader(made, "", TOOLS, "call.0")
    text = "".join(reader.push("some words " * 10).text for _ in range(1000))

    assert text == "some words " * 9999 + "some words"
    assert len(reader._parser._buffer) < 10_000


@pytest.mark.parametrize("name", ["pythonic", "llama3-json"])
def test_a_call_begins_only_where_the_answer_does(name: str) -> None:
    text = "x" * 5000
    call = '[weather(city="a")]' if name == "pythonic" else '{"name": "weather", "parameters": {"city": "a"}}'
    read = Read(read_format(name).response_template, [text, call])

    assert (read.text, read.calls) == (text + call, [])


@pytest.mark.parametrize(
    ("chat_template", "knows_calls", "thinks"),
    [
        ("{{ messages }}<tool_call></tool_call>", True, False),
        ("{{ messages }}<tool_call></tool_call><think></think>", True, True),
        ("{{ messages }}", False, False),
    ],
)
def test_a_model_has_the_parts_that_its_template_knows(
    chat_template: str, knows_calls: bool, thinks: bool
) -> None:
    tokenizer = SimpleNamespace(chat_template=chat_template, response_template=None)
    formats = AnswerFormats(tokenizer)

    def fields(choice: str) -> set[str]:
        form = formats.of(ChatPrompt([], tools=TOOLS, tool_choice=choice))
        return (
            set() if form is None or form.response_template is None else {*form.response_template["fields"]}
        )

    assert ("tool_calls" in fields("auto")) == knows_calls
    assert ("reasoning_content" in fields("auto")) == thinks
    assert "tool_calls" in fields("required")
    assert ("reasoning_content" in fields("required")) == thinks


def test_an_answer_of_one_part_is_not_read() -> None:
    assert reading_template(NAMED, has_tools=False) is None
    assert reading_template(None, has_tools=True) is None
