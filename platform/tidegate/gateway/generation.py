"""One generation call from its bytes to the end of its answer: the gateway's hot path.

Steps, in this order: tenant, body, checks, model, wait budget, submit, answer. A refusal at any step is a
typed error. Until the status line is out errors become statuses, afterwards they travel in the stream.
What the body means and how the answer is written is the dialect's. Pure ASGI: no dependency solving, no
response objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import assert_never

import msgspec

from tidegate.errors import (
    GatewayStopping,
    GenerationFailed,
    InvalidRequest,
    RequestError,
)
from tidegate.gateway import admission, sse
from tidegate.gateway.asgi import (
    DEPLOYMENT,
    EVENT_STREAM,
    ClientLeft,
    Header,
    Receive,
    Scope,
    Send,
    header,
    read_body,
    send_error,
    send_json,
    text_header,
)
from tidegate.gateway.auth import find_key, sent_key
from tidegate.gateway.bodies import with_model
from tidegate.gateway.calls import build_requests, new_id, new_seed, shadow_of
from tidegate.gateway.dialects.base import AnswerHead, Call, Dialect, Events, Usage, count_usage
from tidegate.gateway.metrics import UNKNOWN_MODEL, RevisionOutcome
from tidegate.gateway.replies import failure_error, waiting_comment, waiting_headers
from tidegate.gateway.services import Services
from tidegate.gateway.stream import (
    GOOD_ENDS,
    Delivered,
    Ended,
    Failed,
    OpenCall,
    Signal,
    Waiting,
)
from tidegate.messages.queue import Bounds, Label, Rejected
from tidegate.messages.registry import Key, ModelEntry
from tidegate.messages.work import Generate, Request, Segment
from tidegate.telemetry import fields

logger = logging.getLogger("tidegate.gateway")

CLIENT_LEFT = "ClientLeft"
# An endpoint for each task, for who asks at another's.
PATHS = {
    "generate": "/v1/chat/completions or /v1/completions",
    "embed": "/v1/embeddings",
    "score": "/v1/rerank or /v1/score",
    "classify": "/v1/classify or /v1/moderations",
}
POSITION_SECONDS = 1.0  # how long a held status line waits for the queue position that it announces


class GenerationEndpoint:
    """The ASGI endpoint of one dialect."""

    def __init__(self, dialect: Dialect, services: Services) -> None:
        self._dialect = dialect
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(self._services, self._dialect, scope, receive, send)
        of_revision: RevisionOutcome = "error"
        try:
            await exchange.run()
            outcome, of_revision = "ok", "ok"
        except ClientLeft:
            outcome, of_revision = "left", "left"
        except RequestError as error:
            outcome = error.reason
            of_revision = "error" if error.status >= 500 else "refused"
            await exchange.refuse(error)
        except asyncio.CancelledError:
            # Only the server cancels, when its grace at shutdown is over; this is the task's outermost frame.
            outcome, of_revision = "GatewayStopped", "left"
            await exchange.refuse(GatewayStopping("The gateway is stopping. Send the request again."))
        except Exception:
            outcome, of_revision = "InternalError", "error"
            logger.exception("a generation call failed")
            await exchange.refuse(GenerationFailed("The gateway failed on this request."))
        finally:
            metrics = self._services.metrics
            metrics.ended(exchange.model_label, outcome)
            if exchange.revision:
                metrics.ended_on(exchange.model_label, exchange.revision, of_revision)


@dataclass(slots=True)
class _Admitted:
    """A call that the queue has taken."""

    call: Call
    head: AnswerHead
    entry: ModelEntry
    opened: OpenCall


@dataclass(slots=True)
class _Exchange:
    """One HTTP call. `run` raises what must be refused; `refuse` answers in the form that is left."""

    _services: Services
    _dialect: Dialect
    _scope: Scope
    _receive: Receive
    _send: Send
    _started: float = field(default_factory=time.perf_counter)
    _is_status_out: bool = False
    model_label: str = UNKNOWN_MODEL
    revision: str = ""  # that the call was given

    async def run(self) -> None:
        services, scope = self._services, self._scope
        sent = sent_key(text_header(scope, b"authorization"), text_header(scope, b"api-key"))
        key = find_key(sent, services.keys, no_auth=services.settings.no_auth)
        call = await self._read_call(key)
        models = services.registry.models()
        if call.model in models:
            self.model_label = call.model  # a refusal counts under it as well
        entry = admission.find_model(call.model, models)
        admission.check_task(entry, self._dialect.task, PATHS)
        budget = admission.wait_budget_seconds(entry, text_header(scope, b"x-tidegate-max-wait-seconds"))

        now = time.time()
        call_id = self._dialect.id_prefix + new_id()
        session = admission.session_of(key.tenant, text_header(scope, b"x-tidegate-session") or call.user)
        revision = self.revision = admission.choose_revision(entry.revisions, session or call_id)
        head = AnswerHead(
            call_id, int(now), entry.name, revision, _wants_event_ids(scope), entry.context_length
        )
        requests = build_requests(
            call,
            head,
            key=key,
            gateway=services.gateway_id,
            created=now,
            deadline=now + budget,
            random_seed=new_seed(),
        )
        shadow = self._shadow_of(entry, requests[0], call_id)
        bounds, label = self._bounds(entry), Label(entry.cohort, session, shadow is not None)
        opened = services.calls.open(requests, is_streamed=call.is_streamed)
        cancel_reason: str | None = "the gateway gave the call up"
        watcher: asyncio.Task[None] | None = None
        try:
            submitting = services.queue.submit(requests, bounds, label)
            del requests  # they live as long as they are on their way, and not as long as the answer
            outcome = await submitting
            if isinstance(outcome, Rejected):
                cancel_reason = None
                raise admission.queue_full(outcome, entry, len(opened.requests))
            services.calls.submitted(opened)
            admission.check_wait(outcome.waiting_ahead, outcome.depth, entry, budget)
            if shadow is not None:
                services.queue.shadow(opened.requests[0].id, shadow, bounds, entry.cohort)
                shadow = None
            admitted = _Admitted(call, head, entry, opened)
            watcher = asyncio.get_running_loop().create_task(_watch(self._receive, opened))
            await (self._stream(admitted) if call.is_streamed else self._answer(admitted))
        except ClientLeft:
            cancel_reason = CLIENT_LEFT
            raise
        finally:
            if watcher is not None:
                watcher.cancel()
            services.calls.close(opened, cancel_reason)

    async def _read_call(self, key: Key) -> Call:
        """Read and check the body, which is free again as soon as this returns."""
        services = self._services
        async with services.intake.body(key.id) as held:
            body = await read_body(self._scope, self._receive, services.settings.max_body_bytes, held.count)
            if deployment := self._scope.get(DEPLOYMENT):
                body = with_model(body, deployment)
            async with services.intake.turn() if held.is_large else contextlib.nullcontext():
                try:
                    return self._dialect.read(body)
                except InvalidRequest:
                    self.model_label = _known_model(body, services.registry.models())
                    raise

    async def refuse(self, error: RequestError) -> None:
        """Answer with an error; a client that is gone gets none."""
        if error.status >= 500:
            logger.warning("a call failed: %s", error.message, extra=fields(reason=error.reason))
        with contextlib.suppress(OSError):  # the connection broke meanwhile
            if self._is_status_out:
                event = sse.error_event(error.body())
                await self._send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                self._is_status_out = True
                await send_error(self._send, error)

    def _shadow_of(self, entry: ModelEntry, first: Request, call_id: str) -> Request | None:
        """The copy that the revision that is tried out gets of a call's first sequence, if it gets one."""
        if not entry.shadow or not isinstance(first.work, Generate) or not self._services.queue.takes_shadows:
            return None
        if not admission.is_shadowed(entry, call_id, first.revision):
            return None
        return shadow_of(first, entry.shadow)

    def _bounds(self, entry: ModelEntry) -> Bounds:
        settings = self._services.settings
        return Bounds(
            entry.limits,
            math.ceil(entry.limits.max_requests * settings.key_share),
            math.ceil(entry.limits.max_bytes * settings.key_share),
            settings.tenant_max_requests,
            settings.tenant_max_bytes,
            settings.total_max_requests,
            settings.total_max_bytes,
        )

    async def _answer(self, admitted: _Admitted) -> None:
        """Wait for the end, then one JSON object."""
        match await admitted.opened.next():
            case Ended(segments):
                choices: list[list[Segment]] = [[] for _ in admitted.opened.requests]
                for index, segment in segments:
                    choices[index].append(segment)
                usage = count_usage(admitted.opened.finishes(), admitted.call.n)
                body = await self._written(admitted, choices, usage)
                if usage.total_tokens:  # none where no model ran
                    self._record(admitted, usage, None)
                self._is_status_out = True
                await send_json(self._send, 200, body)
            case Failed(_, finish):
                entry = self._as_it_is(admitted.entry)
                raise failure_error(finish, admitted.call.prompt_field, entry)
            case _:
                raise ClientLeft

    async def _written(self, admitted: _Admitted, choices: list[list[Segment]], usage: Usage) -> bytes:
        """Write a whole answer; what many results make, beside the event loop."""
        write = partial(admitted.call.answer, admitted.head, choices, usage)
        has_results = len(choices) > 1 and choices[0][-1].result is not None
        return await asyncio.to_thread(write) if has_results else write()

    async def _stream(self, admitted: _Admitted) -> None:
        """Hold the status line until there is something to say, then events until every choice has ended."""
        opened, entry = admitted.opened, admitted.entry
        events = admitted.call.events(admitted.head)
        first_token: float | None = None
        loop = asyncio.get_running_loop()
        hold = loop.call_later(self._services.settings.hold_status_seconds, opened.end_hold)
        try:
            while True:
                match await opened.next():
                    case Delivered() as delivered:  # each token comes here: without unpacking
                        if first_token is None:
                            first_token = time.perf_counter() - self._started
                            hold.cancel()
                        await self._write(opened, _rendered(events, delivered.segments))
                    case Waiting(position):
                        await self._write(opened, waiting_comment(position, self._as_it_is(entry)))
                    case Signal.HEARTBEAT_DUE:
                        await self._write(opened, sse.HEARTBEAT)
                    case Signal.HOLD_OVER:
                        await self._begin(opened, await self._position_headers(admitted))
                        if not opened.has_begun:
                            # Clients that wait for the first byte of the body see that the call is alive.
                            await self._write(opened, sse.HEARTBEAT)
                    case Signal.DISCONNECTED:
                        raise ClientLeft
                    case Failed(segments, finish):
                        if self._is_status_out:
                            await self._write(opened, _rendered(events, segments))
                        raise failure_error(finish, admitted.call.prompt_field, self._as_it_is(entry))
                    case Ended(segments):
                        if first_token is None:
                            first_token = time.perf_counter() - self._started
                        usage = count_usage(opened.finishes(), admitted.call.n)
                        out = _rendered(events, segments) + events.end(usage)
                        self._record(admitted, usage, first_token)
                        await self._write(opened, out, is_last=True)
                        return
                    case unknown:
                        assert_never(unknown)
        finally:
            hold.cancel()

    async def _position_headers(self, admitted: _Admitted) -> list[Header]:
        """Empty where the queue does not say in time."""
        asked = (admitted.opened.requests[0].id, admitted.entry.name, admitted.head.revision)
        try:
            async with asyncio.timeout(POSITION_SECONDS):
                position = (await self._services.queue.places([asked]))[0]
        except (RequestError, TimeoutError):
            return []
        return waiting_headers(position, self._as_it_is(admitted.entry))

    def _as_it_is(self, entry: ModelEntry) -> ModelEntry:
        """Return what the registry says now of the model that the call was admitted to."""
        return self._services.registry.models().get(entry.name, entry)

    async def _begin(self, opened: OpenCall, headers: Iterable[Header]) -> None:
        self._is_status_out = True
        await self._send({"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM, *headers]})
        opened.wrote()
        self._services.calls.stream_opened(opened)

    async def _write(self, opened: OpenCall, out: bytes, *, is_last: bool = False) -> None:
        if not self._is_status_out:
            await self._begin(opened, ())
        if out:
            await self._send({"type": "http.response.body", "body": out, "more_body": not is_last})
            opened.wrote()

    def _record(self, admitted: _Admitted, usage: Usage, first_token: float | None) -> None:
        self._services.metrics.answered(
            admitted.entry.name,
            admitted.head.revision,
            duration_seconds=time.perf_counter() - self._started,
            first_token_seconds=first_token,
            prompt_tokens=usage.prompt_tokens,
            generation_tokens=usage.completion_tokens,
            finish_reasons=[finish.reason for finish in admitted.opened.finishes() if finish],
        )


class _Named(msgspec.Struct):
    model: str


def _known_model(body: bytes, models: Container[str]) -> str:
    """The model that a refused body names, if it exists: what clients invent never becomes a label."""
    try:
        name = msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return UNKNOWN_MODEL
    return name if name in models else UNKNOWN_MODEL


def _wants_event_ids(scope: Scope) -> bool:
    """A client that resumes names the last id it saw; any other asks by a header."""
    asked = text_header(scope, b"x-tidegate-event-ids")
    return header(scope, b"last-event-id") is not None or (asked or "").lower() in ("1", "true")


def _rendered(events: Events, segments: Iterable[tuple[int, Segment]]) -> bytes:
    """Segments with a bad end hold nothing for the client; the error says what happened."""
    return b"".join(
        [
            events.render(index, segment)
            for index, segment in segments
            if segment.finish is None or segment.finish.reason in GOOD_ENDS
        ]
    )


async def _watch(receive: Receive, opened: OpenCall) -> None:
    """Wait for the client to close the connection."""
    while (await receive())["type"] != "http.disconnect":
        continue
    opened.leave()
