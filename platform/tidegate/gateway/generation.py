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
from collections.abc import AsyncIterator, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, assert_never

import msgspec
from msgspec.structs import replace

from tidegate.errors import (
    GatewayStopping,
    GenerationFailed,
    InvalidRequest,
    QueueUnavailable,
    RequestError,
    shortened,
)
from tidegate.gateway import admission
from tidegate.gateway.asgi import (
    DEPLOYMENT,
    ClientLeft,
    Header,
    Receive,
    Scope,
    Send,
    header,
    read_body,
    send_error,
    send_json,
    stream_head,
    text_header,
)
from tidegate.gateway.auth import find_key, sent_key
from tidegate.gateway.bodies import with_model
from tidegate.gateway.calls import build_requests, new_id, new_seed, shadow_of
from tidegate.gateway.constraints import Constraint
from tidegate.gateway.dialects.base import AnswerHead, Call, Dialect, Events, Usage, count_usage
from tidegate.gateway.event_ids import NumberedEvents
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
from tidegate.messages.kept import KeptCall, gateway_of
from tidegate.messages.queue import Bounds, Label, Rejected
from tidegate.messages.registry import Key, ModelEntry
from tidegate.messages.work import Finish, Generate, Request, Segment
from tidegate.telemetry import fields

logger = logging.getLogger("tidegate.gateway")

CLIENT_LEFT = "ClientLeft"
WARNING = b"x-tidegate-warning"
MOST_WARNING = 1000  # characters
AT_ONCE = 512  # segments that are rendered together
_NOT_KEPT = contextlib.nullcontext()
# An endpoint for each task, for who asks at another's.
PATHS = {
    "generate": "/v1/chat/completions or /v1/completions",
    "embed": "/v1/embeddings",
    "score": "/v1/rerank or /v1/score",
    "classify": "/v1/classify or /v1/moderations",
}
POSITION_SECONDS = 1.0  # how long a held status line waits for the queue position that it announces


class GenerationEndpoint:
    """The ASGI endpoint of one dialect. `exchange`: how its calls go."""

    def __init__(self, dialect: Dialect, services: Services, exchange: type[Exchange]) -> None:
        self._dialect = dialect
        self._services = services
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange(self._services, scope, receive, send, self._dialect)
        outcome, of_revision = await conducted(exchange)
        metrics = self._services.metrics
        metrics.ended(exchange.model_label, outcome)
        if exchange.revision:
            metrics.ended_on(exchange.model_label, exchange.revision, of_revision)


async def conducted(exchange: Exchange) -> tuple[str, RevisionOutcome]:
    """Run an exchange and answer what it raises. Returns how it ended, and what that is to its revision."""
    try:
        await exchange.run()
    except ClientLeft:
        return "left", "left"
    except RequestError as error:
        await exchange.refuse(error)
        return error.reason, "error" if error.status >= 500 else "refused"
    except asyncio.CancelledError:
        # Only the server cancels, when its grace at shutdown is over; this is the task's outermost frame.
        await exchange.refuse(GatewayStopping("The gateway is stopping. Send the request again."))
        return "GatewayStopped", "left"
    except Exception:
        logger.exception("a generation call failed")
        await exchange.refuse(GenerationFailed("The gateway failed on this request."))
        return "InternalError", "error"
    return "ok", "ok"


@dataclass(slots=True)
class Admitted:
    """A call that the queue has taken. Of one that is kept the client has the first `seen` events of each
    choice already."""

    call: Call
    head: AnswerHead
    entry: ModelEntry
    opened: OpenCall
    seen: Sequence[int] = ()


class Keeping(NamedTuple):
    """For how long a call is kept: after its end, and while it runs and nobody reads it. One that does not
    outlive its client is cancelled as any other when that leaves. `is_optional`: it is kept where half of the
    room is left."""

    seconds: float
    linger_seconds: float
    outlives_client: bool = True
    is_optional: bool = False


