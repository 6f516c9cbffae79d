"""The connection of one process to Redis: it opens itself, checks the server, and comes back by itself.

One connection carries a process's commands and its subscriptions (see `wire`). Who runs where: everything on
one event loop. The first command opens it, or `open`, which says so where the server will never do. When the
socket breaks, commands in flight fail with `ConnectionLost`, one task reconnects with backoff until it
succeeds or `close` is called, subscribes again, and then tells the subscribers, because whatever was
published meanwhile is lost to them. Commands issued while it is away wait up to `patience_seconds` and then
raise `QueueUnavailable`.

Each connect asks the Sentinels anew, where the URL names some, and each is refused by a server that is not
the master. A master that was demoted under an open connection says READONLY, which ends that connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tidegate.errors import ConfigError, QueueOutOfMemory, QueueReadOnly, QueueRefused, QueueUnavailable
from tidegate.store.address import Address, Endpoint, parse_url
from tidegate.store.sentinel import find_master
from tidegate.store.wire import Argument, ConnectionLost, ReplyError, Wire
from tidegate.tasks import end_tasks

logger = logging.getLogger(__name__)

OLDEST_VERSION = (7, 0)
FIRST_BACKOFF_SECONDS = 0.05
LONGEST_BACKOFF_SECONDS = 1.0
FULL_RETRY_SECONDS = 5.0  # told to clients while Redis has no memory left
REFUSED_KINDS = ("WRONGPASS", "NOAUTH", "NOPERM")
# Errors of a server that is there but takes no writes: it was demoted, or cannot keep them safe.
READ_ONLY_KINDS = frozenset({"READONLY", "NOREPLICAS", "MISCONF"})
# Errors of a server that is there but cannot serve now, as while it loads its file.
TRANSIENT_KINDS = frozenset({"LOADING", "MASTERDOWN", "BUSY", "TRYAGAIN"})


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and its digest."""

    text: str
    sha: str


