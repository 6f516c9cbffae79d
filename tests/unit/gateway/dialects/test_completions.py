"""Segments into OpenAI's text completions and their chunks."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as OpenAICompletion

from tests.unit.gateway.dialects.segments import a_segment, a_token, events
from tidegate.gateway.dialects.base import AnswerHead, Usage, count_usage
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
    assert rendered.render(0, Segment("x", 0)) == b""
    raw = rendered.render(0, Segment("x", 0, output=Tokens([1], "")))
    raw += rendered.render(0, Segment("x", 1, output=Tokens([1], "a")))
    raw += rendered.render(0, Segment("x", 2, output=Tokens([1], "b"), finish=Finish("length")))
    choices = [orjson.loads(data)["choices"][0] for _, data in events(raw)]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [
        ("", None),
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


def a_choice(*logprobs: float, prompt: int = 0) -> list[Segment]:
    """Its text says its tokens' log probabilities; `prompt` tokens of an echo stand before them."""
    entries = [a_token("p", None if not at else -50.0) for at in range(prompt)]
    entries += [a_token("t", value) for value in logprobs]
    finish = Finish("stop", prompt_tokens=prompt, completion_tokens=len(logprobs))
    return [Segment("x.0", 0, finish, Tokens([1] * len(logprobs), repr(logprobs), entries))]


@pytest.mark.parametrize("echo", [False, True])
def test_the_likeliest_choices_by_token_are_the_answer(echo: bool) -> None:
    body = {"model": "m", "prompt": ["a", "b"], "best_of": 3, "n": 2, "echo": echo}
    call = Completions().read(orjson.dumps(body))
    assert call.n == 3
    assert [ask.work.sampling.top_logprobs for ask in call.asks(7)] == [0] * 6  # type: ignore[union-attr]
    prompt = 2 if echo else 0
    long, short, worst = (
        a_choice(*[-1.0] * 9, prompt=prompt),
        a_choice(-2.0, prompt=prompt),
        a_choice(-9.0, prompt=prompt),
    )
    answer = orjson.loads(call.answer(HEAD, [short, long, worst, worst, short, long], Usage(1, 1, 2)))
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [repr((-1.0,) * 9), repr((-2.0,))] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in answer["choices"])


def test_best_of_n_ranks_nothing() -> None:
    call = Completions().read(
        orjson.dumps({"model": "m", "prompt": "a", "best_of": 2, "n": 2, "stream": True})
    )
    assert [ask.work.sampling.top_logprobs for ask in call.asks(7)] == [None, None]  # type: ignore[union-attr]


def test_each_choice_shows_its_prompt_as_vllms() -> None:
    body = {"model": "m", "prompt": ["a", "b"], "return_token_ids": True, "prompt_logprobs": 0}
    call = Completions().read(orjson.dumps(body))
    entries = [TokenLogprob(4, "<s>", None, b""), TokenLogprob(9, "z", -3.0, b"z", rank=12)]
    choices = [
        [Segment("x.0", 0, STOP, Tokens([3], "a", prompt_ids=ids, prompt_logprobs=entries))]
        for ids in ([4, 9], [5, 9])
    ]
    answer = orjson.loads(call.answer(HEAD, choices, Usage(4, 2, 6)))
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[4, 9], [5, 9]]
    assert [choice["token_ids"] for choice in answer["choices"]] == [[3], [3]]
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {"9": {"logprob": -3.0, "rank": 12, "decoded_token": "z"}},
    ]
    assert "prompt_logprobs" not in answer


def test_chunks_show_tokens_and_running_usage() -> None:
    body = {
        "model": "m",
        "prompt": "a",
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    rendered = Completions().read(orjson.dumps(body)).events(HEAD)
    raw = rendered.render(0, Segment("x.0", 0, None, Tokens([3], "", prompt_ids=[4, 9]), 2))
    raw += rendered.render(0, Segment("x.0", 1, STOP, Tokens([6, 2], "b")))
    first, last = (orjson.loads(data) for _, data in events(raw))
    assert (first["choices"][0]["token_ids"], first["choices"][0]["prompt_token_ids"]) == ([3], [4, 9])
    assert last["choices"][0]["token_ids"] == [6, 2]
    assert "prompt_token_ids" not in last["choices"][0]
    assert [chunk["usage"]["completion_tokens"] for chunk in (first, last)] == [1, 3]
