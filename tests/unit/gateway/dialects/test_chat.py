"""Segments into OpenAI's chat objects and chunks."""

from __future__ import annotations

import orjson
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


def test_event_ids_count_up_for_who_asks() -> None:
    rendered = ChatEvents(
        AnswerHead("chatcmpl-1", 5, "m", "r1", has_event_ids=True), Shown(has_usage=True), has_logprobs=False
    )
    raw = rendered.render(0, a_segment("t", finish=STOP)) + rendered.end(Usage(1, 2, 3))
    ids = [event_id for event_id, _ in events(raw.removesuffix(b"data: [DONE]\n\n"))]
    assert ids == [f"chatcmpl-1/{number}" for number in (1, 2, 3, 4)]


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


def test_tokens_whose_text_waits_still_send_their_logprobs() -> None:
    rendered = chat_events(logprobs=True)
    token = TokenLogprob(1, "\ufffd", -1.0, b"\xf0")
    data = events(rendered.render(0, Segment("x", 0, output=Tokens([1], "", [token]))))[1][1]
    chunk = ChatCompletionChunk.model_validate_json(data, strict=True)
    assert chunk.choices[0].logprobs is not None and chunk.choices[0].logprobs.content is not None
    assert chunk.choices[0].logprobs.content[0].bytes == [0xF0]
