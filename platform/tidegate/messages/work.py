"""A request and what comes of it, between gateway, queue and replica.

All are frozen msgspec structs, encoded as msgpack arrays: the position of a field is its wire format,
so new fields are appended with a default and none is ever reordered.

    gateway ──Request──> queue ──Claim──> replica ──Segment──> queue (log + channel) ──Segment──> gateway

A *segment* is what one engine step adds to one request. The segments of a request are numbered from 0
without a gap (`seq`); concatenated they are the request's log, from which another replica continues and
any gateway can replay what it missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

TERMINAL_STATES = ("done", "failed", "cancelled", "expired")
FinishReason = Literal["stop", "length", "error", "cancelled", "expired"]


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen and when to stop. The gateway has resolved every default."""

    seed: int  # always set: continuation needs it, so the gateway draws one where the client gave none
    max_tokens: int | None = None  # None: up to the context length
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None  # None: no logprobs; 0: the chosen token's only; n: and n alternatives
    echo: bool = False  # completions: the prompt comes first in the text (and in logprobs)
    ignore_eos: bool = False


class ChatPrompt(msgspec.Struct, frozen=True, array_like=True, tag="chat"):
    """Messages as the client sent them (validated); the replica renders the chat template."""

    messages: list[dict[str, Any]]


class TextPrompt(msgspec.Struct, frozen=True, array_like=True, tag="text"):
    text: str


class TokenPrompt(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    token_ids: list[int]


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to generate: the unit of queueing, of leases and of terminal states.

    An HTTP call with `n` choices or several prompts becomes that many requests, submitted in one atomic
    step and named `{call id}.{index}`.
    """

    id: str
    tenant: str
    model: str
    revision: str
    gateway: str  # id of the gateway process whose channel gets the segments
    created: float  # unix seconds
    deadline: float  # unix seconds; past it the request must not reach an engine
    priority: int  # higher first; 0 is the default
    cost: int  # estimated tokens (input + output), corrected later by the replica
    prompt: ChatPrompt | TextPrompt | TokenPrompt
    sampling: Sampling


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability (natural log) of one token and of its likeliest alternatives."""

    token_id: int
    token: str  # the token alone, decoded; bytes of a partial character as U+FFFD
    logprob: float | None  # None only for the first prompt token under `echo`
    raw: bytes
    top: list[tuple[int, str, float, bytes]] = []  # (token id, token, logprob, bytes), likeliest first


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Why a request ended. `code` and `message` are set for `error`, `cancelled` and `expired`."""

    reason: FinishReason
    code: str = ""  # a stable CamelCase reason: InvalidPrompt, PoisonRequest, ContextLengthExceeded, ...
    message: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step adds to one request. `text` holds only characters that can never be taken back:
    partial UTF-8 and possible beginnings of a stop string wait for later tokens."""

    request_id: str
    seq: int  # 0, 1, 2, ... per request, across attempts
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] = []
    prompt_tokens: int = 0  # in segment 0 (and wherever known)
    finish: Finish | None = None


class Claim(msgspec.Struct, frozen=True):
    """A request leased to a replica. `log` is what earlier attempts emitted; only a write that names
    `attempt` is accepted."""

    request: Request
    attempt: int
    log: list[Segment]


_encoder = msgspec.msgpack.Encoder()
_segment_decoder = msgspec.msgpack.Decoder(Segment)
_request_decoder = msgspec.msgpack.Decoder(Request)


def encode_request(request: Request) -> bytes:
    return _encoder.encode(request)


def decode_request(body: bytes) -> Request:
    return _request_decoder.decode(body)


def encode_segment(segment: Segment) -> bytes:
    return _encoder.encode(segment)


def decode_segments(blob: bytes) -> list[Segment]:
    """Decode framed segments laid end to end, as logs and channel messages hold them.

    msgpack delimits itself, but msgspec decodes one value per call, so each is framed (see `frame`).
    """
    return list(_unframe(blob))


def frame(segment: bytes) -> bytes:
    """One encoded segment with its 4-byte big-endian length in front."""
    return len(segment).to_bytes(4, "big") + segment


def encode_segments(segments: Iterable[Segment]) -> bytes:
    return b"".join(frame(encode_segment(segment)) for segment in segments)


def _unframe(blob: bytes) -> Iterator[Segment]:
    view, position, end = memoryview(blob), 0, len(blob)
    while position < end:
        length = int.from_bytes(view[position : position + 4], "big")
        position += 4
        yield _segment_decoder.decode(view[position : position + length])
        position += length
