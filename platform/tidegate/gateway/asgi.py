"""The few ASGI pieces that the hot routes use directly: heads, bodies, plain answers."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, cast

import orjson

from tidegate.errors import InvalidRequest, RequestError, RequestTooLarge, UnsupportedMedia

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

REQUEST_ID = "tidegate.request_id"  # keys of the scope
DEPLOYMENT = "tidegate.deployment"  # the model, where the path names it
JSON = (b"content-type", b"application/json")
_MOST_MEMBERS = 64  # of a gzip body: empty ones cost time and no bytes
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def stream_head(media_type: str) -> tuple[Header, ...]:
    return (
        (b"content-type", f"{media_type}; charset=utf-8".encode()),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would gather events into large writes
    )


class ClientLeft(Exception):
    """The connection closed before the whole request came."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this (lowercase) name."""
    for key, value in scope["headers"]:
        if key == name:
            return cast(bytes, value)
    return None


def text_header(scope: Scope, name: bytes) -> str | None:
    value = header(scope, name)
    return None if value is None else value.decode("latin-1")


def request_id_of(scope: Scope) -> str:
    """The client's `x-request-id` where it is harmless in a log and a header, else a new one."""
    sent = header(scope, b"x-request-id")
    if sent is not None and _SANE_ID.fullmatch(sent):
        return sent.decode()
    return f"req_{random.getrandbits(128):032x}"


async def read_body(
    scope: Scope, receive: Receive, limit_bytes: int, count: Callable[[int], None] = lambda _: None
) -> bytes:
    """The whole body, unpacked where it is gzip: `limit_bytes` bounds it before and after. `count` is told
    how many bytes there are so far and may raise. Raises `UnsupportedMedia` for another encoding, and what
    `_read_sent` raises."""
    encoding = (text_header(scope, b"content-encoding") or "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise UnsupportedMedia(
            f"content-encoding: {encoding[:40]!r}: send the body as gzip or as it is.",
            param="content-encoding",
        )
    sent = await _read_sent(scope, receive, limit_bytes, count)
    if encoding == "identity":
        return sent
    whole = _gunzip(sent, limit_bytes)
    count(len(whole))
    return whole


def _gunzip(packed: bytes, limit_bytes: int) -> bytes:
    """Raises `RequestTooLarge` as soon as more than `limit_bytes` come out, `InvalidRequest` for what is no
    gzip."""
    out = bytearray()
    for _ in range(_MOST_MEMBERS):
        member = zlib.decompressobj(wbits=31)
        try:
            out += member.decompress(packed, limit_bytes + 1 - len(out))
        except zlib.error:
            break
        if len(out) > limit_bytes:
            raise _too_large(len(out), limit_bytes)
        if not member.eof:
            break
        packed = member.unused_data
        if not packed:
            return bytes(out)
    raise InvalidRequest(
        "content-encoding: gzip: the body is no gzip, or not all of it: send it whole.",
        param="content-encoding",
    )


async def _read_sent(scope: Scope, receive: Receive, limit_bytes: int, count: Callable[[int], None]) -> bytes:
    """The whole body as it was sent. Raises `RequestTooLarge` (before reading, where the length is declared),
    `InvalidRequest` for a broken length and `ClientLeft`."""
    declared = header(scope, b"content-length")
    if declared is not None:
        if not declared.isdigit():
            raise InvalidRequest(
                f"content-length: {declared[:20]!r}: send a whole number.", param="content-length"
            )
        if int(declared) > limit_bytes:
            raise _too_large(int(declared), limit_bytes)
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientLeft
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        if len(body) > limit_bytes:
            raise _too_large(len(body), limit_bytes)
        count(len(body))
        return body
    gathered = bytearray(body)  # a list of parts would weigh a multiple of parts of one byte
    while message.get("more_body", False):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        gathered += message.get("body", b"")
        if len(gathered) > limit_bytes:
            raise _too_large(len(gathered), limit_bytes)
        try:
            count(len(gathered))
        except RequestError:
            gathered.clear()
            count(0)
            # An answer before the end of the body would be lost in the reset that follows.
            await _discard(message, receive)
            raise
    return bytes(gathered)


async def _discard(message: Message, receive: Receive) -> None:
    """Read what is left of a body."""
    while message.get("more_body", False):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft


async def send_json(send: Send, status: int, body: bytes, headers: Iterable[Header] = ()) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [JSON, (b"content-length", b"%d" % len(body)), *headers],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: RequestError, body: bytes | None = None) -> None:
    """`body`: the error in another form than OpenAI's."""
    headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
    if error.status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send_json(send, error.status, body or orjson.dumps(error.body()), headers)


def _too_large(size: int, limit_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"The body has {size} bytes or more and the limit is {limit_bytes}. Send less, or raise "
        "TIDEGATE_MAX_BODY_BYTES."
    )
