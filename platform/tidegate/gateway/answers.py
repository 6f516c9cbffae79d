"""The OpenAI objects that Tidegate answers with, and how segments become them.

The structs are encoded by msgspec and are also the source of the OpenAPI document.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from tidegate.messages.work import Finish, Segment, TokenLogprob

UNLIKELY_LOGPROB = -9999.0  # what OpenAI sends for "very unlikely"; JSON has no infinity

Finished = Literal["stop", "length"]


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob] | None
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry a token. `text_offset` counts characters from the start of `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Usage(msgspec.Struct):
    """Token counts, the engine's own. The prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswerMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finished


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finished


class Completion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


encode = msgspec.json.Encoder().encode


def usage(finishes: Sequence[Finish | None], n: int) -> Usage:
    """Sum over the sequences of a call: `n` neighbouring ones share one prompt, which counts once."""
    prompt = sum(
        max((f.prompt_tokens for f in finishes[i : i + n] if f), default=0)
        for i in range(0, len(finishes), n)
    )
    completion = sum(finish.completion_tokens for finish in finishes if finish)
    return Usage(prompt, completion, prompt + completion)


def chat_choice(index: int, segments: Sequence[Segment], finish: Finish, wants_logprobs: bool) -> ChatChoice:
    text = "".join([segment.output.text for segment in segments])
    logprobs = ChatLogprobs(chat_logprobs(_tokens(segments))) if wants_logprobs else None
    return ChatChoice(index, ChatAnswerMessage("assistant", text), logprobs, _finished(finish))


def completion_choice(
    index: int, segments: Sequence[Segment], finish: Finish, top: int | None
) -> CompletionChoice:
    """`top`: how many alternatives were asked for; None for no logprobs at all."""
    text = "".join([segment.output.text for segment in segments])
    logprobs = None if top is None else TextOffsets().logprobs(_tokens(segments), top)
    return CompletionChoice(index, text, logprobs, _finished(finish))


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> list[ChatTokenLogprob]:
    return [
        ChatTokenLogprob(
            token.token,
            finite(token.logprob),
            list(token.raw),
            [TopLogprob(text, finite(value), list(raw)) for _, text, value, raw in token.top],
        )
        for token in tokens
    ]


class TextOffsets:
    """Turns tokens into completions logprobs and counts the characters before each, over a whole choice.

    A token may hold part of a character. A character is counted with the token that begins it, so a token
    that begins inside one has that character's offset.
    """

    __slots__ = ("_characters",)

    def __init__(self) -> None:
        self._characters = 0

    def logprobs(self, tokens: Iterable[TokenLogprob], top: int) -> CompletionLogprobs:
        result = CompletionLogprobs([], [], [] if top else None, [])
        for token in tokens:
            begins_inside = bool(token.raw) and _continues(token.raw[0])
            result.text_offset.append(max(0, self._characters - begins_inside))
            self._characters += sum(not _continues(byte) for byte in token.raw)
            name = _token_name(token.token, token.raw)
            result.tokens.append(name)
            result.token_logprobs.append(None if token.logprob is None else finite(token.logprob))
            if result.top_logprobs is None:
                continue
            if token.logprob is None:
                result.top_logprobs.append(None)
                continue
            best = {_token_name(text, raw): finite(value) for _, text, value, raw in token.top}
            best.setdefault(name, finite(token.logprob))
            result.top_logprobs.append(best)
        return result


def finite(logprob: float | None) -> float:
    """JSON holds neither infinity nor NaN."""
    if logprob is None or math.isnan(logprob):
        return UNLIKELY_LOGPROB
    return max(logprob, UNLIKELY_LOGPROB)


def _token_name(text: str, raw: bytes) -> str:
    """OpenAI's form for a token that is no whole character; keeps different ones apart."""
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _continues(byte: int) -> bool:
    """True for the second and later bytes of a UTF-8 character."""
    return byte & 0xC0 == 0x80


def _tokens(segments: Sequence[Segment]) -> list[TokenLogprob]:
    return [token for segment in segments for token in segment.output.logprobs]


def _finished(finish: Finish) -> Finished:
    return "length" if finish.reason == "length" else "stop"
