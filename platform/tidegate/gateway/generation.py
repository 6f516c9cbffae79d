"""One generation call from its bytes to the end of its answer: the gateway's hot path.

Steps, in this order: tenant, body, checks, model, wait budget, submit, answer. A refusal at any step is a
typed error. Until the status line is out errors become statuses, afterwards they travel in the stream.
Pure ASGI: no dependency solving, no response objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from tidegate.errors import (
    GenerationFailed,
    QueueUnavailable,
    RequestError,
)
from tidegate.gateway import admission, answers, sse
from tidegate.gateway.asgi import (
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
)
from tidegate.gateway.auth import find_tenant
from tidegate.gateway.calls import Origin, build_requests, chat_call, completion_call, new_id, new_seed
from tidegate.gateway.checks import parse_chat, parse_completion
from tidegate.gateway.metrics import UNKNOWN_MODEL
from tidegate.gateway.replies import (
    Plan,
    assembled,
    events_of,
    failure_error,
    is_good,
    news,
    place_headers,
)
from tidegate.gateway.services import Services
from tidegate.gateway.stream import OpenCall
from tidegate.messages.queue import Bounds, Place, Rejected
from tidegate.messages.registry import ModelEntry
from tidegate.messages.work import Segment
from tidegate.telemetry import fields

logger = logging.getLogger("tidegate.gateway")

CLIENT_LEFT = "ClientLeft"
PLACE_SECONDS = 1.0  # how long a held status line waits for the queue position that it announces


class GenerationEndpoint:
    """The ASGI endpoint of one route. `kind` is "chat" or "completion"."""

    def __init__(self, kind: str, services: Services) -> None:
        self._kind = kind
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(self._services, self._kind, scope, receive, send)
        try:
            await exchange.run()
            outcome = "ok"
        except ClientLeft:
            outcome = "left"
        except RequestError as error:
            outcome = error.reason
            await exchange.refuse(error)
        except asyncio.CancelledError:
            # Only the server cancels, when its grace at shutdown is over; this is the task's outermost frame.
            outcome = "GatewayStopped"
            await exchange.refuse(QueueUnavailable("The gateway is stopping. Send the request again."))
        except Exception:
            outcome = "InternalError"
            logger.exception("a generation call failed")
            await exchange.refuse(GenerationFailed("The gateway failed on this request."))
        finally:
            self._services.metrics.ended(exchange.model_label, outcome)


class _Exchange:
    """One HTTP call. `run` raises what must be refused; `refuse` answers in the form that is left."""

    __slots__ = (
        "_kind",
        "_receive",
        "_scope",
        "_send",
        "_services",
        "_started",
        "is_status_out",
        "model_label",
    )

    def __init__(self, services: Services, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        self._services = services
        self._kind = kind
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started = time.perf_counter()
        self.is_status_out = False
        self.model_label = UNKNOWN_MODEL

    async def run(self) -> None:
        services, scope = self._services, self._scope
        authorization = header(scope, b"authorization")
        tenant = find_tenant(
            None if authorization is None else authorization.decode("latin-1"),
            services.keys,
            no_auth=services.settings.no_auth,
        )
        raw = await read_body(scope, self._receive, services.settings.max_body_bytes)
        is_chat = self._kind == "chat"
        call = chat_call(parse_chat(raw)) if is_chat else completion_call(parse_completion(raw))
        entry = admission.find_model(call.model, services.registry.models())
        self.model_label = entry.name
        wanted = header(scope, b"x-tidegate-max-wait-seconds")
        budget = admission.wait_budget_seconds(entry, None if wanted is None else wanted.decode("latin-1"))

        now = time.time()
        call_id = ("chatcmpl-" if is_chat else "cmpl-") + new_id()
        revision = admission.choose_revision(entry.revisions, call_id)
        origin = Origin(call_id, tenant, revision, services.gateway_id, now, now + budget)
        requests = build_requests(call, origin, new_seed())
        opened = services.calls.open(requests, wakes_on_each=call.stream)
        cancel_reason: str | None = "the gateway gave the call up"
        watcher: asyncio.Task[None] | None = None
        try:
            outcome = await services.queue.submit(requests, self._bounds(entry))
            if isinstance(outcome, Rejected):
                cancel_reason = None
                raise admission.queue_full(outcome, entry, len(requests))
            services.calls.submitted(opened)
            admission.check_wait(outcome.waiting_ahead, outcome.depth, entry, budget)
            plan = Plan(call, call_id, entry, revision, int(now))
            watcher = asyncio.get_running_loop().create_task(_watch(self._receive, opened))
            if call.stream:
                await self._stream(plan, opened)
            else:
                await self._answer(plan, opened)
        except ClientLeft:
            cancel_reason = CLIENT_LEFT
            raise
        finally:
            if watcher is not None:
                watcher.cancel()
            services.calls.close(opened, cancel_reason)

    async def refuse(self, error: RequestError) -> None:
        """Answer with an error; a client that is gone gets none."""
        if error.status >= 500:
            logger.warning("a call failed: %s", error.message, extra=fields(reason=error.reason))
        with contextlib.suppress(OSError):  # the connection broke meanwhile
            if self.is_status_out:
                event = sse.error_event(error.body())
                await self._send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                self.is_status_out = True
                await send_error(self._send, error)

    def _bounds(self, entry: ModelEntry) -> Bounds:
        settings = self._services.settings
        return Bounds(
            entry.limits,
            settings.tenant_max_requests,
            settings.tenant_max_bytes,
            settings.total_max_requests,
            settings.total_max_bytes,
        )

    async def _answer(self, plan: Plan, opened: OpenCall) -> None:
        """Wait for the end, then one JSON object."""
        while opened.unfinished and opened.failure is None and not opened.has_left:
            await opened.changed()
        if opened.failure is not None:
            raise failure_error(opened.failure, plan.call.kind, plan.entry.name)
        if opened.has_left:
            raise ClientLeft
        choices: list[list[Segment]] = [[] for _ in opened.requests]
        for index, segment in opened.take():
            choices[index].append(segment)
        body, usage = assembled(plan, opened, choices)
        self._record(plan, usage, None)
        self.is_status_out = True
        await send_json(self._send, 200, body)

    async def _stream(self, plan: Plan, opened: OpenCall) -> None:
        """Hold the status line, then events until every choice has ended."""
        loop = asyncio.get_running_loop()
        headers = await self._held(plan, opened)
        self.is_status_out = True
        await self._send({"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM, *headers]})
        if not opened.has_begun:
            # Clients that wait for the first byte of the body see that the call is alive.
            await self._send({"type": "http.response.body", "body": sse.HEARTBEAT, "more_body": True})
        opened.last_sent = loop.time()
        self._services.calls.stream_opened(opened)
        events = events_of(plan)
        shown: Place | None = None
        first_token: float | None = None
        while True:
            pending = opened.take()
            if pending and first_token is None:
                first_token = time.perf_counter() - self._started
            out = b"".join([events.render(index, segment) for index, segment in pending if is_good(segment)])
            if opened.failure is not None:
                if out:
                    await self._send({"type": "http.response.body", "body": out, "more_body": True})
                raise failure_error(opened.failure, plan.call.kind, plan.entry.name)
            if opened.has_left:
                raise ClientLeft
            if not opened.unfinished:
                usage = answers.usage(opened.finishes(), plan.call.n)
                if plan.call.include_usage:
                    out += events.usage(usage)
                self._record(plan, usage, first_token)
                await self._send({"type": "http.response.body", "body": out + sse.DONE, "more_body": False})
                return
            if not out:
                place = opened.place
                opened.place = None
                if place is not None and not opened.has_begun and place != shown:
                    shown = place
                    out = news(place, plan.entry)
                if not out and opened.is_heartbeat_due:
                    out = sse.HEARTBEAT
                opened.is_heartbeat_due = False
            if out:
                await self._send({"type": "http.response.body", "body": out, "more_body": True})
                opened.last_sent = loop.time()
            if not opened.pending and not opened.has_left:
                await opened.changed()

    async def _held(self, plan: Plan, opened: OpenCall) -> list[Header]:
        """Wait for the first segment, a refusal (raised) or the end of the hold; headers of the latter."""
        loop = asyncio.get_running_loop()
        if not opened.has_begun:
            deadline = loop.time() + self._services.settings.hold_status_seconds
            timer = loop.call_at(deadline, opened.wake)
            try:
                while not opened.has_begun and not opened.has_left and loop.time() < deadline:
                    await opened.changed()
            finally:
                timer.cancel()
        if opened.failure is not None:
            raise failure_error(opened.failure, plan.call.kind, plan.entry.name)
        if opened.has_left:
            raise ClientLeft
        return [] if opened.has_begun else await self._look_up_place(plan, opened)

    async def _look_up_place(self, plan: Plan, opened: OpenCall) -> list[Header]:
        """Empty where the queue does not say in time."""
        asked = (opened.requests[0].id, plan.entry.name, plan.revision)
        try:
            async with asyncio.timeout(PLACE_SECONDS):
                place = (await self._services.queue.places([asked]))[0]
        except (RequestError, TimeoutError):
            return []
        return place_headers(place, plan.entry)

    def _record(self, plan: Plan, usage: answers.Usage, first_token: float | None) -> None:
        self._services.metrics.answered(
            plan.entry.name,
            duration_seconds=time.perf_counter() - self._started,
            first_token_seconds=first_token,
            prompt_tokens=usage.prompt_tokens,
            generation_tokens=usage.completion_tokens,
            choices=plan.call.sequences,
        )


async def _watch(receive: Receive, opened: OpenCall) -> None:
    """Wait for the client to close the connection."""
    while (await receive())["type"] != "http.disconnect":
        continue
    opened.leave()
