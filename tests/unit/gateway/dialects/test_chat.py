"""Segments into OpenAI's chat objects and chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion as OpenAIChatCompletion
from openai.types.chat import ChatCompletionChunk

from tests.unit.gateway.dialects.segments import a_segment, a_token, events
from tidegate.gateway.dialects.base import AnswerHead, Usage, count_usage
from tidegate.gateway.dialects.chat import Chat, ChatEvents
from tidegate.gateway.dialects.openai import Shown
from tidegate.messages.work import Finish, Segment, TokenLogprob, Tokens

STOP = Finish("stop", prompt_tokens=3, completion_tokens=2)
HEAD = AnswerHead("chatcmpl-1", 5, 'm"é', "r1")
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat_events(has_usage: bool = False, logprobs: bool = False) -> ChatEvents:
    return ChatEvents(HEAD, Shown(has_usage), has_logprobs=logprobs)


def test_a_chat_answer_is_openais_object() -> None:
    segments = [a_segment("a"), a_segment("b", a_token("b"), finish=STOP)]
    call = Chat().read(orjson.dumps(BODY | {"logprobs": True}))
    raw = call.answer(HEAD, [segments], count_usage([STOP], 1))
    parsed = OpenAIChatCompletion.model_validate_json(raw, strict=True)
    assert parsed.choices[0].message.content == "ab"
    assert parsed.choices[0].logprobs is not None and parsed.choices[0].logprobs.content is not None
    assert parsed.model_dump(exclude_unset=True) == orjson.loads(raw)


@given(st.lists(st.text(max_size=6), min_size=1, max_size=5))
def test_chat_chunks_are_openais_and_hold_the_text(texts: list[str]) -> None:
    rendered = chat_events()
    raw = b"".join(
        rendered.render(0, Segment("x", i, output=Tokens([1], text))) for i, text in enumerate(texts)
    )
    raw += rendered.render(0, Segment("x", len(texts), finish=Finish("stop")))
    found = events(raw)
    chunks = [ChatCompletionChunk.model_validate_json(data, strict=True) for _, data in found]
    assert {event_id for event_id, _ in found} == {""}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(texts)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert {chunk.model for chunk in chunks} == {'m"é'}


def test_each_choice_begins_with_its_role() -> None:
    rendered = chat_events()
    raw = b"".join(rendered.render(index, Segment("x", 0, output=Tokens([1], "t"))) for index in (1, 0, 1))
    deltas = [orjson.loads(data)["choices"][0] for _, data in events(raw)]
    assert [(choice["index"], "role" in choice["delta"]) for choice in deltas] == [
        (1, True),
        (1, False),
        (0, True),
        (0, False),
        (1, False),
    ]


def test_usage_is_null_until_the_last_chunk() -> None:
    rendered = chat_events(has_usage=True)
    [(_, first), *_] = events(rendered.render(0, Segment("x", 0, output=Tokens([1], "t"))))
    assert orjson.loads(first)["usage"] is None
    [(_, last)] = events(rendered.end(Usage(1, 2, 3)).removesuffix(b"data: [DONE]\n\n"))
    assert orjson.loads(last)["choices"] == []
    assert orjson.loads(last)["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert chat_events().end(Usage(1, 2, 3)) == b"data: [DONE]\n\n"
    plain = events(chat_events().render(0, Segment("x", 0, output=Tokens([1], "t"))))
    assert "usage" not in orjson.loads(plain[0][1])


@pytest.mark.parametrize("finish", [None, Finish("length"), STOP])
def test_a_token_without_text_has_a_chunk(finish: Finish | None) -> None:
    chunks = [
        orjson.loads(data)["choices"][0]
        for _, data in events(chat_events().render(0, Segment("x", 0, finish, Tokens([2], ""))))
    ]
    assert [chunk["delta"] for chunk in chunks if "role" not in chunk["delta"]] == [
        {"content": ""},
        *([] if finish is None else [{}]),
    ]


def test_tokens_whose_text_waits_still_send_their_logprobs() -> None:
    rendered = chat_events(logprobs=True)
    token = TokenLogprob(1, "\ufffd", -1.0, b"\xf0")
    data = events(rendered.render(0, Segment("x", 0, output=Tokens([1], "", [token]))))[1][1]
    chunk = ChatCompletionChunk.model_validate_json(data, strict=True)
    assert chunk.choices[0].logprobs is not None and chunk.choices[0].logprobs.content is not None
    assert chunk.choices[0].logprobs.content[0].bytes == [0xF0]


def prompt_entries() -> list[TokenLogprob]:
    top = [(7, "x", -0.25, b"x"), (5, "y", -1.5, b"y")]
    return [TokenLogprob(4, "<s>", None, b""), TokenLogprob(9, "z", -3.0, b"z", top, rank=12)]


def test_a_whole_answer_shows_tokens_and_prompt_as_vllms() -> None:
    first = Tokens([3], "a", prompt_ids=[4, 9], prompt_logprobs=prompt_entries())
    segments = [Segment("x.0", 0, None, first), Segment("x.0", 1, STOP, Tokens([6, 2], "b"))]
    body = BODY | {"return_token_ids": True, "prompt_logprobs": 2, "n": 2}
    answer = orjson.loads(Chat().read(orjson.dumps(body)).answer(HEAD, [segments] * 2, Usage(2, 6, 8)))
    assert [choice["token_ids"] for choice in answer["choices"]] == [[3, 6, 2]] * 2
    assert answer["prompt_token_ids"] == [4, 9]
    assert answer["prompt_logprobs"] == [
        None,
        {
            "7": {"logprob": -0.25, "rank": 1, "decoded_token": "x"},
            "5": {"logprob": -1.5, "rank": 2, "decoded_token": "y"},
            "9": {"logprob": -3.0, "rank": 12, "decoded_token": "z"},
        },
    ]
    plain = orjson.loads(Chat().read(orjson.dumps(BODY)).answer(HEAD, [segments], Usage(2, 3, 5)))
    assert plain.keys().isdisjoint({"prompt_token_ids", "prompt_logprobs"})
    assert "token_ids" not in plain["choices"][0]


def streamed(fields: Mapping[str, Any], *segments: Segment) -> list[dict[str, Any]]:
    call = Chat().read(orjson.dumps({**BODY, "stream": True, **fields}))
    rendered = call.events(HEAD)
    raw = b"".join(rendered.render(0, segment) for segment in segments) + rendered.end(Usage(2, 3, 5))
    return [orjson.loads(data) for _, data in events(raw.removesuffix(b"data: [DONE]\n\n"))]


def test_a_stream_shows_the_prompts_tokens_first_and_then_each_chunks() -> None:
    first = Segment("x.0", 0, None, Tokens([3], "", prompt_ids=[4, 9]), 2)  # its text waits
    last = Segment("x.0", 1, STOP, Tokens([6, 2], "b"))
    role, held, text, end = streamed({"return_token_ids": True}, first, last)
    assert role["prompt_token_ids"] == [4, 9]
    assert [chunk["choices"][0].get("token_ids") for chunk in (role, held, text, end)] == [
        None,
        [3],
        [6, 2],
        None,
    ]
    assert held["choices"][0]["delta"] == {"content": ""}
    assert all("prompt_token_ids" not in chunk for chunk in (held, text, end))


def test_usage_runs_along_where_asked_for() -> None:
    segments = [Segment("x.0", 0, None, Tokens([3], "a"), 2), Segment("x.0", 1, STOP, Tokens([6, 2], "b"))]
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = streamed(options, *segments)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 3, 3, 3]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}
    assert all(chunk["usage"]["total_tokens"] == 2 + chunk["usage"]["completion_tokens"] for chunk in chunks)
    without = streamed({"stream_options": {"continuous_usage_stats": True}}, *segments)
    assert all("usage" not in chunk for chunk in without)


HISTORY = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The gate"}]


@pytest.mark.parametrize(
    ("fields", "role", "content"),
    [
        ({"echo": True}, "assistant", "The gate keeper"),
        ({"continue_final_message": True}, "assistant", " keeper"),
        ({"continue_final_message": True, "echo": True}, "assistant", "The gate keeper"),
        ({"messages": HISTORY[:1], "echo": True}, "assistant", " keeper"),
        ({"messages": HISTORY[:1], "echo": True, "add_generation_prompt": False}, "user", "Who? keeper"),
    ],
)
def test_echo_puts_a_last_message_of_the_same_role_first(
    fields: dict[str, Any], role: str, content: str
) -> None:
    segment = a_segment(" keeper", finish=STOP)
    fields = {"messages": HISTORY} | fields
    call = Chat().read(orjson.dumps(BODY | fields))
    message = orjson.loads(call.answer(HEAD, [[segment]], Usage(1, 1, 2)))["choices"][0]["message"]
    assert (message["role"], message["content"]) == (role, content)
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed(fields, segment)]
    assert deltas[0]["role"] == role
    assert "".join(delta.get("content", "") for delta in deltas) == content


def test_tokens_are_named_by_their_ids_where_asked_for() -> None:
    entry = TokenLogprob(9, "\ufffd", -3.0, b"\xe2", [(9, "\ufffd", -3.0, b"\xe2")])
    fields = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    call = Chat().read(orjson.dumps(BODY | fields))
    answer = orjson.loads(call.answer(HEAD, [[a_segment("x", entry, finish=STOP)]], Usage(1, 1, 2)))
    [shown] = answer["choices"][0]["logprobs"]["content"]
    assert (shown["token"], shown["top_logprobs"][0]["token"]) == ("token_id:9", "token_id:9")
    chunks = streamed(fields, a_segment("x", entry, finish=STOP))
    assert chunks[1]["choices"][0]["logprobs"]["content"] == [shown]
