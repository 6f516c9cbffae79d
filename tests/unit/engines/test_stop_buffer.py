from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.stop_buffer import StopBuffer

stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)
piece_lists = st.lists(st.text("abc\n", max_size=4), max_size=20)


def visible(text: str, stops: list[str]) -> tuple[str, str]:
    """The definition: cut where the first stop string that is complete begins. Which one is the second."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, ""


def run(stops: list[str], pieces: list[str]) -> tuple[str, str]:
    buffer = StopBuffer(stops)
    out = "".join(map(buffer.push, pieces))
    return out + ("" if buffer.stopped else buffer.flush()), buffer.stopped_by


@given(stop_lists, piece_lists)
def test_result_depends_on_the_text_and_not_on_its_pieces(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == visible("".join(pieces), stops)


@given(stop_lists, piece_lists)
def test_nothing_is_taken_back_and_little_is_held(stops: list[str], pieces: list[str]) -> None:
    buffer = StopBuffer(stops)
    out, seen = "", ""
    longest = max(map(len, stops), default=1)
    for piece in pieces:
        out += buffer.push(piece)
        seen += piece
        final, _ = visible(seen, stops)
        assert final.startswith(out)
        if not buffer.stopped:
            assert len(seen) - len(out) < longest


@given(stop_lists, piece_lists, piece_lists)
def test_pushing_the_same_text_again_rebuilds_it(
    stops: list[str], before: list[str], after: list[str]
) -> None:
    first, second = StopBuffer(stops), StopBuffer(stops)
    for piece in before:
        first.push(piece)
    second.push("".join(before))
    assert first.stopped == second.stopped
    assert "".join(map(first.push, after)) + first.flush() == second.push("".join(after)) + second.flush()


@pytest.mark.parametrize(
    ("stops", "pieces", "out"),
    [
        (["END"], ["so E", "N", "D more"], "so "),
        (["END"], ["so E", "Nd"], "so ENd"),
        (["ab", "b"], ["xa", "b"], "x"),
        (["\n\n"], ["a\n", "b\n", "\n", "c"], "a\nb"),
        ([], ["anything"], "anything"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], out: str) -> None:
    assert run(stops, pieces)[0] == out


def test_nothing_comes_after_a_stop() -> None:
    buffer = StopBuffer(["."])
    assert buffer.push("end. and") == "end"
    assert buffer.push("more") == ""
    assert buffer.flush() == ""


@given(stop_lists, piece_lists)
def test_the_stop_string_itself_is_kept_where_asked_for(stops: list[str], pieces: list[str]) -> None:
    buffer = StopBuffer(stops, keeps_stop=True)
    out = "".join(map(buffer.push, pieces)) + ("" if buffer.stopped else buffer.flush())
    text = "".join(pieces)
    cut, stop = visible(text, stops)
    assert buffer.stopped_by == stop
    if not buffer.stopped:
        assert out == text
    else:
        assert out == cut + stop


@given(stop_lists, piece_lists, st.integers(0, 8))
def test_stop_strings_that_end_in_a_text_that_may_not_stop_are_passed_over(
    stops: list[str], pieces: list[str], least: int
) -> None:
    buffer = StopBuffer(stops)
    out = "".join(buffer.push(piece, may_stop=place >= least) for place, piece in enumerate(pieces))
    out += "" if buffer.stopped else buffer.flush()
    text, free = "".join(pieces), len("".join(pieces[:least]))
    ends = [
        (end, end - len(stop))
        for stop in stops
        for end in range(free + 1, len(text) + 1)
        if text[:end].endswith(stop)
    ]
    assert buffer.stopped == bool(ends)
    assert out == (text[: min(ends)[1]] if ends else text)
