"""What a generation call answers with: its events, its one JSON object, its error, news of its place."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from tidegate.errors import (
    GenerationFailed,
    InvalidRequest,
    ModelUnavailable,
    RequestError,
    RequestExpired,
)
from tidegate.gateway import admission, answers, sse
from tidegate.gateway.asgi import Header
from tidegate.gateway.calls import Call
from tidegate.gateway.stream import OpenCall
from tidegate.messages.queue import Place
from tidegate.messages.registry import ModelEntry
from tidegate.messages.work import Finish, Segment
from tidegate.telemetry import fields

logger = logging.getLogger("tidegate.gateway")


@dataclass(slots=True)
class Plan:
    """A call that was admitted to the queue's door."""

    call: Call
    call_id: str
    entry: ModelEntry
    revision: str
    created: int


def failure_error(finish: Finish, kind: str, model: str) -> RequestError:
    """What the client is told of a request that ended badly. A 5xx shows the stable code, not the inside."""
    param = "messages" if kind == "chat" else "prompt"
    if finish.reason == "expired":
        return RequestExpired(finish.message or "The request waited longer than it may and never ran.")
    if finish.reason == "cancelled":
        return ModelUnavailable(
            finish.message or f"The model {model!r} was removed while the request waited.",
            code="request_cancelled",
        )
    if finish.code == "ContextLengthExceeded":
        return InvalidRequest(finish.message, param=param, code="context_length_exceeded")
    if finish.code == "InvalidPrompt":
        return InvalidRequest(finish.message, param=param, code="invalid_prompt")
    logger.error("a request failed in the engine: %s", finish.message, extra=fields(code=finish.code))
    return GenerationFailed(
        f"The model {model!r} failed on this request ({finish.code or 'EngineError'}). "
        "The log has the details under this answer's x-request-id."
    )


def is_good(segment: Segment) -> bool:
    return segment.finish is None or segment.finish.reason in ("stop", "length")


def events_of(plan: Plan) -> sse.Events:
    call = plan.call
    shared: tuple[Any, ...] = (plan.call_id, plan.created, plan.entry.name, plan.revision)
    if call.kind == "chat":
        return sse.ChatEvents(*shared, has_usage=call.include_usage, logprobs=call.logprobs is not None)
    return sse.CompletionEvents(
        *shared, has_usage=call.include_usage, top=call.logprobs, choices=call.sequences
    )


def assembled(plan: Plan, opened: OpenCall, choices: list[list[Segment]]) -> tuple[bytes, answers.Usage]:
    call = plan.call
    finishes = opened.finishes()
    usage = answers.usage(finishes, call.n)
    ended = [finish for finish in finishes if finish is not None]
    if call.kind == "chat":
        return answers.encode(
            answers.ChatCompletion(
                plan.call_id,
                "chat.completion",
                plan.created,
                plan.entry.name,
                [
                    answers.chat_choice(index, segments, finish, call.logprobs is not None)
                    for index, (segments, finish) in enumerate(zip(choices, ended, strict=True))
                ],
                usage,
                plan.revision,
            )
        ), usage
    return answers.encode(
        answers.Completion(
            plan.call_id,
            "text_completion",
            plan.created,
            plan.entry.name,
            [
                answers.completion_choice(index, segments, finish, call.logprobs)
                for index, (segments, finish) in enumerate(zip(choices, ended, strict=True))
            ],
            usage,
            plan.revision,
        )
    ), usage


def estimated_wait_seconds(place: Place, entry: ModelEntry) -> float | None:
    """Seconds until the request starts; None where neither drain rate nor waking time is known."""
    if place.ahead is None:
        return None
    wait = admission.predicted_wait_seconds(place.ahead + 1, place.depth, entry)
    return wait if wait > 0 else None


def news(place: Place, entry: ModelEntry) -> bytes:
    if place.ahead is None:
        return b""
    return sse.waiting_comment(place.ahead + 1, estimated_wait_seconds(place, entry))


def place_headers(place: Place, entry: ModelEntry) -> list[Header]:
    """For a status line that goes out while the request waits; empty where it waits no more."""
    if place.ahead is None:
        return []
    headers = [(b"x-tidegate-queue-position", b"%d" % (place.ahead + 1))]
    if (wait := estimated_wait_seconds(place, entry)) is not None:
        headers.append((b"x-tidegate-estimated-wait-seconds", b"%.0f" % wait))
    return headers