@dataclass(slots=True)
class Exchange:
    """One HTTP call. `run` raises what must be refused; `refuse` answers in the form that is left."""

    _services: Services
    _scope: Scope
    _receive: Receive
    _send: Send
    _dialect: Dialect
    _body: bytes = b""  # of a call that is kept
    _is_admitted: bool = False
    _failed: Finish | None = None  # how the answer failed
    _started: float = field(default_factory=time.perf_counter)
    _is_status_out: bool = False
    _headers: list[Header] = field(default_factory=list)  # of an answer, beside those of its form
    model_label: str = UNKNOWN_MODEL
    revision: str = ""  # that the call was given

    async def run(self) -> None:
        services, scope = self._services, self._scope
        key = find_key(sent_key(scope), services.keys, no_auth=services.settings.no_auth)
        call = await self._read_call(key)
        models = services.registry.models()
        if call.model in models:
            self.model_label = call.model  # a refusal counts under it as well
        entry = admission.find_model(call.model, models)
        self.model_label = entry.name  # also of a call that names none
        admission.check_task(entry, self._dialect.task, PATHS)
        budget = admission.wait_budget_seconds(entry, text_header(scope, b"x-tidegate-max-wait-seconds"))
        if call.constraint is not None:
            await self._constrain(call, call.constraint, key)
        for schema in call.schemas:
            await services.grammars.grammar(schema, key.id)

        now = time.time()
        call_id = self._dialect.id_prefix + new_id()
        session = admission.session_of(key.tenant, text_header(scope, b"x-tidegate-session") or call.user)
        revision = self.revision = admission.choose_revision(entry.revisions, session or call_id)
        head = AnswerHead(call_id, int(now), entry.name, revision, entry.context_length)
        requests = build_requests(
            call,
            head,
            key=key,
            gateway=services.gateway_id,
            created=now,
            deadline=now + budget,
            random_seed=new_seed(),
        )
        keeping = self._keeping(call)
        if keeping and not await self._keep(key.tenant, call, head, keeping, len(requests)):
            keeping = None
        if keeping:
            requests = [replace(request, gateway=gateway_of(call_id)) for request in requests]
        shadow = self._shadow_of(entry, requests[0], call_id)
        bounds, label = self._bounds(entry), Label(entry.cohort, session, shadow is not None)
        opened = services.calls.open(requests, is_streamed=call.is_streamed, is_kept=keeping is not None)
        cancel_reason: str | None = "the gateway gave the call up"
        watcher: asyncio.Task[None] | None = None
        try:
            async with self._kept(opened, call_id) if keeping else _NOT_KEPT:
                submitting = services.queue.submit(requests, bounds, label)
                del requests  # they live as long as they are on their way, and not as long as the answer
                outcome = await submitting
                if isinstance(outcome, Rejected):
                    cancel_reason = None
                    raise admission.queue_full(outcome, entry, len(opened.requests))
                services.calls.submitted(opened)
                admission.check_wait(outcome.waiting_ahead, outcome.depth, entry, budget)
                self._is_admitted = True
                if shadow is not None:
                    services.queue.shadow(opened.requests[0].id, shadow, bounds, entry.cohort)
                    shadow = None
                admitted = Admitted(call, head, entry, opened, [0] * len(opened.requests) if keeping else ())
                watcher = asyncio.get_running_loop().create_task(watch(self._receive, opened))
                await (self._stream(admitted) if call.is_streamed else self._answer(admitted))
        except ClientLeft:
            cancel_reason = CLIENT_LEFT
            raise
        finally:
            if watcher is not None:
                watcher.cancel()
            lives_on = self._is_admitted and keeping is not None and keeping.outlives_client
            services.calls.close(opened, None if lives_on else cancel_reason)

    def _keeping(self, call: Call) -> Keeping | None:
        """Whether the call is kept: a stream of events whose client asks for their ids may be resumed."""
        if not (call.is_streamed and self._dialect.wire.can_resume and wants_event_ids(self._scope)):
            return None
        seconds = self._services.settings.resume_seconds
        return Keeping(seconds, seconds)

    async def _keep(
        self, tenant: str, call: Call, head: AnswerHead, keeping: Keeping, sequences: int
    ) -> bool:
        """Keep the call, before its submit. False where there is no room for one that need not be kept."""
        settings = self._services.settings
        record = KeptCall(
            id=head.call_id,
            tenant=tenant,
            path=self._dialect.path,
            created=head.created,
            model=head.model,
            revision=head.revision,
            context_length=head.context_length,
            sequences=sequences,
            body=self._body,
            messages=self._messages_before(call),
        )
        share = 2 if keeping.is_optional else 1  # the other half is for what has to be kept
        full = await self._services.kept.keep(
            record,
            seconds=keeping.seconds,
            linger_seconds=keeping.linger_seconds,
            tenant_bytes=settings.tenant_kept_bytes // share,
            total_bytes=settings.total_kept_bytes // share,
        )
        self._body = b""  # not as long as the answer
        if full and not keeping.is_optional:
            raise admission.kept_full(full, keeping.seconds)
        return not full

    def _messages_before(self, call: Call) -> list[dict[str, Any]]:  # noqa: ARG002
        """What came before the call in a conversation that is kept."""
        return []

    @contextlib.asynccontextmanager
    async def _kept(self, opened: OpenCall, call_id: str) -> AsyncIterator[None]:
        """Hear the channel of a call that is kept. One that is refused is kept no more."""
        services = self._services
        try:
            async with services.kept.following(call_id, services.calls.deliver_to(opened)):
                yield
        finally:
            if not self._is_admitted:
                with contextlib.suppress(QueueUnavailable):
                    await services.kept.unkeep(call_id, "The call was refused.")

    async def _read_call(self, key: Key) -> Call:
        """Read and check the body, which is free again as soon as this returns, unless the call is kept."""
        services = self._services
        async with services.intake.body(key.id) as held:
            body = await read_body(self._scope, self._receive, services.settings.max_body_bytes, held.count)
            if deployment := self._scope.get(DEPLOYMENT):
                body = with_model(body, deployment)
            async with services.intake.turn() if held.is_large else contextlib.nullcontext():
                try:
                    call = self._dialect.read(body)
                    if self._keeping(call):
                        self._body = body
                    return call
                except InvalidRequest:
                    self.model_label = _known_model(body, services.registry.models())
                    raise

    async def _constrain(self, call: Call, constraint: Constraint, key: Key) -> None:
        checked = await self._services.grammars.grammar(constraint, key.id)
        call.follow(checked.grammar)
        if checked.warnings:
            said = f"{constraint.param}: {'; '.join(checked.warnings)}"
            self._headers.append((WARNING, shortened(said, MOST_WARNING).encode("ascii", "backslashreplace")))

    async def refuse(self, error: RequestError) -> None:
        """Answer with an error; a client that is gone gets none."""
        if error.status >= 500:
            logger.warning("a call failed: %s", error.message, extra=fields(reason=error.reason))
        with contextlib.suppress(OSError):  # the connection broke meanwhile
            if self._is_status_out:
                event = self._error_event(error)
                await self._send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                self._is_status_out = True
                await send_error(self._send, error, self._dialect.wire.error(error))

    def _error_event(self, error: RequestError) -> bytes:
        """An error after the status line."""
        return self._dialect.wire.error_event(error)

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

    async def _answer(self, admitted: Admitted) -> None:
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
                await send_json(self._send, 200, body, self._headers)
            case Failed(_, finish):
                entry = self._as_it_is(admitted.entry)
                raise failure_error(finish, admitted.call, entry)
            case _:
                raise ClientLeft

    async def _written(self, admitted: Admitted, choices: list[list[Segment]], usage: Usage) -> bytes:
        """Write a whole answer; what many results make, beside the event loop."""
        write = partial(admitted.call.answer, admitted.head, choices, usage)
        has_results = len(choices) > 1 and choices[0][-1].result is not None
        return await asyncio.to_thread(write) if has_results else write()

    async def _stream(self, admitted: Admitted) -> None:
        """Hold the status line until there is something to say, then events until every choice has ended."""
        opened, entry, wire = admitted.opened, admitted.entry, self._dialect.wire
        events = await self._open_events(admitted)
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
                        await self._write_segments(opened, events, delivered.segments)
                    case Waiting(position):
                        comment = waiting_comment(position, self._as_it_is(entry))
                        await self._write(opened, wire.comment(comment))
                    case Signal.HEARTBEAT_DUE:
                        await self._write(opened, wire.heartbeat(entry.name))
                    case Signal.HOLD_OVER:
                        await self._begin(opened, await self._position_headers(admitted))
                        if not opened.has_begun:
                            # Clients that wait for the first byte of the body see that the call is alive.
                            await self._write(opened, wire.heartbeat(entry.name))
                    case Signal.DISCONNECTED:
                        raise ClientLeft
                    case Failed(segments, finish):
                        self._failed = finish
                        if self._is_status_out or any(admitted.seen):
                            await self._write_segments(opened, events, segments)
                        raise failure_error(finish, admitted.call, self._as_it_is(entry))
                    case Ended(segments):
                        if first_token is None:
                            first_token = time.perf_counter() - self._started
                        usage = count_usage(opened.finishes(), admitted.call.n)
                        if len(segments) > AT_ONCE:
                            await self._write_segments(opened, events, segments)
                            segments = []
                        out = _rendered(events, segments) + events.end(usage)
                        self._record(admitted, usage, first_token)
                        await self._write(opened, out, is_last=True)
                        return
                    case unknown:
                        assert_never(unknown)
        finally:
            hold.cancel()

    async def _open_events(self, admitted: Admitted) -> Events:
        events = admitted.call.events(admitted.head)
        return NumberedEvents(events, admitted.head.call_id, admitted.seen) if admitted.seen else events

    async def _position_headers(self, admitted: Admitted) -> list[Header]:
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
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [*stream_head(self._dialect.wire.media_type), *self._headers, *headers],
            }
        )
        opened.wrote()
        self._services.calls.stream_opened(opened)

    async def _write_segments(
        self, opened: OpenCall, events: Events, segments: Sequence[tuple[int, Segment]]
    ) -> None:
        """A log that is read again comes whole; in parts it leaves room for other calls."""
        for at in range(0, len(segments), AT_ONCE):
            await self._write(opened, _rendered(events, segments[at : at + AT_ONCE]))

    async def _write(self, opened: OpenCall, out: bytes, *, is_last: bool = False) -> None:
        if not self._is_status_out:
            await self._begin(opened, ())
        if out:
            await self._send({"type": "http.response.body", "body": out, "more_body": not is_last})
            opened.wrote()

    def _record(self, admitted: Admitted, usage: Usage, first_token: float | None) -> None:
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


def wants_event_ids(scope: Scope) -> bool:
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


async def watch(receive: Receive, opened: OpenCall) -> None:
    """Wait for the client to close the connection."""
    while (await receive())["type"] != "http.disconnect":
        continue
    opened.leave()
