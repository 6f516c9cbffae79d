"""The bytes that every stream has."""

from __future__ import annotations

import orjson
from hypothesis import given
from hypothesis import strategies as st

from tidegate.gateway import sse


@given(st.text())
def test_no_text_breaks_a_line(text: str) -> None:
    escaped = sse.text_json(text)
    assert orjson.loads(escaped) == text
    assert len(escaped.decode().splitlines()) == 1


def test_comments_say_the_place_and_the_wait_where_it_is_known() -> None:
    assert sse.waiting_comment(3, 12.4) == b": waiting, position 3, estimated wait 12 s\n\n"
    assert sse.waiting_comment(3, None) == b": waiting, position 3\n\n"
    assert sse.waiting_comment(1, None, "Held.") == b": waiting, position 1, Held.\n\n"
