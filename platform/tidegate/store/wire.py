"""One RESP3 connection as an asyncio protocol: commands out in order, replies and pushes in.

redis-py spends 60 to 150 microseconds of Python on each command and on each published message (pool,
retry object, lock, stream reader); at thousands of short requests per second that is most of a core. Here a
command costs one `hiredis.pack_command` and one future, and RESP3 lets published messages share the socket.

Everything runs on the event loop, without locks. Replies come in the order of the commands, so the futures
wait in a deque. Pushes come between replies and are told apart by their type.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, cast

import hiredis

from tidegate.errors import QueueUnavailable

Argument = bytes | str | int | float


class ConnectionLost(QueueUnavailable):
    """The connection broke while a command was in flight: it may or may not have been carried out."""


class ReplyError(Exception):
    """Redis answered with an error. `kind` is its first word: NOSCRIPT, LOADING, ERR, ..."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.kind = message.partition(" ")[0]


class _Reader(Protocol):
    def feed(self, buffer: bytes) -> None: ...
    def gets(self) -> Any: ...


_NOTHING = object()


class Wire(asyncio.Protocol):
    """`pushed` gets (kind, channel, payload) of every push; `lost` is called once, when all is over."""

    def __init__(
        self,
        pushed: Callable[[bytes, bytes, Any], None],
        lost: Callable[[Wire], None],
        call_timeout_seconds: float,
    ) -> None:
        self._pushed = pushed
        self._lost = lost
        self._call_timeout_seconds = call_timeout_seconds
        self._pending: deque[asyncio.Future[Any]] = deque()
        self._transport: asyncio.WriteTransport | None = None
        self._loop = asyncio.get_running_loop()
        self._watchdog: asyncio.TimerHandle | None = None
        self._replies = 0
        self._reader = cast(
            _Reader,
            hiredis.Reader(protocolError=ReplyError, replyError=ReplyError, notEnoughData=_NOTHING),
        )

    @property
    def is_closed(self) -> bool:
        return self._transport is None

    def send(self, *command: Argument) -> asyncio.Future[Any]:
        """Send one command. The future gives the reply, `ReplyError` or `ConnectionLost`."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._transport is None:
            future.set_exception(ConnectionLost("The connection to Redis is closed."))
            return future
        self._pending.append(future)
        self._transport.write(hiredis.pack_command(command))  # type: ignore[arg-type]
        if self._watchdog is None:
            self._watch()
        return future

    def send_push_command(self, *command: Argument) -> None:
        """Send SUBSCRIBE or UNSUBSCRIBE, which RESP3 answers with a push and not with a reply."""
        if self._transport is not None:
            self._transport.write(hiredis.pack_command(command))  # type: ignore[arg-type]

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not _NOTHING:
                if type(reply) is hiredis.PushNotification:
                    kind, channel, payload = cast("list[Any]", reply)[:3]
                    self._pushed(kind, channel, payload)
                    continue
                self._replies += 1
                future = self._pending.popleft()
                if future.done():  # its caller was cancelled meanwhile
                    continue
                if isinstance(reply, ReplyError):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        except (ReplyError, IndexError):
            # Not RESP, or a reply that nobody asked for: the two ends no longer agree where they are.
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._transport = None
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        pending, self._pending = self._pending, deque()
        for future in pending:
            if not future.done():
                future.set_exception(ConnectionLost("The connection to Redis broke."))
        self._lost(self)

    def _watch(self) -> None:
        """One timer for all commands in flight: no reply at all within the time limit ends the connection."""
        self._watchdog = self._loop.call_later(self._call_timeout_seconds, self._check, self._replies)

    def _check(self, replies_before: int) -> None:
        self._watchdog = None
        if not self._pending:
            return
        if self._replies == replies_before:
            self.abort()
        else:
            self._watch()
