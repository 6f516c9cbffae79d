"""Every stream of server-sent events has these parts, whatever its dialect."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": heartbeat\n\n"


def waiting_comment(position: int, wait_seconds: float | None, why: str = "") -> bytes:
    """`why` is one line."""
    estimate = "" if wait_seconds is None else f", estimated wait {wait_seconds:.0f} s"
    return f": waiting, position {position}{estimate}{why and f', {why}'}\n\n".encode()


_LINE_BREAKERS: Sequence[tuple[bytes, bytes]] = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\u0085".encode(), b"\\u0085"),
)


def text_json(text: str) -> bytes:
    """A JSON string. Characters that some clients' line splitters take for line ends are escaped, because
    a line is what delimits an event."""
    escaped = orjson.dumps(text)
    return escaped if text.isascii() else on_one_line(escaped)


def on_one_line(json: bytes) -> bytes:
    """The same for any JSON."""
    for raw, escape in _LINE_BREAKERS:
        if raw in json:
            json = json.replace(raw, escape)
    return json
