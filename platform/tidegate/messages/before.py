"""Requests and segments as the version before wrote them, which had no envelope: read, never written."""

from __future__ import annotations

import msgspec

from tidegate.messages.work import (
    Finish,
    Generate,
    Prompt,
    Request,
    Sampling,
    Segment,
    TokenLogprob,
    Tokens,
)


class FlatRequest(msgspec.Struct, frozen=True, array_like=True):
    id: str
    tenant: str
    model: str
    revision: str
    gateway: str
    created: float
    deadline: float
    priority: int
    cost: int
    prompt: Prompt
    sampling: Sampling


class FlatSegment(msgspec.Struct, frozen=True, array_like=True):
    request_id: str
    seq: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] = []
    prompt_tokens: int = 0
    finish: Finish | None = None


_request_decoder = msgspec.msgpack.Decoder(FlatRequest)
_segment_decoder = msgspec.msgpack.Decoder(FlatSegment)


def decode_request(body: bytes) -> Request:
    flat = msgspec.structs.asdict(_request_decoder.decode(body))
    work = Generate(flat.pop("prompt"), flat.pop("sampling"))
    return Request(**flat, work=work)


def decode_segment(body: bytes | memoryview) -> Segment:
    flat = _segment_decoder.decode(body)
    output = Tokens(flat.token_ids, flat.text, flat.logprobs)
    return Segment(flat.request_id, flat.seq, flat.finish, output, flat.prompt_tokens)
