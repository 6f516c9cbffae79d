"""What is refused, and how the refusal names field, value and remedy."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from tidegate.errors import InvalidRequest
from tidegate.gateway.bodies import BodyReader, NotHonoured, not_honoured_fields, with_model
from tidegate.gateway.dialects.chat import Chat, ChatBody
from tidegate.gateway.dialects.completions import CompletionBody, Completions, prompt_list
from tidegate.messages.work import ChatPrompt, Generate, TextPrompt, TokenPrompt

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}
NOT_HONOURED: dict[str, NotHonoured] = not_honoured_fields(CompletionBody) | not_honoured_fields(ChatBody)

parse_chat = BodyReader(ChatBody).read
parse_completion = BodyReader(CompletionBody).read
read_chat = Chat().read
read_completion = Completions().read


def refuse_chat(body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        read_chat(body if isinstance(body, bytes) else orjson.dumps(body))
    return refused.value


def refuse_completion(body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        read_completion(orjson.dumps(body))
    return refused.value


def test_every_field_of_openais_schema_is_known() -> None:
    assert set(ChatParams.__annotations__) <= set(ChatBody.__struct_fields__)
    assert set(CompletionParams.__annotations__) <= set(CompletionBody.__struct_fields__)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "warm"),
        ("top_p", 1.5),
        ("n", 0),
        ("n", 129),
        ("n", 1.5),
        ("n", True),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", ""),
        ("stop", 5),
        ("max_tokens", 0),
        ("max_completion_tokens", -1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", 2**63),
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("top_logprobs", 2),  # without logprobs
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),  # without stream
        ("messages", []),
        ("messages", "hi"),
        ("model", 5),
        ("model", ""),
        ("user", 5),
    ],
)
def test_a_wrong_value_is_named(field: str, value: Any) -> None:
    error = refuse_chat(CHAT | {field: value})
    assert error.param == field
    assert error.message.startswith(f"{field}: ")
    assert error.status == 400


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "bot", "content": "x"}], "messages[0].role"),
        ([CHAT["messages"][0], {"role": "tool", "content": "x"}], "messages[1].tool_call_id"),
        ([{"role": "tool", "content": "x", "tool_call_id": "c"}], "messages[0].tool_call_id"),
        ([{"role": "function", "content": "x"}], "messages[0].name"),
        ([{"role": "function", "content": "x", "name": "f"}], "messages[0].name"),
        ([{"role": "user", "content": "x", "tool_call_id": "c"}], "messages[0].tool_call_id"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "function_call": CALL["function"]}], "messages[0].function_call"),
        (
            [{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}],
            "messages[0].tool_calls[0].type",
        ),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
        ([{"role": "user", "content": "x", "colour": 1}], "messages[0].colour"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}],
            "messages[0].content[1].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (["hi"], "messages[0]"),
    ],
)
def test_a_wrong_message_is_named_with_its_index(messages: list[Any], param: str) -> None:
    assert refuse_chat(CHAT | {"messages": messages}).param == param


@pytest.mark.parametrize("name", sorted(NOT_HONOURED))
def test_what_is_not_honoured_is_refused_unless_it_means_nothing(name: str) -> None:
    is_chat = name in ChatBody.__struct_fields__
    body, parse, refuse = (
        (CHAT, parse_chat, refuse_chat) if is_chat else (COMPLETION, parse_completion, refuse_completion)
    )
    for harmless in (None, *NOT_HONOURED[name].same_as_absent):
        parse(orjson.dumps(body | {name: harmless}))
    for odd in ("odd", 7, [1], {"odd": 1}, *([] if name == "priority" else [0])):
        error = refuse(body | {name: odd})
        assert (error.param, error.error_code) == (name, "unsupported_parameter")


def test_true_is_not_one() -> None:
    assert refuse_completion(COMPLETION | {"detokenize": 1}).param == "detokenize"


def test_a_remedy_is_the_fields_own_description_or_that_of_its_parent() -> None:
    chat, completions = BodyReader(ChatBody), BodyReader(CompletionBody)
    assert (chat.hint("logprobs"), completions.hint("logprobs")) == (
        "true or false",
        "a whole number from 0 to 20",
    )
    assert chat.hint("messages[3].role") == "one of system, developer, user, assistant, tool"
    assert chat.hint("messages[3].content[1].type") == chat.hint("messages")
    assert chat.hint("nope") == "a valid value"


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_every_field_says_what_to_send(body: type[ChatBody] | type[CompletionBody]) -> None:
    reader: BodyReader[Any] = BodyReader(body)
    assert [name for name in body.__struct_fields__ if reader.hint(name) == "a valid value"] == []


def test_an_unknown_field_is_refused_by_name() -> None:
    error = refuse_chat(CHAT | {"ignore_eoss": True})
    assert (error.param, error.error_code) == ("ignore_eoss", "unknown_parameter")


def test_an_unknown_field_that_is_null_passes() -> None:
    body = CHAT | {"guided_jsons": None, "stream": True, "stream_options": {"x": None, "include_usage": True}}
    body["messages"] = [{"role": "user", "content": "hi", "colour": None}]
    assert read_chat(orjson.dumps(body)).shown.has_usage
    assert read_completion(orjson.dumps(COMPLETION | {"guided_jsons": None, "temperature": 1})).n == 1
    assert refuse_chat(body | {"guided_jsons": {}}).param == "guided_jsons"
    assert refuse_chat(body | {"stream_options": {"x": 1}}).param == "stream_options.x"


def test_unknown_fields_of_an_answer_in_the_history_pass() -> None:
    answer = {"role": "assistant", "content": "Hi", "grounding": {"a": [1]}, "score": 0.5}
    history = [*CHAT["messages"], answer, {"role": "user", "content": "more"}]
    prompt = read_chat(orjson.dumps(CHAT | {"messages": history})).asks(7)[0].work.prompt
    assert isinstance(prompt, ChatPrompt)
    assert [message["content"] for message in prompt.messages] == ["hi", "Hi", "more"]
    history[2]["images"] = ["x"]
    assert refuse_chat(CHAT | {"messages": history}).param == "messages[2].images"


def test_a_body_nested_too_deeply_is_refused_the_second_time_too() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    for field in (b'"n":1.0', b'"x":null'):
        raw = b'{"model":"m","messages":[{"role":"user","content":"x"}],%b,"tools":%b}' % (field, deep)
        assert "nested too deeply" in refuse_chat(raw).message


@pytest.mark.parametrize(
    ("fields", "param", "shown"),
    [
        ({"metadata": {"ok": "1", "name": 1}}, "metadata.name", "1: expected str, got int"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "length <= 512"),
        ({"metadata": {"k" * 65: "x"}}, "metadata." + "k" * 65, "length <= 64"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "length <= 16"),
        ({"logit_bias": {"5": 1, "6": 101}}, "logit_bias.6", "101: expected float <= 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "expected int"),
        ({"documents": [{"a": "1"}, {"a": "1", "b": 2}]}, "documents[1].b", "2: expected str, got int"),
        ({"messages": {"role": "user"}}, "messages", "expected array, got object"),
        ({"stop": {"role": "user"}}, "stop", "got object"),
    ],
)
def test_of_a_map_the_wrong_pair_is_named(fields: dict[str, Any], param: str, shown: str) -> None:
    error = refuse_chat(CHAT | fields)
    assert error.param == param
    assert error.message.startswith(f"{param}: ") and shown in error.message


@pytest.mark.parametrize("half", [r"\ud800", r"\udc00", r"\uD83D", r"\ud800\u0041", r"\ud83d\ud83d\ude00"])
@pytest.mark.parametrize("after", ["", "x", "xxxxxxxxxx", r"\n"])
def test_half_a_character_is_told_as_such(half: str, after: str) -> None:
    raw = rb'{"model":"m","messages":[{"role":"user","content":"\ud83d\ude00 \\ud800 %b"}]}'
    error = refuse_chat(raw % (half + after).encode())
    assert error.error_code == "invalid_json"
    assert f"{half[:6]} at byte {raw.index(b'%b')} is half a character" in error.message


def test_the_model_of_the_path_stands_in_the_body() -> None:
    for body in ({"n": 1}, {"model": "other", "n": 1}):
        assert orjson.loads(with_model(orjson.dumps(body), 'm"é')) == {"model": 'm"é', "n": 1}
    for broken in (b"[1]", b"{", b"\xff"):
        assert with_model(broken, "m") == broken


def test_advisory_fields_pass() -> None:
    advisory = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "p",
        "request_id": "r",
        "cache_salt": "s",
        "priority": 0,
        "spaces_between_special_tokens": False,
    }
    assert parse_chat(orjson.dumps(CHAT | advisory)).user == "u"
    assert parse_completion(orjson.dumps(COMPLETION | advisory)).user == "u"


def test_all_nulls_mean_the_defaults() -> None:
    nulls = {name: None for name in ChatBody.__struct_fields__ if name not in ("model", "messages")}
    call = read_chat(orjson.dumps(nulls | CHAT))
    [ask] = call.asks(7)
    assert (call.n, call.is_streamed, call.shown.has_usage, call.top_logprobs) == (1, False, False, None)
    assert isinstance(ask.work, Generate)
    sampling = ask.work.sampling
    assert (sampling.max_tokens, sampling.stop, sampling.top_logprobs) == (None, (), None)


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"model": nope}', b"[1]", b"null", b'"x"', b"\xff", b"[" * 100_000]
)
def test_what_is_no_json_object_is_refused_with_a_position(body: bytes) -> None:
    error = refuse_chat(body)
    assert error.error_code == "invalid_json"
    assert "byte" in error.message or "object" in error.message or "deeply" in error.message


def test_numbers_beyond_every_type_are_refused() -> None:
    assert (
        refuse_chat(b'{"model":"m","messages":[{"role":"user","content":"x"}],"seed":1e999}').param == "seed"
    )


def test_whole_floats_are_whole_numbers() -> None:
    body = parse_chat(orjson.dumps(CHAT | {"seed": -3.0, "max_tokens": 5.0, "temperature": 1}))
    assert (body.seed, body.max_tokens, body.temperature) == (-3, 5, 1.0)
    assert parse_completion(orjson.dumps(COMPLETION | {"prompt": [1.0, 2]})).prompt == [1, 2]


def test_two_limits_must_agree() -> None:
    assert parse_chat(orjson.dumps(CHAT | {"max_tokens": 5, "max_completion_tokens": 5})).max_tokens == 5
    assert refuse_chat(CHAT | {"max_tokens": 5, "max_completion_tokens": 6}).param == "max_tokens"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", [TextPrompt("a")]),
        ("", [TextPrompt("")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokenPrompt([1, 2])]),
        ([[1], [2, 3]], [TokenPrompt([1]), TokenPrompt([2, 3])]),
    ],
)
def test_prompts_of_every_form(prompt: Any, prompts: Any) -> None:
    assert prompt_list(prompt) == prompts


@pytest.mark.parametrize(
    "prompt", [[], [1, "a"], ["a", [1]], [[]], [[1], []], [-1], [2**31], 5, None, [None]]
)
def test_prompts_of_no_form_are_refused(prompt: Any) -> None:
    param = refuse_completion(COMPLETION | {"prompt": prompt}).param
    assert param is not None and re.sub(r"\[\d+\]", "", param) == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"prompt": ["x"] * 9, "best_of": 120}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ["x"] * 100, "n": 11}, "prompt"),
    ],
)
def test_wrong_completions(fields: dict[str, Any], param: str) -> None:
    assert refuse_completion(COMPLETION | fields).param == param


def test_the_sdks_own_messages_come_back_as_history() -> None:
    """`model_dump()` of an answer, of a parsed one, of a refusal, and what reasoning servers add."""
    plain = ChatCompletionMessage(role="assistant", content="Hi").model_dump()
    parsed = ParsedChatCompletionMessage[Any](role="assistant", content="{}", parsed={"a": 1}).model_dump()
    refused = ChatCompletionMessage(role="assistant", content=None, refusal="No.").model_dump()
    reasoned = plain | {"reasoning_content": "why", "annotations": [], "tool_calls": [], "name": None}
    call = read_chat(orjson.dumps(CHAT | {"messages": [*CHAT["messages"], plain, parsed, refused, reasoned]}))
    [ask] = call.asks(7)
    assert isinstance(ask.work.prompt, ChatPrompt)
    assert [message["content"] for message in ask.work.prompt.messages] == ["hi", "Hi", "{}", "No.", "Hi"]


def test_a_name_reaches_the_template() -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "x", "name": "joe"}]}
    prompt = read_chat(orjson.dumps(body)).asks(7)[0].work.prompt
    assert prompt == ChatPrompt([{"role": "user", "content": "x", "name": "joe"}])


@pytest.mark.parametrize(
    "read",
    [
        lambda fields: read_chat(orjson.dumps(CHAT | fields)),
        lambda fields: read_completion(orjson.dumps(COMPLETION | fields)),
    ],
)
def test_vllms_sampling_fields_reach_the_engine(read: Any) -> None:
    fields = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [1, 2],
        "logit_bias": {"5": -100, "7": 1.5},
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "prompt_logprobs": 2,
        "allowed_token_ids": [4, 5],
        "bad_words": ["no"],
        "truncate_prompt_tokens": -1,
        "return_token_ids": True,
        "stop": ["x"],
    }
    sampling = read(fields | {"temperature": 1}).asks(7)[0].work.sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.2)
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.stop_token_ids) == (3, True, (1, 2))
    assert dict(sampling.logit_bias) == {5: -100, 7: 1.5}
    assert (sampling.includes_stop, sampling.skips_special, sampling.returns_prompt_ids) == (
        True,
        False,
        True,
    )
    assert (sampling.prompt_logprobs, sampling.allowed_token_ids) == (2, (4, 5))
    assert (sampling.bad_words, sampling.truncate_prompt) == (("no",), -1)
    plain = read({}).asks(7)[0].work.sampling
    assert (plain.includes_stop, plain.skips_special, plain.returns_prompt_ids) == (False, True, False)
    assert (plain.prompt_logprobs, plain.truncate_prompt) == (None, None)
    assert sampling.left_out == ("top_p",)
    assert read({"top_k": -1}).asks(7)[0].work.sampling.top_k == 0
    # A whole number as a float makes the body be read a second time.
    assert dict(read(fields | {"top_k": 5.0}).asks(7)[0].work.sampling.logit_bias) == {5: -100, 7: 1.5}


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -2},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"logit_bias": {"a": 1}},
        {"prompt_logprobs": 21},
        {"prompt_logprobs": -1},
        {"prompt_logprobs": 0, "stream": True},
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": -2},
        {"allowed_token_ids": []},
        {"bad_words": [""]},
        {"bad_words": ["x"] * 129},
        {"priority": 1},
        {"detokenize": False},
        {"truncation_side": "right"},
        {"chat_template": "{{ x }}"},
        {"chat_template_kwargs": {"chat_template": "{{ x }}"}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": {"enable_thinking": False, "tokenizer": "x"}},
        {"chat_template_kwargs": {"x": "y" * 20_000}},
        {"chat_template_kwargs": {"x": json.loads("[" * 20 + "]" * 20)}},
        {"chat_template_kwargs": {"x" * 65: 1}},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"documents": ["text"]},
        {"reasoning_effort": "extreme"},
        {"use_beam_search": True},
        {"stop_token_ids": [-1]},
    ],
)
def test_sampling_fields_out_of_bounds_are_named(fields: dict[str, Any]) -> None:
    assert (refuse_chat(CHAT | fields).param or "").split("[")[0].split(".")[0] == next(iter(fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ChatPrompt(CHAT["messages"])),
        ({"add_generation_prompt": False}, ChatPrompt(CHAT["messages"], add_generation_prompt=False)),
        (
            {"continue_final_message": True},
            ChatPrompt(CHAT["messages"], add_generation_prompt=False, continue_final_message=True),
        ),
        ({"add_special_tokens": True}, ChatPrompt(CHAT["messages"], add_special_tokens=True)),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, "documents": [{"title": "a"}]},
            ChatPrompt(
                CHAT["messages"], template_args={"enable_thinking": False, "documents": [{"title": "a"}]}
            ),
        ),
        (
            {"reasoning_effort": "none"},
            ChatPrompt(
                CHAT["messages"], template_args={"reasoning_effort": "none", "enable_thinking": False}
            ),
        ),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            ChatPrompt(CHAT["messages"], template_args={"reasoning_effort": "low", "enable_thinking": False}),
        ),
    ],
)
def test_what_the_template_is_told(fields: dict[str, Any], expected: ChatPrompt) -> None:
    [ask] = read_chat(orjson.dumps(CHAT | fields)).asks(7)
    assert ask.work.prompt == expected


def test_a_prompt_that_choices_share_is_shown_by_the_first() -> None:
    fields = {"n": 3, "prompt_logprobs": 1}
    chat = [ask.work for ask in read_chat(orjson.dumps(CHAT | fields)).asks(7)]
    assert [work.sampling.prompt_logprobs for work in chat] == [1, None, None]  # type: ignore[union-attr]
    texts = [ask.work for ask in read_completion(orjson.dumps(COMPLETION | fields)).asks(7)]
    assert [work.sampling.prompt_logprobs for work in texts] == [1, 1, 1]  # type: ignore[union-attr]


def test_special_tokens_of_a_text_are_the_clients_choice() -> None:
    for wanted in (True, False):
        [ask] = read_completion(orjson.dumps(COMPLETION | {"add_special_tokens": wanted})).asks(7)
        assert ask.work.prompt == TextPrompt("hi", add_special_tokens=wanted)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    fields=st.dictionaries(st.sampled_from(ChatBody.__struct_fields__) | st.text(max_size=4), json_values),
)
def test_any_object_is_either_a_call_or_a_refusal(fields: dict[str, Any]) -> None:
    raw = orjson.dumps(CHAT | fields, option=orjson.OPT_NON_STR_KEYS, default=str) if _fits(fields) else b"{}"
    try:
        call = read_chat(raw)
    except InvalidRequest as error:
        assert error.message
    else:
        assert len(call.asks(7)) == call.n


def _fits(value: Any) -> bool:
    """True where orjson can write it: it knows 64-bit whole numbers only."""
    if isinstance(value, dict):
        return all(map(_fits, value.values()))
    if isinstance(value, list):
        return all(map(_fits, value))
    return not isinstance(value, int) or -(2**63) <= value < 2**64


@given(st.binary(max_size=60))
def test_any_bytes_are_either_a_call_or_a_refusal(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_chat(raw)
