"""A call is told this besides its answer: why it failed, and how long it still waits."""

from __future__ import annotations

import logging

from tidegate.control.reasons import Reason
from tidegate.errors import (
    PROMPT_REFUSALS,
    REFUSED_FIELDS,
    GenerationFailed,
    InvalidRequest,
    ModelUnavailable,
    RequestError,
    RequestExpired,
)
from tidegate.gateway import admission, sse
from tidegate.gateway.asgi import Header
from tidegate.gateway.dialects.base import Call
from tidegate.messages.queue import Place
from tidegate.messages.registry import ModelEntry
from tidegate.messages.work import Finish
from tidegate.telemetry import fields

logger = logging.getLogger("tidegate.gateway")

REVISION_RETRY_SECONDS = 1.0
# Faults that have a sentence for the client, and their codes.
_TOLD = {
    "ReaderTooSlow": "reader_too_slow",
    "AnswerTooLarge": "answer_too_large",
    "ChatTemplateInvalid": "chat_template_invalid",
}


def failure_error(finish: Finish, call: Call, entry: ModelEntry) -> RequestError:
    """Say to the client why a request ended badly. A 5xx shows the stable code, not the inside."""
    if finish.reason == "expired":
        said = finish.message or "The request waited longer than it may and never ran."
        return RequestExpired(f"{said} {entry.message}" if _waits_for_room(entry) else said)
    if finish.reason == "cancelled":
        return ModelUnavailable(
            finish.message or f"The model {entry.name!r} was removed while the request waited.",
            code="request_cancelled",
        )
    if finish.code == "RevisionAborted":
        return ModelUnavailable(
            finish.message, code="revision_aborted", retry_after_seconds=REVISION_RETRY_SECONDS
        )
    if code := _TOLD.get(finish.code):
        return GenerationFailed(finish.message, code=code)
    if code := PROMPT_REFUSALS.get(finish.code):
        constraint = call.constraint if finish.code == "GrammarFailed" else None
        param = REFUSED_FIELDS.get(finish.code, call.prompt_field)
        if constraint is not None:
            param = constraint.param
        return InvalidRequest(finish.message, param=param, code=code)
    logger.error("a request failed in the engine: %s", finish.message, extra=fields(code=finish.code))
    return GenerationFailed(
        f"The model {entry.name!r} failed on this request ({finish.code or 'EngineError'}). "
        "The log has the details under this answer's x-request-id."
    )


def waiting_comment(position: Place, entry: ModelEntry) -> bytes:
    """The queue position as an event-stream comment; empty where the request waits no more."""
    if position.ahead is None:
        return b""
    why = f"{entry.reason}: {entry.message}" if _waits_for_room(entry) else ""
    wait = _estimated_wait_seconds(position.ahead, position, entry)
    return sse.waiting_comment(position.ahead + 1, wait, why)


def waiting_headers(position: Place, entry: ModelEntry) -> list[Header]:
    """The same for a status line that goes out while the request waits."""
    if position.ahead is None:
        return []
    headers = [(b"x-tidegate-queue-position", b"%d" % (position.ahead + 1))]
    if (wait := _estimated_wait_seconds(position.ahead, position, entry)) is not None:
        headers.append((b"x-tidegate-estimated-wait-seconds", b"%.0f" % wait))
    return headers


def _estimated_wait_seconds(ahead: int, position: Place, entry: ModelEntry) -> float | None:
    """Seconds until the request starts; None where neither drain rate nor waking time is known, or nobody
    knows when others have done their work."""
    if _waits_for_room(entry):
        return None
    wait = admission.predicted_wait_seconds(ahead + 1, position.depth, entry)
    return wait if wait > 0 else None


def _waits_for_room(entry: ModelEntry) -> bool:
    return entry.reason == Reason.WaitingForRoom and not entry.replicas_ready
