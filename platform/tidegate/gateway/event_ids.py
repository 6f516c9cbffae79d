"""Ids of events, from which a client that was cut off goes on: only for those who ask, as many parsers take
no line before `data:`.

The events of one choice are a function of its log, so they are the same on every gateway; how those of
several choices lie between each other is not. So an id counts each choice by itself: `{call id}/{k}`, with
several choices `{call id}/{k0},{k1},...`: so many events of each were sent, this one among them. What ends
the answer counts as the last choice's.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.gateway.bodies import refusal
from tidegate.gateway.dialects.base import Events, Usage
from tidegate.gateway.sse import DONE
from tidegate.messages.work import Segment

_MOST_DIGITS = 10


class NumberedEvents:
    """The events of any dialect, without the first `seen` of each choice. `has_ids`: an id before each."""

    def __init__(self, events: Events, call_id: str, seen: Sequence[int], *, has_ids: bool = True) -> None:
        self._events = events
        self._head = b"id: " + call_id.encode() + b"/"
        self._seen = seen
        self._sent = [0] * len(seen)
        self._has_ids = has_ids

    def render(self, index: int, segment: Segment) -> bytes:
        return self.numbered(index, self._events.render(index, segment))

    def end(self, usage: Usage) -> bytes:
        return self.numbered(len(self._sent) - 1, self._events.end(usage))

    def numbered(self, index: int, events: bytes) -> bytes:
        """Events that were written beside the answer's, as those of a choice."""
        out = []
        for event in events.split(b"\n\n")[:-1]:
            event += b"\n\n"
            if event == DONE:  # which says only that this is all
                out.append(event)
                continue
            self._sent[index] += 1
            if self._sent[index] > self._seen[index]:
                if self._has_ids:
                    counts = [b"%d" % max(counts) for counts in zip(self._sent, self._seen, strict=True)]
                    out.append(b"%b%b\n" % (self._head, b",".join(counts)))
                out.append(event)
        return b"".join(out)


def seen_events(text: str, sequences: int, param: str) -> list[int]:
    """How many events of each choice a client has, as an id says it. Raises `InvalidRequest`."""
    counts = text.split(",")
    if len(counts) != sequences or not all(map(_is_whole, counts)):
        form = "a whole number" if sequences == 1 else f"{sequences} whole numbers with commas between them"
        raise refusal(param, text, f"send {form}, as the last event's id ends")
    return [int(count) for count in counts]


def whole_number(text: str, param: str, form: str) -> int:
    """Raises `InvalidRequest`, which says to send `form`."""
    if not _is_whole(text):
        raise refusal(param, text, f"send {form}")
    return int(text)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
