"""How calls of the Responses API go: stored, in the background, going on from one before.

A response is a kept call (see `store.queue`): its record is the body, its answer the log of its one request.
So nothing but the queue owns one in the background, and every gateway shows the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from tidegate.errors import PROMPT_REFUSALS, InvalidRequest, NotFound, RequestError
from tidegate.gateway.asgi import send_json
from tidegate.gateway.dialects.base import AnswerHead, Call, Events
from tidegate.gateway.dialects.openai import encode
from tidegate.gateway.dialects.response_objects import Response, ResponseError, Status
from tidegate.gateway.dialects.response_output import Drafts, ResponseEvents, drafts_of
from tidegate.gateway.dialects.responses import ResponseCall, Responses, answer_messages, joined
from tidegate.gateway.event_ids import NumberedEvents
from tidegate.gateway.generation import Admitted, Exchange, Keeping, wants_event_ids
from tidegate.gateway.replies import failure_error
from tidegate.gateway.resuming import Resumption, entry_of, head_of
from tidegate.gateway.services import Services
from tidegate.gateway.stream import GOOD_ENDS, READERS_FAULTS
from tidegate.messages.kept import KeptCall
from tidegate.messages.registry import Key
from tidegate.messages.work import Finish, Segment

CANCELLED = "The response was cancelled."


class _ResponseStream(Exchange):
    """Events that begin before the first token where nobody needs a status, and that say how they fail."""

    begins_at_once = False
    has_ids = False  # whoever asks has them
    _events: ResponseEvents | None = None
    _numbered: NumberedEvents | None = None

    async def _open_events(self, admitted: Admitted) -> Events:
        call_id, has_ids = admitted.head.call_id, self.has_ids or wants_event_ids(self._scope)
        self._events = cast("ResponseCall", admitted.call).events(admitted.head)
        self._numbered = NumberedEvents(self._events, call_id, admitted.seen or [0], has_ids=has_ids)
        if self.begins_at_once:
            await self._write(admitted.opened, self._numbered.numbered(0, self._events.begin()))
        return self._numbered

    def _error_event(self, error: RequestError) -> bytes:
        if self._events is None or self._numbered is None:
            return super()._error_event(error)
        if self._failed is None or self._failed in READERS_FAULTS:
            begun = self._numbered.numbered(0, self._events.begin())
            return begun + self._events.broke(_said(error, None))
        is_cancelled = self._failed.reason == "cancelled"
        event = self._events.failed("cancelled" if is_cancelled else "failed", _said(error, self._failed))
        return self._numbered.numbered(0, event)


class ResponseExchange(_ResponseStream):
    """One call of `POST /v1/responses`."""

    async def _read_call(self, key: Key) -> Call:
        call = cast("ResponseCall", await super()._read_call(key))
        if previous := call.body.previous_response_id:
            call.previous = await _conversation(self._services, previous, key)
        self.begins_at_once = bool(call.body.background)
        return call

    def _keeping(self, call: Call) -> Keeping | None:
        resumable = super()._keeping(call)
        body, settings = cast("ResponseCall", call).body, self._services.settings
        if body.store is False:
            return resumable
        outlives = bool(body.background or resumable)
        return Keeping(
            max(settings.store_seconds, settings.resume_seconds),
            settings.store_seconds if body.background else settings.resume_seconds,
            outlives_client=outlives,
            is_optional=body.store is None and not outlives,
        )

    async def _keep(
        self, tenant: str, call: Call, head: AnswerHead, keeping: Keeping, sequences: int
    ) -> bool:
        is_kept = await super()._keep(tenant, call, head, keeping, sequences)
        cast("ResponseCall", call).is_stored &= is_kept
        return is_kept

    def _messages_before(self, call: Call) -> list[dict[str, Any]]:
        return cast("ResponseCall", call).previous

    async def _answer(self, admitted: Admitted) -> None:
        call = cast("ResponseCall", admitted.call)
        if not call.body.background:
            await super()._answer(admitted)
            return
        self._is_status_out = True
        body = encode(call.response(admitted.head, Drafts(""), "queued"))
        await send_json(self._send, 200, body, self._headers)


class ResponseResumption(_ResponseStream, Resumption):
    """The rest of a response's stream."""

    begins_at_once = True


class ResponseCallResumption(ResponseResumption):
    """The same as the rest of any call's."""

    has_ids = True


class Stored(NamedTuple):
    """A response that may be read again."""

    kept: KeptCall
    call: ResponseCall


async def find_response(services: Services, response_id: str, key: Key) -> Stored:
    """Raises `NotFound` for what is not stored, or is another tenant's."""
    kept = await services.kept.find(response_id, key.tenant)
    if kept is not None and kept.path == Responses.path:
        call = Responses().read(kept.body)
        call.previous = kept.messages
        if call.body.store is not False:  # that one is kept for its stream alone
            return Stored(kept, call)
    raise NotFound(
        f"There is no response {response_id[:80]!r}: it was not stored, its time is over, or it is not "
        "yours.",
        param="response_id",
        code="response_not_found",
    )


async def shown(services: Services, stored: Stored) -> Response:
    """A stored response as it is now. Raises `NotFound` where it went meanwhile."""
    kept, call = stored
    request_id = f"{kept.id}.0"
    log = await services.queue.replay(request_id)
    finish = log[-1].finish if log else None
    status: Status | None = None
    error: ResponseError | None = None
    if not log:
        state = await services.kept.state(request_id)
        if not state:
            raise NotFound(f"There is no response {kept.id!r} any more.", code="response_not_found")
        status = "queued" if state == "waiting" else "in_progress"
    elif finish is not None and finish.reason not in GOOD_ENDS:
        status = "cancelled" if finish.reason == "cancelled" else "failed"
        failed = failure_error(finish, call, entry_of(services, kept))
        error = _said(failed, finish) if status == "failed" else None
    drafts = drafts_of(kept.id, [segment for segment in log or () if _is_good(segment)])
    return call.response(head_of(kept), drafts, status, error)


async def _conversation(services: Services, response_id: str, key: Key) -> list[dict[str, Any]]:
    """All messages up to the end of a stored response."""
    try:
        kept, call = await find_response(services, response_id, key)
    except NotFound as error:
        raise NotFound(
            f"previous_response_id: {error.message}",
            param="previous_response_id",
            code="previous_response_not_found",
        ) from None
    log = await services.queue.replay(f"{kept.id}.0")
    finish = log[-1].finish if log else None
    if log is None or finish is None or finish.reason not in GOOD_ENDS:
        how = "has not ended" if finish is None else "failed"
        raise InvalidRequest(
            f"previous_response_id: {response_id!r}: it {how}, so nothing goes on from it; send one that is "
            "completed.",
            param="previous_response_id",
        )
    return joined([*call.conversation(), *answer_messages(drafts_of(kept.id, log))])


def _is_good(segment: Segment) -> bool:
    return segment.finish is None or segment.finish.reason in GOOD_ENDS


def _said(error: RequestError, finish: Finish | None) -> ResponseError:
    """OpenAI's codes of a failed response."""
    code = "invalid_prompt" if finish is not None and finish.code in PROMPT_REFUSALS else "server_error"
    return ResponseError(code, error.body()["error"]["message"])
