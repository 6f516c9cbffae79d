"""The HTTP door: uvicorn's parser of one connection, with a bound for everything that comes before a key.

`Door` is uvicorn's protocol with these changes, all on the one event loop:

- Bytes are counted before the parser gathers them. Whatever is not a body (request line, headers, trailers,
  chunk extensions) has a bound; above it 431 and the end of the connection.
- A request has a time for its head and a time in which each further part of its body must come; then 408.
- There are at most so many connections. At the bound one that has no request on its way makes room: the one
  that has been quiet the longest.
- An offer to switch protocols is declined as RFC 9110 (7.8) says: the request is answered as HTTP/1.1, with
  its body. The parser skips the body of such a request, so it is given the head again without the offer.
- A client that takes nothing of its answer for a while is left, and its call is cancelled with it.
- To HTTP/1.0 an answer of unknown length goes without chunks and ends with the connection.

A refusal closes gently: the answer, then half a close, and what still comes is thrown away for a moment. A
socket closed with unread bytes would be reset, and the client would not see the answer.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import httptools
import orjson
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tidegate.errors import HeadTooLarge, InvalidRequest, RequestError, RequestTimeout, TooManyConnections
from tidegate.settings import Settings

SLICE_BYTES = 16 * 1024  # fed to the parser at once
MOST_HEADERS = 256
MOST_PIPELINED = 64
LINGER_SECONDS = 2.0
KEEP_ALIVE_SECONDS = 75  # longer than the pools of usual clients and proxies, which then close first
BODY_TIMES = 20  # a body whose parts come in time may take so many times `body_seconds` in all
RESERVED_DESCRIPTORS = 128  # for Redis, files and what listens
FEWEST_CONNECTIONS = 16


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """The connections of one gateway share this. `quiet` holds those without a request on its way, the
    longest quiet first."""

    head_bytes: int
    head_seconds: float
    body_seconds: float
    stall_seconds: float
    connections: int
    remedy: str = "Send less, or raise TIDEGATE_MAX_HEAD_BYTES."  # where a head is too large
    quiet: dict[Door, None] = field(default_factory=dict)


def door_class(settings: Settings) -> type[asyncio.Protocol]:
    """Return what uvicorn makes a protocol with, for each connection of one gateway."""
    return door_within(
        DoorLimits(
            settings.max_head_bytes,
            settings.head_timeout_seconds,
            settings.body_timeout_seconds,
            settings.stall_timeout_seconds,
            connections_within(settings.max_connections),
        )
    )


def door_within(limits: DoorLimits) -> type[asyncio.Protocol]:
    """Return what uvicorn makes a protocol with; all connections that it makes share `limits`."""
    return cast("type[asyncio.Protocol]", functools.partial(Door, limits=limits))


def server_config(
    app: Any, protocol: type[asyncio.Protocol], *, lifespan: Literal["on", "off"], grace_seconds: int
) -> Config:
    """Return how uvicorn serves `app` behind such a door; the logs are this process's own."""
    return Config(
        app,
        http=protocol,
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # an address is the connection's own
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace_seconds,
    )


