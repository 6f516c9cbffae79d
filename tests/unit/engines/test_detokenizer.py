from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.detokenizer import ByteDetokenizer, WindowDetokenizer

FFFD = "\N{REPLACEMENT CHARACTER}"


def bytes_of(token_id: int) -> bytes:
    return bytes([token_id])


def push_all(data: bytes) -> list[str]:
    detokenizer = ByteDetokenizer(bytes_of)
    return [detokenizer.push(byte) for byte in data]


@given(st.text(max_size=40))
def test_bytes_of_a_text_give_the_text(text: str) -> None:
    assert "".join(push_all(text.encode())) == text


@given(st.text(max_size=20))
def test_a_character_comes_whole_or_not_yet(text: str) -> None:
    if FFFD not in text:
        assert FFFD not in "".join(push_all(text.encode()))


@given(st.binary(max_size=40))
def test_any_bytes_decode_as_a_whole_decode_would(data: bytes) -> None:
    out = "".join(push_all(data))
    # An incomplete end is dropped; half of what would be a surrogate stands for one mark a byte.
    assert data.decode(errors="replace") in (out, out + FFFD, out + 2 * FFFD)


@given(st.binary(max_size=40))
def test_no_byte_is_held_for_longer_than_a_character(data: bytes) -> None:
    """Four bytes later a byte has come out, whatever it was."""
    detokenizer = ByteDetokenizer(bytes_of)
    out = "".join(detokenizer.push(byte) for byte in data)
    assert detokenizer.push(ord("x")).endswith("x")
    assert len(out.encode()) >= len(data) - 3 or FFFD in out


@given(st.binary(max_size=30), st.binary(max_size=10))
def test_the_same_tokens_rebuild_the_same_state(before: bytes, after: bytes) -> None:
    first, second = ByteDetokenizer(bytes_of), ByteDetokenizer(bytes_of)
    for byte in before:
        first.push(byte)
        second.push(byte)
    assert [first.push(byte) for byte in after] == [second.push(byte) for byte in after]


def test_an_invalid_byte_comes_out_at_once() -> None:
    assert push_all(b"a\xffb") == ["a", FFFD, "b"]


def test_special_tokens_have_no_text() -> None:
    detokenizer = ByteDetokenizer({0: b"", 1: b"\xc3", 2: b"\xa9"}.__getitem__)
    assert [detokenizer.push(token) for token in (1, 0, 2)] == ["", "", "é"]


def test_the_space_before_a_first_word_is_dropped_once() -> None:
    words = {0: b"", 1: b" tide", 2: b" gate"}
    detokenizer = ByteDetokenizer(words.__getitem__, strip_first_space=True)
    assert [detokenizer.push(token) for token in (0, 1, 2)] == ["", "tide", " gate"]


def window(data: bytes) -> list[str]:
    detokenizer = WindowDetokenizer(lambda ids: bytes(ids).decode(errors="replace"))
    return [detokenizer.push(byte) for byte in data]


@given(st.text(max_size=30))
def test_a_window_gives_the_whole_text(text: str) -> None:
    if FFFD not in text:
        assert "".join(window(text.encode())) == text


def test_a_window_does_not_hold_invalid_bytes_for_ever() -> None:
    assert "".join(window(b"\xff" * 8 + b"x")).endswith("x")
    assert "".join(window(b"\xff" * 8)).count(FFFD) >= 4


def test_a_window_stays_short_where_tokens_say_nothing() -> None:
    words = ["", "tide", "gate"]
    seen = []

    def decode(ids: list[int]) -> str:
        seen.append(len(ids))
        return " ".join(words[token] for token in ids if token)

    detokenizer = WindowDetokenizer(decode)
    ids = [1, *[0] * 500, 2, *[0] * 70, 1]
    assert "".join(map(detokenizer.push, ids)) == "tide gate tide"
    assert max(seen) < 100


def test_a_window_keeps_the_spaces_between_words() -> None:
    """Decoders that strip the first word's space need context to keep those between words."""
    words = ["tide", "gate", "!"]
    detokenizer = WindowDetokenizer(lambda ids: " ".join(words[token] for token in ids).replace(" !", "!"))
    assert "".join(map(detokenizer.push, (0, 1, 2, 0))) == "tide gate! tide"
