"""Segments into OpenAI's objects."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion as OpenAIChatCompletion

from tidegate.gateway import answers
from tidegate.gateway.answers import TextOffsets
from tidegate.messages.work import Finish, Segment, TokenLogprob, Tokens

STOP = Finish("stop", prompt_tokens=3, completion_tokens=2)


def a_segment(text: str, *logprobs: TokenLogprob) -> Segment:
    return Segment("x.0", 0, output=Tokens([1], text, list(logprobs)))


def a_token(text: str, logprob: float | None = -0.5) -> TokenLogprob:
    return TokenLogprob(1, text, logprob, text.encode())


def test_choices_of_one_prompt_count_it_once() -> None:
    usage = answers.usage([STOP, STOP, None, STOP], n=2)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 6, 12)


def test_a_chat_answer_is_openais_object() -> None:
    choice = answers.chat_choice(0, [a_segment("a"), a_segment("b", a_token("b"))], STOP, True)
    usage = answers.usage([STOP], 1)
    raw = answers.encode(answers.ChatCompletion("id", "chat.completion", 1, "m", [choice], usage, "r1"))
    parsed = OpenAIChatCompletion.model_validate_json(raw, strict=True)
    assert parsed.choices[0].message.content == "ab"
    assert parsed.choices[0].logprobs is not None and parsed.choices[0].logprobs.content is not None
    assert parsed.model_dump(exclude_unset=True) == orjson.loads(raw)


def test_a_completion_is_openais_object() -> None:
    choice = answers.completion_choice(0, [a_segment("ab", a_token("a"), a_token("b"))], STOP, 2)
    usage = answers.usage([STOP], 1)
    raw = answers.encode(answers.Completion("id", "text_completion", 1, "m", [choice], usage, "r1"))
    parsed = OpenAICompletion.model_validate_json(raw, strict=True)
    assert parsed.choices[0].logprobs is not None
    assert parsed.choices[0].logprobs.text_offset == [0, 1]
    assert parsed.model_dump(exclude_unset=True) == orjson.loads(raw)


@pytest.mark.parametrize(
    ("logprob", "sent"), [(-0.5, -0.5), (float("-inf"), -9999.0), (float("nan"), -9999.0), (-1e30, -9999.0)]
)
def test_logprobs_are_always_json_numbers(logprob: float, sent: float) -> None:
    assert answers.finite(logprob) == sent


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
