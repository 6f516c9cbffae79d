"""The bytes of a stream."""

from __future__ import annotations

import orjson
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from tidegate.gateway import sse
from tidegate.gateway.answers import Usage
from tidegate.messages.work import Finish, Segment, TokenLogprob, Tokens


def events(raw: bytes) -> list[tuple[str, bytes]]:
    """(id, data) of each event."""
    found = []
    for block in raw.split(b"\n\n")[:-1]:
        event_id, data = block.split(b"\n")
        found.append((event_id.removeprefix(b"id: ").decode(), data.removeprefix(b"data: ")))
    return found


def chat_events(has_usage: bool = False, logprobs: bool = False) -> sse.ChatEvents:
    return sse.ChatEvents("chatcmpl-1", 5, 'm"é', "r1", has_usage=has_usage, logprobs=logprobs)


@given(st.lists(st.text(max_size=6), min_size=1, max_size=5))
def test_chat_chunks_are_openais_and_hold_the_text(texts: list[str]) -> None:
    rendered = chat_events()
    raw = b"".join(
        rendered.render(0, Segment("x", i, output=Tokens([1], text))) for i, text in enumerate(texts)
    )
    raw += rendered.render(0, Segment("x", len(texts), finish=Finish("stop")))
    found = events(raw)
    chunks = [ChatCompletionChunk.model_validate_json(data, strict=True) for _, data in found]
    assert [event_id for event_id, _ in found] == [f"chatcmpl-1/{i + 1}" for i in range(len(found))]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(texts)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert {chunk.model for chunk in chunks} == {'m"é'}


@given(st.text())
def test_no_text_breaks_a_line(text: str) -> None:
    escaped = sse.text_json(text)
    assert orjson.loads(escaped) == text
    assert len(escaped.decode().splitlines()) == 1


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
    [(_, last)] = events(rendered.usage(Usage(1, 2, 3)))
    assert orjson.loads(last)["choices"] == []
    assert orjson.loads(last)["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    plain = events(chat_events().render(0, Segment("x", 0, output=Tokens([1], "t"))))
    assert "usage" not in orjson.loads(plain[0][1])


def test_tokens_whose_text_waits_still_send_their_logprobs() -> None:
    rendered = chat_events(logprobs=True)
    token = TokenLogprob(1, "\ufffd", -1.0, b"\xf0")
    data = events(rendered.render(0, Segment("x", 0, output=Tokens([1], "", [token]))))[1][1]
    chunk = ChatCompletionChunk.model_validate_json(data, strict=True)
    assert chunk.choices[0].logprobs is not None and chunk.choices[0].logprobs.content is not None
    assert chunk.choices[0].logprobs.content[0].bytes == [0xF0]


def test_completion_chunks_carry_the_reason_with_the_last_text() -> None:
    rendered = sse.CompletionEvents("cmpl-1", 5, "m", "r1", has_usage=False, top=None, choices=1)
    assert rendered.render(0, Segment("x", 0, output=Tokens([1], ""))) == b""
    raw = rendered.render(0, Segment("x", 1, output=Tokens([1], "a")))
    raw += rendered.render(0, Segment("x", 2, output=Tokens([1], "b"), finish=Finish("length")))
    choices = [orjson.loads(data)["choices"][0] for _, data in events(raw)]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [
        ("a", None),
        ("b", "length"),
    ]


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    rendered = sse.CompletionEvents("cmpl-1", 5, "m", "r1", has_usage=False, top=0, choices=1)
    offsets = []
    for position, word in enumerate(("ab", "cde", "f")):
        token = TokenLogprob(1, word, -1.0, word.encode())
        [(_, data)] = events(rendered.render(0, Segment("x", position, output=Tokens([1], word, [token]))))
        offsets += orjson.loads(data)["choices"][0]["logprobs"]["text_offset"]
    assert offsets == [0, 2, 5]


def test_comments_say_the_place_and_the_wait_where_it_is_known() -> None:
    assert sse.waiting_comment(3, 12.4) == b": waiting, position 3, estimated wait 12 s\n\n"
    assert sse.waiting_comment(3, None) == b": waiting, position 3\n\n"
