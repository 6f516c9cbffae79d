"""Segments to render, and what was rendered taken apart again."""

from __future__ import annotations

from tidegate.messages.work import Finish, Segment, TokenLogprob, Tokens


def a_segment(text: str, *logprobs: TokenLogprob, finish: Finish | None = None) -> Segment:
    return Segment("x.0", 0, finish, Tokens([1], text, list(logprobs)))


def a_token(text: str, logprob: float | None = -0.5) -> TokenLogprob:
    return TokenLogprob(1, text, logprob, text.encode())


def events(raw: bytes) -> list[tuple[str, bytes]]:
    """(id, data) of each event; the id is empty where none was sent."""
    found = []
    for block in raw.split(b"\n\n")[:-1]:
        lines = block.split(b"\n")
        event_id, data = lines if len(lines) == 2 else (b"", *lines)
        found.append((event_id.removeprefix(b"id: ").decode(), data.removeprefix(b"data: ")))
    return found
