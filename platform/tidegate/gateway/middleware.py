"""The pure ASGI layers around the router, outermost first (the list itself is in `app`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from starlette.exceptions import HTTPException

from tidegate.errors import GenerationFailed, InvalidRequest, RequestError
from tidegate.gateway.asgi import (
    REQUEST_ID,
    ASGIApp,
    ClientLeft,
    Message,
    Receive,
    Scope,
    Send,
    request_id_of,
    send_error,
)
from tidegate.gateway.dialects.wire import OPENAI, Wire
from tidegate.telemetry import request_id

logger = logging.getLogger("tidegate.gateway")


class RequestIds:
    """Gives every call an id: on the scope, on each log line written meanwhile, and on the answer. At level
    debug every call is a log line too, so that an id can be looked up."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        current = scope[REQUEST_ID] = request_id_of(scope)
        request_id.set(current)  # each call runs in a task, and so in a context, of its own
        began, status = time.monotonic(), 0

        def send_with_id(message: Message) -> object:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", current.encode())]
            return send(message)

        await self._app(scope, receive, send_with_id)  # type: ignore[arg-type]
        if logger.isEnabledFor(logging.DEBUG):
            seconds = time.monotonic() - began
            logger.debug("%s %s: %d after %.3f s", scope["method"], scope["path"], status, seconds)


class UnknownRoute(RequestError):
    """404 and 405 of the router, in OpenAI's form."""

    reason, status, type, code = "UnknownRoute", 404, "invalid_request_error", "unknown_url"


class MethodNotAllowed(RequestError):
    reason, status, type, code = "MethodNotAllowed", 405, "invalid_request_error", "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self._allow = allow

    def headers(self) -> dict[str, str]:
        return {"allow": self._allow} if self._allow else {}


class ErrorBodies:
    """Turns every exception of the routes into an error body of the path's protocol. What nobody expected
    becomes a 500 that shows nothing and a log line that shows everything. `who` fails then; `index` lists the
    routes."""

    def __init__(
        self,
        app: ASGIApp,
        who: str = "gateway",
        index: str = "/docs",
        wire_of: Callable[[str], Wire] = lambda _: OPENAI,
    ) -> None:
        self._app = app
        self._wire_of = wire_of
        self._who = who
        self._index = index

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except RequestError as error:
            await self._send(scope, send, error)
        except HTTPException as error:
            await self._send(scope, send, self._router_error(scope, error))
        except ClientLeft:
            logger.debug("the client left before its request was complete")
        except Exception:
            if scope["type"] != "http":
                raise
            logger.exception("a call failed")
            failed = GenerationFailed(f"The {self._who} failed on this request.", code="internal_error")
            await self._send(scope, send, failed)

    async def _send(self, scope: Scope, send: Send, error: RequestError) -> None:
        await send_error(send, error, self._wire_of(scope.get("path", "")).error(error))

    def _router_error(self, scope: Scope, error: HTTPException) -> RequestError:
        url, headers = f"{scope['method']} {scope['path']}", error.headers or {}
        if error.status_code == 404:
            twice = " Its /v1 is there twice: leave it out of the client's base URL."
            more = (
                twice if scope["path"].startswith("/v1/v1/") else f" GET {self._index} lists what there is."
            )
            return UnknownRoute(f"There is no {url}.{more}")
        if error.status_code == 405:
            allow = ", ".join(value for name, value in headers.items() if name.lower() == "allow")
            return MethodNotAllowed(f"There is no {url}. {allow or 'Another method'} is allowed.", allow)
        return InvalidRequest(error.detail)


class HotRoutes:
    """Answers the paths of generation, by their exact names and without route matching."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, ASGIApp]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is None:
            await self._app(scope, receive, send)
        elif scope["method"] == "POST":
            await endpoint(scope, receive, send)
        elif scope["path"] == "/":  # which answers GET too
            await self._app(scope, receive, send)
        else:
            raise HTTPException(405, headers={"allow": "POST"})
