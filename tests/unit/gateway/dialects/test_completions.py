"""Segments into OpenAI's text completions and their chunks."""

from __future__ import annotations

import orjson
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as OpenAICompletion

from tests.unit.gateway.dialects.segments import a_segment, a_token, events
from tidegate.gateway.dialects.base import AnswerHead, count_usage
from tidegate.gateway.dialects.completions import CompletionEvents, Completions, TextOffsets
from tidegate.gateway.dialects.openai import Shown
from tidegate.messages.work import Finish, Segment, TokenLogprob, Tokens

STOP = Finish("stop", prompt_tokens=3, completion_tokens=2)
HEAD = AnswerHead("cmpl-1", 5, "m", "r1")


def test_a_completion_is_openais_object() -> None:
    segments = [a_segment("ab", a_token("a"), a_token("b"), finish=STOP)]
    call = Completions().read(orjson.dumps({"model": "m", "prompt": "x", "logprobs": 2}))
    raw = call.answer(HEAD, [segments], count_usage([STOP], 1))
    parsed = OpenAICompletion.model_validate_json(raw, strict=True)
    assert parsed.choices[0].logprobs is not None
    assert parsed.choices[0].logprobs.text_offset == [0, 1]
    assert parsed.model_dump(exclude_unset=True) == orjson.loads(raw)


def test_offsets_count_characters_over_split_ones() -> None:
    wave = "🌊".encode()
    tokens = [
        a_token("é"),
        TokenLogprob(2, "\ufffd", -1.0, wave[:2]),
        TokenLogprob(3, "\ufffd", -1.0, wave[2:]),
        a_token("z"),
    ]
    logprobs = TextOffsets().logprobs(tokens, 0)
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.tokens == ["é", r"bytes:\xf0\x9f", r"bytes:\x8c\x8a", "z"]
    assert logprobs.top_logprobs is None


@given(st.lists(st.text(min_size=1, max_size=4), max_size=8))
def test_offsets_are_where_the_tokens_stand_in_the_text(words: list[str]) -> None:
    words = [word for word in words if "\ufffd" not in word]
    logprobs = TextOffsets().logprobs([a_token(word) for word in words], 0)
    text = "".join(words)
    for word, offset in zip(words, logprobs.text_offset, strict=True):
        assert text[offset : offset + len(word)] == word


def test_the_chosen_token_is_among_the_likeliest_of_completions() -> None:
    token = TokenLogprob(1, "a", -3.0, b"a", [(2, "b", -0.1, b"b")])
    logprobs = TextOffsets().logprobs([token, a_token("first", None)], 1)
    assert logprobs.top_logprobs == [{"b": -0.1, "a": -3.0}, None]
    assert logprobs.token_logprobs == [-3.0, None]


def test_of_two_tokens_with_one_name_the_likelier_counts() -> None:
    token = TokenLogprob(
        1, "a", -0.1, b"a", [(1, "a", -0.1, b"a"), (2, "b", -2.5, b"b"), (3, "a", -3.0, b"a")]
    )
    assert TextOffsets().logprobs([token], 3).top_logprobs == [{"a": -0.1, "b": -2.5}]


def test_completion_chunks_carry_the_reason_with_the_last_text() -> None:
    rendered = CompletionEvents(HEAD, Shown(), top=None, choices=1)
    assert rendered.render(0, Segment("x", 0, output=Tokens([1], ""))) == b""
    raw = rendered.render(0, Segment("x", 1, output=Tokens([1], "a")))
    raw += rendered.render(0, Segment("x", 2, output=Tokens([1], "b"), finish=Finish("length")))
    choices = [orjson.loads(data)["choices"][0] for _, data in events(raw)]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [
        ("a", None),
        ("b", "length"),
    ]


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    rendered = CompletionEvents(HEAD, Shown(), top=0, choices=1)
    offsets = []
    for position, word in enumerate(("ab", "cde", "f")):
        token = TokenLogprob(1, word, -1.0, word.encode())
        [(_, data)] = events(rendered.render(0, Segment("x", position, output=Tokens([1], word, [token]))))
        offsets += orjson.loads(data)["choices"][0]["logprobs"]["text_offset"]
    assert offsets == [0, 2, 5]
