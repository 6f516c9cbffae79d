"""The connection of one process to Redis: it opens, checks the server, and comes back by itself.

One connection carries a process's commands and its subscriptions (see `wire`). Who runs where: everything on
one event loop. When the socket breaks, commands in flight fail with `ConnectionLost`, one task reconnects
with backoff until it succeeds or `close` is called, subscribes again, and then tells the subscribers, because
whatever was published meanwhile is lost to them. Commands issued while it is away wait up to
`patience_seconds` and then raise `QueueUnavailable`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tidegate.errors import ConfigError, QueueUnavailable
from tidegate.store.scripts import Script
from tidegate.store.wire import Argument, ConnectionLost, ReplyError, Wire

OLDEST_VERSION = (7, 0)
FIRST_BACKOFF_SECONDS = 0.05
LONGEST_BACKOFF_SECONDS = 1.0
# Errors of a server that is there but cannot serve now: it loads its file, was demoted, or has no room.
TRANSIENT_KINDS = frozenset(
    {"LOADING", "READONLY", "MASTERDOWN", "NOREPLICAS", "OOM", "MISCONF", "BUSY", "TRYAGAIN"}
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where Redis is, from its URL. `repr` hides the password."""

    host: str
    port: int
    path: str  # of a unix socket; empty: TCP
    db: int
    username: str | None
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"unix://{self.path}" if self.path else f"{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """Read `redis://`, `rediss://` or `unix://`. Raises `ConfigError` that names what is wrong."""
    try:
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        is_unix = parts.scheme == "unix"
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError("the scheme must be redis, rediss or unix")
        db = int(query.get("db", "0") if is_unix else (parts.path.strip("/") or query.get("db", "0")))
        return Address(
            host=parts.hostname or "localhost",
            port=parts.port or 6379,
            path=unquote(parts.path) if is_unix else "",
            db=db,
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            tls=_tls(query) if parts.scheme == "rediss" else None,
        )
    except (ValueError, OSError) as error:
        shown = re.sub(r"//[^@/]*@", "//***@", url)
        raise ConfigError(
            f"redis_url: {shown!r}: {error}; use redis://host:port/db, rediss:// or unix:///path.sock"
        ) from error


def _tls(query: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
    if query.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate := query.get("ssl_certfile"):
        context.load_cert_chain(certificate, query.get("ssl_keyfile"))
    return context


class Connection:
    """Use as `async with Connection(url) as connection`, or `await connection.open()` and `close()`.

    `patience_seconds` bounds how long a command waits for a lost connection to come back,
    `call_timeout_seconds` how long a server may be silent with commands in flight.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "tidegate",
        patience_seconds: float = 2.0,
        connect_timeout_seconds: float = 2.0,
        call_timeout_seconds: float = 5.0,
    ) -> None:
        self.address = parse_url(url)
        self.server_version = ""
        self._name = re.sub(r"[^!-~]", "-", name)
        self._patience_seconds = patience_seconds
        self._connect_timeout_seconds = connect_timeout_seconds
        self._call_timeout_seconds = call_timeout_seconds
        self._wire: Wire | None = None
        self._ready = asyncio.Event()
        self._reconnecting: asyncio.Task[None] | None = None
        self._is_closed = False
        self._channels: dict[bytes, Callable[[bytes], None]] = {}
        self._confirmations: dict[bytes, asyncio.Future[None]] = {}
        self._on_reconnect: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Connect once. Raises `ConfigError` for a server that Tidegate cannot use (older than 7.0, Redis
        Cluster, wrong password) and `QueueUnavailable` where none answers."""
        try:
            self._wire = await self._connect()
        except (OSError, TimeoutError, ReplyError) as error:
            raise QueueUnavailable(f"No Redis answers at {self.address}: {_sentence(error)}") from error
        self._ready.set()

    async def close(self) -> None:
        self._is_closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # it is cancelled because we ask for it
                await self._reconnecting
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
            try:
                return await (await self._usable()).send(*command)
            except ConnectionLost:
                if not repeat:
                    raise
            except ReplyError as error:
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

    async def _usable(self) -> Wire:
        if self._wire is not None and self._ready.is_set():
            return self._wire
        if not self._is_closed:
            with contextlib.suppress(TimeoutError):  # reported below, as what it means
                await asyncio.wait_for(self._ready.wait(), self._patience_seconds)
        if self._wire is None or not self._ready.is_set():
            raise QueueUnavailable(f"Redis at {self.address} is away.")
        return self._wire

    async def _connect(self) -> Wire:
        """A connection that is greeted, checked and subscribed."""
        async with asyncio.timeout(self._connect_timeout_seconds):
            wire = await self._dial()
            try:
                await self._greet(wire)
                for channel in list(self._channels):
                    await self._confirm(wire, channel)
            except BaseException:
                wire.abort()
                raise
            return wire

    async def _dial(self) -> Wire:
        loop, address = asyncio.get_running_loop(), self.address

        def make() -> Wire:
            return Wire(self._pushed, self._lost, self._call_timeout_seconds)

        if address.path:
            _, wire = await loop.create_unix_connection(make, address.path)
        else:
            _, wire = await loop.create_connection(make, address.host, address.port, ssl=address.tls)
        return wire

    async def _greet(self, wire: Wire) -> None:
        hello: list[Argument] = ["HELLO", 3]
        if self.address.password is not None:
            hello += ["AUTH", self.address.username or "default", self.address.password]
        try:
            found = await wire.send(*hello, "SETNAME", self._name)
        except ReplyError as error:
            if error.kind in ("WRONGPASS", "NOAUTH"):
                raise ConfigError(
                    f"redis_url: {self.address}: {error}; put user and password in the URL"
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
            raise QueueUnavailable(f"Redis at {self.address} is a read-only replica.")
        self.server_version = version
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
            self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())

    async def _reconnect(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            try:
                self._wire = await self._connect()
                break
            except (OSError, TimeoutError, ReplyError, ConfigError, QueueUnavailable):
                # Also a ConfigError: what was usable at start becomes so again, or an operator sees us away.
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
                backoff = min(LONGEST_BACKOFF_SECONDS, backoff * 2)
        self._ready.set()
        for callback in list(self._on_reconnect):
            callback()


def _too_old(address: Address, version: str) -> ConfigError:
    return ConfigError(
        f"redis_url: {address}: version {version} is too old; use Redis or Valkey 7.0 or newer"
    )


def _sentence(error: BaseException) -> str:
    return str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)
