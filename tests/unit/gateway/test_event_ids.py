"""Event ids: each choice counted by itself, and what a client has left out."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.gateway.dialects.segments import events
from tidegate.errors import InvalidRequest
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.completions import CompletionEvents
from tidegate.gateway.dialects.openai import Shown
from tidegate.gateway.event_ids import NumberedEvents, seen_events
from tidegate.messages.work import Finish, Segment, Tokens

DONE = b"data: [DONE]\n\n"


def numbered(seen: list[int]) -> NumberedEvents:
    head = AnswerHead("cmpl-1", 5, "m", "r1")
    written = CompletionEvents(head, Shown(has_usage=True), top=None, choices=len(seen))
    return NumberedEvents(written, "cmpl-1", seen)


def a_segment(index: int, seq: int, length: int) -> Segment:
    finish = Finish("stop") if seq == length - 1 else None
    return Segment(f"cmpl-1.{index}", seq, finish, Tokens([seq], f"{index}:{seq}\n\n"))


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Lengths of the choices' logs, and two orders in which their segments may come."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    turns = [index for index, length in enumerate(lengths) for _ in range(length)]
    return lengths, draw(st.permutations(turns)), draw(st.permutations(turns))


def written(rendered: NumberedEvents, lengths: list[int], order: list[int]) -> list[tuple[str, bytes]]:
    seqs, raw = [0] * len(lengths), b""
    for index in order:
        raw += rendered.render(index, a_segment(index, seqs[index], lengths[index]))
        seqs[index] += 1
    raw += rendered.end(Usage(1, 2, 3))
    assert raw.endswith(DONE)
    return events(raw.removesuffix(DONE))


@given(orders(), st.data())
def test_after_any_event_the_rest_follows_once_in_whatever_order_it_comes(
    drawn: tuple[list[int], list[int], list[int]], data: st.DataObject
) -> None:
    lengths, order, other = drawn
    first = written(numbered([0] * len(lengths)), lengths, order)
    cut = data.draw(st.integers(1, len(first)))
    counts = first[cut - 1][0].removeprefix("cmpl-1/")
    seen = seen_events(counts, len(lengths), "starting_after")
    rest = written(numbered(seen), lengths, other)
    assert sorted(text for _, text in first) == sorted(text for _, text in first[:cut] + rest)
    # And once more from the middle of the rest.
    if rest:
        again = written(numbered(seen_events(rest[0][0][7:], len(lengths), "x")), lengths, order)
        assert sorted(text for _, text in rest[1:]) == sorted(text for _, text in again)


def test_ids_are_left_out_where_nobody_asks() -> None:
    head = AnswerHead("cmpl-1", 5, "m", "r1")
    written = CompletionEvents(head, Shown(has_usage=True), top=None, choices=1)
    rendered = NumberedEvents(written, "cmpl-1", [1], has_ids=False)
    raw = rendered.render(0, a_segment(0, 0, 2)) + rendered.render(0, a_segment(0, 1, 2))
    [(event_id, text)] = events(raw)
    assert event_id == ""
    assert orjson.loads(text)["choices"][0]["text"] == "0:1\n\n"


@pytest.mark.parametrize("text", ["", "-1", "x", "1,2", "1" * 11, "²", "1 "])
def test_what_is_no_count_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        seen_events(text, 1, "starting_after")
    assert caught.value.param == "starting_after"
