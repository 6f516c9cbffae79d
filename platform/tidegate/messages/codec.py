"""Requests and segments as bytes, as they lie in Redis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import replace

from tidegate.messages import before
from tidegate.messages.kept import KeptCall
from tidegate.messages.work import Inputs, Prompt, Request, Segment

_HUGE_NUMBER = 1  # the msgpack extension type of a whole number beyond 64 bits: signed, big-endian

_encoder = msgspec.msgpack.Encoder()


class _Head(msgspec.Struct, array_like=True):
    """What every segment begins with, the version before's too."""

    request_id: str
    seq: int


def read_extension(code: int, data: memoryview) -> int:
    if code != _HUGE_NUMBER:
        raise msgspec.ValidationError(f"extension type {code}: this version knows {_HUGE_NUMBER} only")
    return int.from_bytes(data, "big", signed=True)


_head_decoder = msgspec.msgpack.Decoder(_Head)
_segment_decoder = msgspec.msgpack.Decoder(Segment)
_kept_decoder = msgspec.msgpack.Decoder(KeptCall, ext_hook=read_extension)
_request_decoder = msgspec.msgpack.Decoder(Request, ext_hook=read_extension)


def encode_prompt(prompt: Prompt | Inputs) -> bytes:
    return encode_open(prompt)


def encode_open(value: msgspec.Struct) -> bytes:
    """Encode what holds any JSON of clients, numbers of any size too: a chat's messages, its template's
    variables, the schemas of its tools. Its decoder has `read_extension`."""
    try:
        return _encoder.encode(value)
    except OverflowError:
        return _encoder.encode(_with_huge_numbers(msgspec.to_builtins(value)))


def _with_huge_numbers(value: list[Any]) -> list[Any]:
    """`value`, changed in place: msgpack has whole numbers of 64 bits at most, so larger ones become
    extensions. By a list of what is left to do, since JSON may be nested deeper than Python calls."""
    left: list[Any] = [value]
    while left:
        part = left.pop()
        for place, item in list(part.items() if isinstance(part, dict) else enumerate(part)):
            if isinstance(item, dict | list):
                left.append(item)
            elif isinstance(item, int) and not -(1 << 63) <= item < 1 << 64:
                size_bytes = item.bit_length() // 8 + 1
                data = item.to_bytes(size_bytes, "big", signed=True)
                part[place] = msgspec.msgpack.Ext(_HUGE_NUMBER, data)
    return value


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


def encode_kept(call: KeptCall) -> bytes:
    try:
        return _encoder.encode(call)
    except OverflowError:
        return _encoder.encode(_with_huge_numbers(msgspec.to_builtins(call, builtin_types=(bytes,))))


def decode_kept(record: bytes) -> KeptCall:
    return _kept_decoder.decode(record)


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