def connections_within(wanted: int) -> int:
    """At most `wanted`, and so few that the process's descriptors suffice, whose limit is raised where it
    may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_DESCRIPTORS
    if resource.RLIM_INFINITY != soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(FEWEST_CONNECTIONS, min(wanted, soft - RESERVED_DESCRIPTORS))


class Door(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: DoorLimits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._is_in_head = True  # also before the first byte
        self._is_in_body = False
        self._is_switch_offered = False
        self._is_ending = False  # refused: what still comes is thrown away
        self._plain_bytes = 0  # fed since the last part of a body or end of a request
        self._began = 0.0  # loop time: the head, or the body, is waited for since then
        self._timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._began = self.loop.time()
        limits = self._limits
        if len(self.connections) > limits.connections:
            if len(self.connections) > limits.connections + RESERVED_DESCRIPTORS // 2:
                self._leave()
                return
            if not limits.quiet:
                self._refuse(TooManyConnections("The gateway has as many connections as it may have."))
                return
            next(iter(limits.quiet))._leave()
        limits.quiet[self] = None
        self._arm(limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._end_stall()
        self._limits.quiet.pop(self, None)
        # Uvicorn tells the last request alone that its client left.
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None:
                _disconnect(cycle)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._running = None

    def data_received(self, data: bytes) -> None:
        if self._is_ending:
            return
        self._unset_keepalive_if_required()
        if self._is_in_head and not self._plain_bytes:
            self._began = self.loop.time()
        view = memoryview(data)
        while len(view) and not self._is_ending:
            part = view[:SLICE_BYTES]
            self._plain_bytes += len(part)
            try:
                self.parser.feed_data(part)
                view = view[SLICE_BYTES:]
            except httptools.HttpParserUpgrade as offer:
                view = view[offer.args[0] :]
                self._decline_switch()
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
            if self._plain_bytes > self._limits.head_bytes:
                self._refuse(
                    HeadTooLarge(
                        f"Request line and headers have more than {self._limits.head_bytes} bytes. "
                        f"{self._limits.remedy}"
                    )
                )
            elif len(self.headers or ()) > MOST_HEADERS:
                self._refuse(HeadTooLarge(f"The request has more than {MOST_HEADERS} headers. Send fewer."))
            elif len(self.pipeline) > MOST_PIPELINED:
                self._refuse(InvalidRequest(f"More than {MOST_PIPELINED} requests came before an answer."))
        if not self._is_ending:
            self._wait_for_more()

    def eof_received(self) -> None:
        if self._is_ending:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(msg))

    # Parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._running is None:
            self._limits.quiet.pop(self, None)
            self._limits.quiet[self] = None
        self._plain_bytes, self._began = max(1, self._plain_bytes), self.loop.time()
        self._is_in_head, self._is_in_body = True, False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # trailers are no headers: the call has been decided without them
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._is_switch_offered = True
            return
        super().on_headers_complete()
        self._is_in_head, self._is_in_body = False, True
        self._plain_bytes, self._began = 0, self.loop.time()
        self._limits.quiet.pop(self, None)
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _CloseDelimited
            self.cycle.chunked_encoding, self.cycle.expected_content_length = False, sys.maxsize

    def on_body(self, body: bytes) -> None:
        self._plain_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_switch_offered:
            return
        self._is_in_head, self._is_in_body, self._plain_bytes = True, False, 0
        super().on_message_complete()

    # Answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self._is_ending:
            return
        self._running = None
        super().on_response_complete()
        if self._running is None:
            self._limits.quiet[self] = None

    def _decline_switch(self) -> None:
        """Read the head again as if nothing had been offered; then the body follows."""
        self._is_switch_offered = False
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            self._refuse(InvalidRequest("CONNECT is not offered: this is no proxy."))
            return
        head = [b"%b %b HTTP/%b\r\n" % (method, self.url, version.encode())]
        head += [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        try:
            self.parser.feed_data(b"".join([*head, b"\r\n"]))
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _refuse(self, error: RequestError) -> None:
        """Answer and end the connection; where another answer is on its way, only end it."""
        if self._is_ending:
            return
        self._is_ending = True
        self._disarm()
        self._unset_keepalive_if_required()
        self._limits.quiet.pop(self, None)
        running = self._running
        is_answering = running is not None and running.response_started
        if running is not None:
            _disconnect(running)
        self.pipeline.clear()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)
        if is_answering:
            self.transport.close()
            return
        body = orjson.dumps(error.body())
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINE[error.status], len(body), body)
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()

    def _leave(self) -> None:
        """Make room for another connection."""
        self._is_ending = True
        self._limits.quiet.pop(self, None)
        self.connections.discard(self)
        self.transport.abort()

    # Time

    def pause_writing(self) -> None:
        """The client reads slower than it is written to; one that reads nothing at all is left."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._end_stall()
        super().resume_writing()

    def _end_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _wait_for_more(self) -> None:
        if self._is_in_body:
            longest = self._began + BODY_TIMES * self._limits.body_seconds
            self._arm(min(self._limits.body_seconds, longest - self.loop.time()))
        elif self._plain_bytes:
            self._arm(self._began + self._limits.head_seconds - self.loop.time())
        else:
            self._disarm()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(max(0.0, seconds), self._too_late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        if self.flow.read_paused or (self._is_in_head and self._running is not None):
            self._arm(self._limits.head_seconds)  # it is not the client's turn
        elif self._is_in_head:
            seconds = self._limits.head_seconds
            self._refuse(RequestTimeout(f"No whole request head came within {seconds:g} s."))
        else:
            seconds = self._limits.body_seconds
            self._refuse(RequestTimeout(f"The rest of the body did not come; it was waited {seconds:g} s."))


class _CloseDelimited(RequestResponseCycle):
    """An answer whose length nobody checks: its end is the connection's."""

    async def send(self, message: Any) -> None:
        if self.response_started and not message.get("more_body", False):
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


def _disconnect(cycle: RequestResponseCycle) -> None:
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()
