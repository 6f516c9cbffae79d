"""The grammar of answers that call tools takes every right answer and no wrong one."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tidegate.engines.transformers.call_grammar import call_grammar
from tidegate.engines.transformers.formats import CallFormat, ResponseFormat, read_format
from tidegate.engines.transformers.prompts import PromptError
from tidegate.messages.work import ChatPrompt

HERMES = read_format("hermes")
PYTHONIC = ResponseFormat(
    calls=CallFormat(
        call="{name}({arguments})",
        arguments="python",
        parameter="{key}={value}",
        comma=", ",
        begin="[",
        separator=", ",
        end="]",
    )
)
XML = ResponseFormat(
    calls=CallFormat(
        call="<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>",
        arguments="text",
        parameter="<parameter={key}>\n{value}\n</parameter>\n",
        separator="\n",
        trigger="<tool_call>",
    )
)
LISTED = ResponseFormat(
    calls=CallFormat(
        call='{"name": "{name}", "arguments": {arguments}}',
        begin="[TOOL_CALLS][",
        separator=", ",
        end="]",
        trigger="[TOOL_CALLS]",
    )
)


def a_tool(name: str, properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required), **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = a_tool(
    "weather", {"city": {"type": "string"}, "days": {"type": "integer"}, "warm": {"type": "boolean"}}, "city"
)
NOW = a_tool("now", {})


@lru_cache
def tokenizer(*, keeps_tags: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("[TOOL_CALLS]", special=True)])
    if keeps_tags:
        names = ("<tool_call>", "</tool_call>", "<think>", "</think>")
        backend.add_tokens([AddedToken(name, special=False) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def is_taken(
    form: ResponseFormat,
    answer: str,
    *tools: dict[str, Any],
    choice: str = "required",
    parallel: bool = True,
    begun: str = "",
    content: str = "",
    keeps_tags: bool = True,
) -> bool:
    """True where the answer, token by token and with its end, is one by the grammar."""
    made = tokenizer(keeps_tags=keeps_tags)
    prompt = ChatPrompt([], tools=list(tools), tool_choice=choice, parallel_tool_calls=parallel)
    grammar = call_grammar(form, prompt, begun, made, content)
    backend = made.backend_tokenizer
    matcher = LLMatcher(LLTokenizer(backend.to_str(), eos_token=made.eos_token_id), grammar)
    assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
    ids = backend.encode(answer, add_special_tokens=False).ids
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


CALL = hermes("weather", '{"city": "Köln", "days": 3}')


@pytest.mark.parametrize("keeps_tags", [True, False])
@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (CALL, True),
        (f"{CALL}\n{hermes('now', '{}')}", True),
        (f"<think>Hm.</think>\n\n{CALL}", True),
        ("Sunny.", False),
        ("", False),
        (f"{CALL} Done.", False),
        (hermes("weather", '{"days": 3}'), False),
        (hermes("weather", '{"city": "x", "days": "3"}'), False),
        (hermes("weather", '{"city": "x", "other": 1}'), False),
        (hermes("rain", "{}"), False),
        (CALL[:-5], False),
    ],
)
def test_an_answer_that_must_call(answer: str, is_right: bool, keeps_tags: bool) -> None:
    assert is_taken(HERMES, answer, WEATHER, NOW, keeps_tags=keeps_tags) == is_right


def test_one_that_is_named_is_called_once() -> None:
    assert is_taken(HERMES, hermes("now", "{}"), WEATHER, NOW, choice="now", parallel=False)
    assert not is_taken(HERMES, CALL, WEATHER, NOW, choice="now", parallel=False)
    assert not is_taken(HERMES, f"{CALL}\n{CALL}", WEATHER, choice="weather", parallel=False)


@pytest.mark.parametrize("keeps_tags", [True, False])
@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("", True),
        ("Sunny {today}.\n", True),
        (CALL, True),
        (f"Let me see.\n{CALL}\n{CALL} Done.", True),
        (f"<think>Hm <b>.</think>\n\n{CALL}", True),
        ("<think>Hm.</think> Sunny.", True),
        (f"Let me see.\n{hermes('rain', '{}')}", False),
        (f"{CALL} and <tool_call>nothing", False),
    ],
)
def test_an_answer_that_may_call(answer: str, is_right: bool, keeps_tags: bool) -> None:
    assert is_taken(HERMES, answer, WEATHER, NOW, choice="auto", keeps_tags=keeps_tags) == is_right


def test_a_free_answer_may_have_any_special_token_but_the_trigger() -> None:
    assert is_taken(HERMES, "a[TOOL_CALLS]b", WEATHER, choice="auto")
    assert is_taken(HERMES, f"a[TOOL_CALLS]b{CALL}", WEATHER, choice="auto", parallel=False)
    assert not is_taken(LISTED, "a[TOOL_CALLS]b", WEATHER, choice="auto")


def test_an_answer_that_may_call_once() -> None:
    for answer in ("Sunny.", CALL, f"So: {CALL}", f"<think>Hm.</think>{CALL}"):
        assert is_taken(HERMES, answer, WEATHER, choice="auto", parallel=False), answer
    assert not is_taken(HERMES, f"{CALL}\n{CALL}", WEATHER, choice="auto", parallel=False)


def test_a_thought_that_the_prompt_has_begun_is_ended_first() -> None:
    for choice in ("auto", "required"):
        assert is_taken(HERMES, f"Hm.\n</think>\n\n{CALL}", WEATHER, choice=choice, begun="<think>\n")
    assert not is_taken(HERMES, CALL, WEATHER, begun="<think>\n")
    over = "<think>\n\n</think>\n\n"
    assert is_taken(HERMES, CALL, WEATHER, begun=over)
    assert not is_taken(HERMES, f"<think>Hm.</think>{CALL}", WEATHER, begun=over)


@pytest.mark.parametrize(
    "content", [LLMatcher.grammar_from_json_schema('{"type": "integer"}'), "start: /[0-9]+/"]
)
def test_what_calls_nothing_may_have_a_grammar_of_its_own(content: str) -> None:
    for answer, is_right in {"12": True, CALL: True, "twelve": False, f"12{CALL}": False}.items():
        assert is_taken(HERMES, answer, WEATHER, choice="auto", content=content) == is_right, answer


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ('[weather(city="Köln", days=3, warm=True)]', True),
        ('[weather(city="Köln", warm=False), now()]', True),
        ('[weather(city="a \\"b\\"")]', True),
        ("[weather(days=3)]", False),
        ('[weather(city="x", )]', False),
        ("[weather(city=x)]", False),
        ("Sunny.", False),
    ],
)
def test_python(answer: str, is_right: bool) -> None:
    assert is_taken(PYTHONIC, answer, WEATHER, NOW) == is_right


def test_python_values_of_every_kind() -> None:
    tool = a_tool(
        "f",
        {"unit": {"enum": ["c", "f", None]}, "deep": {"type": "object"}, "any": {}, "x": {"type": "number"}},
    )
    for answer in (
        '[f(unit="c")]',
        "[f(unit=None)]",
        '[f(deep={"a": [1, None]}, any=[True], x=-1.5e3)]',
        "[f()]",
    ):
        assert is_taken(PYTHONIC, answer, tool), answer
    for answer in ('[f(unit="k")]', "[f(x=1, unit=None)]", "[f(deep=1)]"):
        assert not is_taken(PYTHONIC, answer, tool), answer


def xml(*parameters: tuple[str, str]) -> str:
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters]
    return f"<tool_call>\n<function=weather>\n{''.join(lines)}</function>\n</tool_call>"


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("keeps_tags", [True, False])
def test_xml(choice: str, keeps_tags: bool) -> None:
    for answer in (xml(("city", "Köln\n<b>")), xml(("city", "x"), ("days", "3"), ("warm", "true"))):
        assert is_taken(XML, answer, WEATHER, choice=choice, keeps_tags=keeps_tags), answer
    for answer in (xml(("days", "3")), xml(("city", "x"), ("days", "three"))):
        assert not is_taken(XML, answer, WEATHER, choice=choice, keeps_tags=keeps_tags), answer


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_in_one_list(choice: str) -> None:
    one = '{"name": "now", "arguments": {}}'
    assert is_taken(LISTED, f"[TOOL_CALLS][{one}]", NOW, choice=choice)
    assert is_taken(LISTED, f"[TOOL_CALLS][{one}, {one}]", NOW, choice=choice)
    assert not is_taken(LISTED, f"[TOOL_CALLS][{one}, {one}]", NOW, choice=choice, parallel=False)
    assert not is_taken(LISTED, f"[TOOL_CALLS]{one}", NOW, choice=choice)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "format": "phone"}}},
        {"type": "object", "properties": {"a": {"not": {}}}},
        {"type": "object", "properties": {"a": 5}},
        {"type": "object", "properties": {"a": {"type": "foo"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
        {"type": "object", "properties": {"a": {"$ref": "http://elsewhere/x"}}},
    ],
)
@pytest.mark.parametrize("form", [HERMES, PYTHONIC, XML])
def test_a_schema_that_cannot_be_enforced_leaves_any_object(
    schema: dict[str, Any], form: ResponseFormat
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    is_none = schema["properties"]["a"] == 5  # no schema: there is no such parameter
    if form is HERMES:
        answer = hermes("f", json.dumps({"a": "x", "b": [1]}))
    elif form is PYTHONIC:
        answer = "[f()]" if is_none else '[f(a="x")]'
    else:
        written = "" if is_none else "<parameter=a>\nx\n</parameter>\n"
        answer = f"<tool_call>\n<function=f>\n{written}</function>\n</tool_call>"
    assert is_taken(form, answer, tool)
    assert not is_taken(form, "x", tool)


@pytest.mark.parametrize(
    "tool",
    [a_tool("get-weather", {}), a_tool("f", {"from": {}}), a_tool("f", {"a b": {}}), a_tool("class.f", {})],
)
def test_what_python_has_no_form_for_is_refused_or_left_to_the_model(tool: dict[str, Any]) -> None:
    name = tool["function"]["name"]
    for choice in ("required", name):
        with pytest.raises(PromptError, match=f"the tool '{name}'"):
            is_taken(PYTHONIC, "", NOW, tool, choice=choice)
    assert is_taken(PYTHONIC, "[now()]", NOW, tool, choice="now")
    assert is_taken(PYTHONIC, "12", tool, choice="auto", content="start: /[0-9]+/")
    assert not is_taken(PYTHONIC, f"[{name}()]", tool, choice="auto", content="start: /[0-9]+/")


def test_definitions_of_a_schema_are_followed() -> None:
    days = {"$ref": "#/$defs/days"}
    tool = a_tool("weather", {"days": days}, "days", **{"$defs": {"days": {"type": "integer"}}})
    assert is_taken(HERMES, hermes("weather", '{"days": 3}'), tool)
    assert not is_taken(HERMES, hermes("weather", '{"days": "x"}'), tool)


def test_there_is_none_without_tools_or_a_format() -> None:
    prompt = ChatPrompt([], tools=[NOW], tool_choice="auto")
    assert call_grammar(HERMES, ChatPrompt([]), "", tokenizer()) == ""
    assert call_grammar(ResponseFormat(), prompt, "", tokenizer()) == ""
    assert call_grammar(PYTHONIC, prompt, "", tokenizer()) == ""
