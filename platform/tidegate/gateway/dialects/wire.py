"""What the endpoints of one protocol share: the body of an error, and what a stream has beside its events."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from tidegate.errors import RequestError
from tidegate.gateway import sse

encode = msgspec.json.Encoder().encode


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class Wire:
    """OpenAI's, over server-sent events. Another protocol says what is its own."""

    media_type = "text/event-stream"
    can_resume = True  # its events may have ids
    error_body: ClassVar[type[msgspec.Struct]] = ErrorBody

    def error(self, error: RequestError) -> bytes:
        """An answer that is an error, as JSON."""
        return encode(error.body())

    def error_event(self, error: RequestError) -> bytes:
        """An error after the status line, where the stream ends."""
        return b"data: %b\n\n" % self.error(error)

    def comment(self, comment: bytes) -> bytes:
        """What a stream tells a person while its call waits; empty where the protocol has no place for it."""
        return comment

    def heartbeat(self, model: str) -> bytes:  # noqa: ARG002 - some protocols name it in every line
        return sse.HEARTBEAT


OPENAI = Wire()


def shown_message(error: RequestError) -> str:
    """The sentence that a client is told."""
    message: str = error.body()["error"]["message"]
    return message
