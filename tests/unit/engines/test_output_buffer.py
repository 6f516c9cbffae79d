from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.output_buffer import OutputBuffer
from tidegate.messages.work import TokenLogprob


def entry(number: int, text: str = "") -> TokenLogprob:
    return TokenLogprob(number, text, -1.0, text.encode())


def test_an_entry_goes_out_with_its_text() -> None:
    answer = OutputBuffer(["STOP"])
    assert answer.push("a", entry(0)) == ("a", [entry(0)])
    assert answer.push("S", entry(1)) == ("", [])
    assert answer.push("T", entry(2)) == ("", [])
    assert answer.push("x", entry(3)) == ("STx", [entry(1), entry(2), entry(3)])


def test_a_token_that_a_stop_string_swallows_counts_and_has_its_entry() -> None:
    answer = OutputBuffer(["STOP"])
    answer.push("aST", entry(0))
    text, entries = answer.push("OP", entry(1))
    assert (text, entries, answer.stopped) == ("", [entry(1)], True)


def test_flush_gives_what_was_held() -> None:
    answer = OutputBuffer(["STOP"])
    answer.push("ST", entry(0))
    assert answer.flush() == ("ST", [entry(0)])


def test_a_token_without_text_goes_out_where_nothing_is_held() -> None:
    answer = OutputBuffer([])
    assert answer.push("", entry(0)) == ("", [entry(0)])


@given(st.lists(st.text("abS", max_size=3), max_size=15))
def test_every_entry_goes_out_once_and_in_order(pieces: list[str]) -> None:
    answer = OutputBuffer(["SSS"])
    out: list[TokenLogprob] = []
    number = -1
    for number, piece in enumerate(pieces):
        out += answer.push(piece, entry(number))[1]
        if answer.stopped:
            break
    else:
        number = len(pieces) - 1
        out += answer.flush()[1]
    assert [item.token_id for item in out] == list(range(number + 1))
