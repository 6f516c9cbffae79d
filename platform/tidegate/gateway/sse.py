"""Server-sent events of a stream, byte for byte.

Everything that stays the same over a stream is joined once; a token costs one JSON escape and one join.
Each event carries `id: {call id}/{k}` with k counting up over the call's events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import orjson

from tidegate.gateway.answers import TextOffsets, Usage, chat_logprobs, encode
from tidegate.messages.work import Segment

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": heartbeat\n\n"
_ROLE = b'{"role":"assistant","content":"","refusal":null}'


class Events(Protocol):
    """Renders one call's segments as events."""

    def render(self, index: int, segment: Segment) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...


class _Frame:
    """Event ids and the parts that all chunks of a call share."""

    __slots__ = ("_event", "_head", "_sent", "_tail")

    def __init__(
        self, call_id: str, kind: str, created: int, model: str, revision: str, has_usage: bool
    ) -> None:
        self._sent = 0
        self._event = b"id: " + call_id.encode() + b"/"
        self._head = (
            b'\ndata: {"id":"%b","object":"%b","created":%d,"model":%b,"system_fingerprint":%b,"choices":['
            % (call_id.encode(), kind.encode(), created, text_json(model), text_json(revision))
        )
        self._tail = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"

    def chunk(self, choice: bytes) -> bytes:
        self._sent += 1
        return b"%b%d%b%b%b" % (self._event, self._sent, self._head, choice, self._tail)

    def usage(self, usage: Usage) -> bytes:
        self._sent += 1
        return b'%b%d%b],"usage":%b}\n\n' % (self._event, self._sent, self._head, encode(usage))


class ChatEvents:
    """`chat.completion.chunk`: the role first, then text, then an empty delta with the finish reason."""

    __slots__ = ("_began", "_frame", "_logprobs")

    def __init__(
        self, call_id: str, created: int, model: str, revision: str, *, has_usage: bool, logprobs: bool
    ) -> None:
        self._frame = _Frame(call_id, "chat.completion.chunk", created, model, revision, has_usage)
        self._began: set[int] = set()
        self._logprobs = logprobs

    def render(self, index: int, segment: Segment) -> bytes:
        out = b""
        chunk = self._frame.chunk
        if index not in self._began:
            self._began.add(index)
            out = chunk(b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null}' % (index, _ROLE))
        text, logprobs = segment.output.text, segment.output.logprobs
        if self._logprobs and logprobs:
            out += chunk(
                b'{"index":%d,"delta":{"content":%b},"logprobs":{"content":%b,"refusal":null},"finish_reason":null}'
                % (index, text_json(text), encode(chat_logprobs(logprobs)))
            )
        elif text:
            out += chunk(
                b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'
                % (index, text_json(text))
            )
        if segment.finish is not None:
            out += chunk(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}'
                % (index, b"length" if segment.finish.reason == "length" else b"stop")
            )
        return out

    def usage(self, usage: Usage) -> bytes:
        return self._frame.usage(usage)


class CompletionEvents:
    """`text_completion` chunks; the last one of a choice carries its finish reason."""

    __slots__ = ("_frame", "_offsets", "_top")

    def __init__(
        self,
        call_id: str,
        created: int,
        model: str,
        revision: str,
        *,
        has_usage: bool,
        top: int | None,
        choices: int,
    ) -> None:
        self._frame = _Frame(call_id, "text_completion", created, model, revision, has_usage)
        self._top = top
        self._offsets = [TextOffsets() for _ in range(choices if top is not None else 0)]

    def render(self, index: int, segment: Segment) -> bytes:
        finish = segment.finish
        output = segment.output
        if not output.text and not output.logprobs and finish is None:
            return b""
        logprobs = b"null"
        if self._top is not None and output.logprobs:
            logprobs = encode(self._offsets[index].logprobs(output.logprobs, self._top))
        reason = b"null" if finish is None else b'"length"' if finish.reason == "length" else b'"stop"'
        return self._frame.chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
            % (index, text_json(output.text), logprobs, reason)
        )

    def usage(self, usage: Usage) -> bytes:
        return self._frame.usage(usage)


def error_event(body: dict[str, object]) -> bytes:
    """An error after the status line. No `[DONE]` follows it."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def waiting_comment(position: int, wait_seconds: float | None) -> bytes:
    estimate = "" if wait_seconds is None else f", estimated wait {wait_seconds:.0f} s"
    return f": waiting, position {position}{estimate}\n\n".encode()


_LINE_BREAKERS: Sequence[tuple[bytes, bytes]] = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\u0085".encode(), b"\\u0085"),
)


def text_json(text: str) -> bytes:
    """A JSON string. Characters that some clients' line splitters take for line ends are escaped, because
    a line is what delimits an event."""
    escaped = orjson.dumps(text)
    if not text.isascii():
        for raw, escape in _LINE_BREAKERS:
            if raw in escaped:
                escaped = escaped.replace(raw, escape)
    return escaped