class Connection:
    """Use as `async with Connection(url) as connection`, which opens it at once, or let the first command
    open it; `close` it at the end. A `url` that may change is a function, asked at each connect.

    `patience_seconds` bounds how long a command waits for a lost connection to come back,
    `call_timeout_seconds` how long a server may be silent with commands in flight.
    """

    def __init__(
        self,
        url: str | Callable[[], str],
        *,
        name: str = "tidegate",
        patience_seconds: float = 2.0,
        connect_timeout_seconds: float = 2.0,
        call_timeout_seconds: float = 5.0,
    ) -> None:
        self._find_url = url if callable(url) else None
        self.address = parse_url(url() if callable(url) else url)
        self._name = re.sub(r"[^!-~]", "-", name)
        self._patience_seconds = patience_seconds
        self._connect_timeout_seconds = connect_timeout_seconds
        self._call_timeout_seconds = call_timeout_seconds
        self._wire: Wire | None = None
        self._ready = asyncio.Event()
        self._connecting: asyncio.Task[None] | None = None  # the first connect, or all that follow a loss
        self._trouble: Exception | None = None  # why the last reconnect failed
        self._was_open = False
        self._is_closed = False
        self._channels: dict[bytes, Callable[[bytes], None]] = {}
        self._confirmations: dict[bytes, asyncio.Future[None]] = {}
        self._on_reconnect: list[Callable[[], None]] = []

    async def open(self, *, within_seconds: float = 0.0) -> None:
        """Connect for the first time: try once, or again until `within_seconds` are over. Raises
        `ConfigError` for a server that Tidegate cannot use (older than 7.0, Redis Cluster, wrong password)
        and `QueueUnavailable` where none answers."""
        give_up = asyncio.get_running_loop().time() + within_seconds
        backoff = FIRST_BACKOFF_SECONDS
        while not self._was_open:
            try:
                await self._open_once()
            except QueueUnavailable as error:
                if asyncio.get_running_loop().time() >= give_up:
                    raise
                logger.warning("waiting for Redis: %s", error.message)
                backoff = await _pause(backoff)

    async def close(self) -> None:
        self._is_closed = True
        await end_tasks(self._connecting)
        wire, self._wire = self._wire, None
        self._ready.clear()
        if wire is not None:
            wire.abort()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def is_connected(self) -> bool:
        return self._ready.is_set()

    async def call(self, *command: Argument, repeat: bool = False) -> Any:
        """Carry out one command. With `repeat` it is sent again where the connection broke in flight: only
        for commands that may be carried out twice. Raises `QueueUnavailable`; `ReplyError` for a mistake."""
        while True:
            wire = await self._usable()
            try:
                return await wire.send(*command)
            except ConnectionLost:
                if not repeat:
                    raise
            except ReplyError as error:
                if error.kind == "READONLY":
                    wire.abort()  # another server is the master now
                if error.kind == "OOM":
                    raise QueueOutOfMemory(
                        f"Redis has no memory left: {error}", retry_after_seconds=FULL_RETRY_SECONDS
                    ) from error
                if error.kind in READ_ONLY_KINDS:
                    raise QueueReadOnly(f"Redis takes no writes now: {error}") from error
                if error.kind in TRANSIENT_KINDS:
                    raise QueueUnavailable(f"Redis cannot serve now: {error}") from error
                raise

    async def run(self, script: Script, prefix: str, *arguments: Argument, repeat: bool = False) -> Any:
        """Run a Lua script by its digest; a server that lost it (restart, failover) gets the text."""
        try:
            return await self.call("EVALSHA", script.sha, 1, prefix, *arguments, repeat=repeat)
        except ReplyError as error:
            if error.kind != "NOSCRIPT":
                raise
        return await self.call("EVAL", script.text, 1, prefix, *arguments, repeat=repeat)

    async def subscribe(self, channel: str, receive: Callable[[bytes], None]) -> None:
        """Call `receive` with each message of `channel` until `unsubscribe`. Returns once Redis confirmed."""
        wire = await self._usable()
        self._channels[channel.encode()] = receive
        await self._confirm(wire, channel.encode())

    def unsubscribe(self, channel: str) -> None:
        self._channels.pop(channel.encode(), None)
        if self._wire is not None:
            self._wire.send_push_command("UNSUBSCRIBE", channel)

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` after each reconnect, when subscriptions stand again. Returns how to stop that."""
        self._on_reconnect.append(callback)

        def stop() -> None:
            if callback in self._on_reconnect:
                self._on_reconnect.remove(callback)

        return stop

    def tell_reconnected(self) -> None:
        """Call what `on_reconnect` was given: here, and where data is lost under a connection that stands."""
        for callback in list(self._on_reconnect):
            callback()

    async def _usable(self) -> Wire:
        if self._wire is not None and self._ready.is_set():
            return self._wire
        if not self._was_open and not self._is_closed:
            try:
                await self._open_once()
            except ConfigError as error:  # to a command no more than a reason for being away
                raise QueueRefused(error.message) from error
        elif not self._is_closed:
            with contextlib.suppress(TimeoutError):  # reported below, as what it means
                await asyncio.wait_for(self._ready.wait(), self._patience_seconds)
        if self._wire is None or not self._ready.is_set():
            if isinstance(self._trouble, ConfigError):
                raise QueueRefused(self._trouble.message)
            if isinstance(self._trouble, QueueReadOnly):
                raise QueueReadOnly(self._trouble.message)
            has_answered = isinstance(self._trouble, ReplyError | QueueUnavailable)
            why = f": {self._trouble}" if has_answered else ""
            raise QueueUnavailable(f"Redis at {self.address} is away{why}.")
        return self._wire

    async def _open_once(self) -> None:
        """Try a first connect, one for all who want it at the same time; `close` ends it."""
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.get_running_loop().create_task(self._connect_first())
        connecting = self._connecting
        await asyncio.wait({connecting})
        if connecting.cancelled():
            raise QueueUnavailable(f"The connection to Redis at {self.address} was closed.")
        connecting.result()

    async def _connect_first(self) -> None:
        try:
            self._wire = await self._connect()
        except (OSError, TimeoutError, ReplyError) as error:
            raise QueueUnavailable(f"No Redis answers at {self.address}: {_sentence(error)}") from error
        self._was_open = True
        self._ready.set()

    async def _connect(self) -> Wire:
        """A connection to the master that is greeted, checked and subscribed."""
        if self._find_url is not None:
            self.address = parse_url(self._find_url())
        async with asyncio.timeout(self._connect_timeout_seconds):
            endpoint = (self.address.host, self.address.port)
            if self.address.sentinels:
                patience_seconds = self._connect_timeout_seconds / 2
                endpoint = await find_master(self.address, self._dial, timeout_seconds=patience_seconds)
            wire = await self._dial(endpoint)
            try:
                await self._greet(wire)
                for channel in list(self._channels):
                    await self._confirm(wire, channel)
            except BaseException:
                wire.abort()
                raise
            if wire.is_closed:
                raise ConnectionLost("The connection to Redis broke.")
            return wire

    async def _dial(self, endpoint: Endpoint) -> Wire:
        loop = asyncio.get_running_loop()

        def make() -> Wire:
            return Wire(self._pushed, self._lost, self._call_timeout_seconds)

        if self.address.path:
            _, wire = await loop.create_unix_connection(make, self.address.path)
        else:
            _, wire = await loop.create_connection(make, *endpoint, ssl=self.address.tls)
        return wire

    async def _greet(self, wire: Wire) -> None:
        try:
            found = await wire.send("HELLO", 3, *self.address.credentials.command, "SETNAME", self._name)
        except ReplyError as error:
            if error.kind in REFUSED_KINDS:
                raise ConfigError(
                    f"redis_url: {self.address} refuses the user or the password: {error}; set "
                    "REDIS_USERNAME and REDIS_PASSWORD, or the Secret that they come from, as it has them"
                ) from error
            if error.kind in ("ERR", "NOPROTO") and "unknown command" in str(error).lower():
                raise _too_old(self.address, "older than 6.0") from error
            raise
        version = found[b"version"].decode()
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_VERSION:
            raise _too_old(self.address, version)
        if found.get(b"mode") == b"cluster":
            raise ConfigError(
                f"redis_url: {self.address}: Redis Cluster cannot hold steps that span several bounds; "
                "use a standalone server"
            )
        if found.get(b"role") not in (b"master", b"primary"):
            raise QueueReadOnly(f"Redis at {self.address} is a read-only replica.")
        if self.address.db:
            await wire.send("SELECT", self.address.db)
        await wire.send("PING")  # answers LOADING while the server reads its file

    async def _confirm(self, wire: Wire, channel: bytes) -> None:
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._confirmations[channel] = confirmed
        wire.send_push_command("SUBSCRIBE", channel)
        try:
            await asyncio.wait_for(confirmed, self._call_timeout_seconds)
        except TimeoutError as error:
            raise QueueUnavailable(f"Redis at {self.address} does not confirm a subscription.") from error
        finally:
            self._confirmations.pop(channel, None)

    def _pushed(self, kind: bytes, channel: bytes, payload: Any) -> None:
        if kind == b"message":
            if receive := self._channels.get(channel):
                receive(payload)
            return
        confirmed = self._confirmations.get(channel)
        if kind == b"subscribe" and confirmed is not None and not confirmed.done():
            confirmed.set_result(None)

    def _lost(self, wire: Wire) -> None:
        if wire is not self._wire:
            return  # one that never came into use
        self._wire = None
        self._ready.clear()
        if not self._is_closed:
            self._connecting = asyncio.get_running_loop().create_task(self._reconnect())

    async def _reconnect(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            try:
                self._wire = await self._connect()
                break
            except (OSError, TimeoutError, ReplyError, ConfigError, QueueUnavailable) as error:
                # Also a ConfigError: a password is being changed, or an operator sees us refused.
                self._trouble = error
                backoff = await _pause(backoff)
        self._trouble = None
        self._ready.set()
        self.tell_reconnected()


async def _pause(backoff: float) -> float:
    """Wait about so long; returns the next, longer one."""
    await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
    return min(LONGEST_BACKOFF_SECONDS, backoff * 2)


def _too_old(address: Address, version: str) -> ConfigError:
    return ConfigError(
        f"redis_url: {address}: version {version} is too old; use Redis or Valkey 7.0 or newer"
    )


def _sentence(error: BaseException) -> str:
    return str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)
