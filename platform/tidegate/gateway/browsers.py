"""The two layers that concern web pages: which may call, and which must not where there are no keys."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from tidegate.errors import HostRefused, UnsupportedMedia
from tidegate.gateway.asgi import ASGIApp, Header, Message, Receive, Scope, Send, header, text_header
from tidegate.gateway.auth import is_loopback

EXPOSED = (
    b"x-request-id, retry-after, x-tidegate-queue-position, x-tidegate-estimated-wait-seconds, "
    b"x-tidegate-warning"
)
PREFLIGHT_SECONDS = 600
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9_, -]{1,2048}")


class Cors:
    """Answers preflights, which come without a key, and lets pages of the set origins read every answer,
    errors too. `origins`: empty for none, `*` for all, else with commas between them."""

    def __init__(self, app: ASGIApp, origins: str) -> None:
        self._app = app
        self._origins = frozenset(name.strip().encode() for name in origins.split(",") if name.strip())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = header(scope, b"origin") if self._origins and scope["type"] == "http" else None
        if origin is None:
            await self._app(scope, receive, send)
            return
        allowed = self._allowed(origin)
        if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method") is not None:
            headers = allowed and [*allowed, *_preflight(scope)]
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return

        def send_allowed(message: Message) -> object:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *allowed]
            return send(message)

        await self._app(scope, receive, send_allowed)  # type: ignore[arg-type]

    def _allowed(self, origin: bytes) -> list[Header]:
        if b"*" in self._origins:
            return [
                (b"access-control-allow-origin", b"*"),
                (b"access-control-expose-headers", EXPOSED),
            ]
        if origin not in self._origins:
            return [(b"vary", b"origin")]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", EXPOSED),
            (b"vary", b"origin"),
        ]


class OwnPagesOnly:
    """Without keys, the browser of whoever sits here must not be anybody's way in: a name that leads here by
    DNS rebinding is refused, and so is a body that a foreign page may send without asking first."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            _check_host(text_header(scope, b"host"))
            if scope["method"] == "POST":
                _check_type(text_header(scope, b"content-type"), header(scope, b"origin"))
        await self._app(scope, receive, send)


def _preflight(scope: Scope) -> list[Header]:
    asked = header(scope, b"access-control-request-headers") or b""
    return [
        (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE"),
        (
            b"access-control-allow-headers",
            asked if _HEADER_NAMES.fullmatch(asked) else b"authorization, content-type",
        ),
        (b"access-control-max-age", b"%d" % PREFLIGHT_SECONDS),
    ]


def _check_host(host: str | None) -> None:
    if host is None:
        return  # HTTP/1.0; a browser always sends one
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        name = ""
    if not is_loopback(name):
        raise HostRefused(
            f"host: {host[:100]!r}: without keys only localhost, 127.0.0.1 and [::1] are answered. Use "
            "one of them, or start without --no-auth."
        )


def _check_type(content_type: str | None, origin: bytes | None) -> None:
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind == "application/json" or (not kind and origin is None):
        return
    raise UnsupportedMedia(
        f"content-type: {kind[:100]!r}: without keys it must be application/json.", param="content-type"
    )
