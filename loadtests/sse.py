"""Reads an HTTP/1.1 answer, streamed or not, just closely enough to count and time it.

The load generator shares two cores with what it measures, so it must cost far less than the platform:
bytes are counted and searched, never parsed as JSON, except the one `usage` object at the end.
"""

from __future__ import annotations

import re
from enum import Enum

HEAD_END = b"\r\n\r\n"
CHAT_MARK, CHAT_EMPTY = b'"content":"', b'"content":""'
DONE = b"data: [DONE]"
ERROR, USAGE = b'{"error":', b'"usage":{'
LAST_CHUNK = b"\r\n0\r\n\r\n"
_CARRY = 160  # bytes kept from one read to the next: longer than any mark
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


class Phase(Enum):
    HEAD = "head"
    BODY = "body"
    COMPLETE = "complete"


class AnswerReader:
    """One answer. `feed` returns how many content events the bytes completed."""

    __slots__ = (
        "_carry",
        "_head",
        "_left",
        "events",
        "failed_in_stream",
        "headers",
        "phase",
        "status",
        "tokens",
    )

    def __init__(self) -> None:
        self.phase = Phase.HEAD
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.events = 0
        self.tokens: int | None = None  # the platform's own count, from `usage`
        self.failed_in_stream = False
        self._head = b""
        self._carry = b""
        self._left: int | None = None  # bytes of body to come; None: chunked

    def feed(self, received: bytes) -> int:
        if self.phase is Phase.BODY:
            return self._body(received)
        if self.phase is Phase.COMPLETE:
            return 0
        self._head += received
        end = self._head.find(HEAD_END)
        if end < 0:
            return 0
        self._read_head(self._head[:end])
        rest, self._head = self._head[end + 4 :], b""
        self.phase = Phase.BODY
        if self._left == 0:
            self.phase = Phase.COMPLETE
            return 0
        return self._body(rest) if rest else 0

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        matched = _STATUS.match(first)
        self.status = int(matched[1]) if matched else -1
        for line in lines:
            name, _, value = line.partition(b":")
            self.headers[name.strip().lower()] = value.strip()
        length = self.headers.get(b"content-length")
        self._left = int(length) if length is not None else None

    def _body(self, received: bytes) -> int:
        carry = self._carry
        joined = carry + received
        # A mark lies wholly in `carry` only where it was counted before.
        fresh = count_events(joined) - count_events(carry)
        self.events += fresh
        self._carry = joined[-_CARRY:]
        if self._left is not None:
            self._left -= len(received)
            if self._left <= 0:
                self._finish(joined)
        elif joined.endswith(LAST_CHUNK) or joined == LAST_CHUNK[2:]:
            self._finish(joined)
        if ERROR in joined:
            self.failed_in_stream = True
        if self.tokens is None and USAGE in joined:
            self._read_usage(joined)
        return fresh

    def _finish(self, joined: bytes) -> None:
        self.phase = Phase.COMPLETE
        self._read_usage(joined)

    def _read_usage(self, joined: bytes) -> None:
        if matched := _USAGE.search(joined):
            self.tokens = int(matched[1])


def count_events(body: bytes) -> int:
    """Content events in these bytes: chunks of a chat completion whose delta has text."""
    found = body.count(CHAT_MARK)
    return found - body.count(CHAT_EMPTY) if found else 0
