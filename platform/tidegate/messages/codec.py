"""Requests and segments as bytes, as they lie in Redis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import replace

from tidegate.errors import InvalidRequest
from tidegate.messages import before
from tidegate.messages.work import ChatPrompt, Prompt, Request, Segment

_encoder = msgspec.msgpack.Encoder()


class _Head(msgspec.Struct, array_like=True):
    """What every segment begins with, the version before's too."""

    request_id: str
    seq: int


_head_decoder = msgspec.msgpack.Decoder(_Head)
_segment_decoder = msgspec.msgpack.Decoder(Segment)
_request_decoder = msgspec.msgpack.Decoder(Request)


def encode_prompt(prompt: Prompt) -> bytes:
    """Raises `InvalidRequest` for a whole number that msgpack has no form for: a chat's messages and the
    variables of its template hold any JSON besides the fields that are declared."""
    try:
        return _encoder.encode(prompt)
    except OverflowError as error:
        assert isinstance(prompt, ChatPrompt)
        field, bits = _too_large(prompt)
        raise InvalidRequest(
            f"{field}: a whole number of {bits} bits: at most 64 are taken, so send it as a text.",
            param=field,
        ) from error


def _too_large(prompt: ChatPrompt) -> tuple[str, int]:
    """The place of a whole number that does not fit, and its bits."""
    parts: list[tuple[str, Any]] = [
        ("chat_template_kwargs", prompt.template_args),
        ("messages", prompt.messages),
    ]
    while parts:
        place, value = parts.pop()
        if isinstance(value, dict):
            parts += [(f"{place}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            parts += [(f"{place}[{index}]", item) for index, item in enumerate(value)]
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            return place, value.bit_length()
    raise AssertionError("every number of the prompt fits")


def encode_request(request: Request, prompt: bytes | None = None) -> bytes:
    """`prompt`: the request's own as `encode_prompt` made it, where several requests share it."""
    if prompt is not None:
        work = replace(request.work, prompt=msgspec.Raw(prompt))
        request = replace(request, work=work)
    return _encoder.encode(request)


def decode_request(body: bytes) -> Request:
    """Raises `msgspec.ValidationError` for what is no request of this version nor of the one before."""
    try:
        return _request_decoder.decode(body)
    except msgspec.ValidationError:
        return before.decode_request(body)


def encode_segment(segment: Segment) -> bytes:
    return _encoder.encode(segment)


def decode_segments(blob: bytes | bytearray, from_seq: int = 0) -> list[Segment]:
    """Decode framed segments laid end to end, as logs and channel messages hold them; those before `from_seq`
    are left out unread.

    msgpack delimits itself, but msgspec decodes one value per call, so each is framed (see `frame`).
    """
    segments = []
    view, position, end = memoryview(blob), 0, len(blob)
    while position < end:
        start = position + 4
        position = start + int.from_bytes(view[position:start], "big")
        body = view[start:position]
        if from_seq and _head_decoder.decode(body).seq < from_seq:
            continue
        try:
            segments.append(_segment_decoder.decode(body))
        except msgspec.ValidationError:
            segments.append(before.decode_segment(body))
    return segments


def frame(segment: bytes) -> bytes:
    """One encoded segment with its 4-byte big-endian length in front."""
    return len(segment).to_bytes(4, "big") + segment


def encode_segments(segments: Iterable[Segment]) -> bytes:
    return b"".join(frame(encode_segment(segment)) for segment in segments)
