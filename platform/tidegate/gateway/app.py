"""The FastAPI application: which layers and routes there are, and what starts and stops with it."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware

from tidegate.gateway import docs
from tidegate.gateway.asgi import DEPLOYMENT, ASGIApp, Receive, Scope, Send
from tidegate.gateway.browsers import Cors, OwnPagesOnly
from tidegate.gateway.dialects import DIALECTS, wire_of
from tidegate.gateway.dialects.responses import Responses
from tidegate.gateway.generation import Exchange, GenerationEndpoint
from tidegate.gateway.middleware import ErrorBodies, HotRoutes, RequestIds
from tidegate.gateway.openapi import build_document
from tidegate.gateway.responses import ResponseExchange
from tidegate.gateway.routes import events, health, models, ollama, responses, tgi
from tidegate.gateway.services import Services

logger = logging.getLogger("tidegate.gateway")


EXCHANGES: dict[str, type[Exchange]] = {Responses.path: ResponseExchange}


class GatewayApp(FastAPI):
    """FastAPI with exactly the layers of `layers`: its own error pages and telemetry are not among them."""

    def __init__(self, services: Services) -> None:
        super().__init__(
            title="Tidegate",
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
            lifespan=_lifespan(services),
        )
        endpoints = {
            dialect.path: GenerationEndpoint(dialect, services, EXCHANGES.get(dialect.path, Exchange))
            for dialect in DIALECTS
        }
        # Outermost first.
        self.layers = [
            Middleware(RequestIds),
            Middleware(Cors, origins=services.settings.cors_origins),
            Middleware(ErrorBodies, wire_of=wire_of),
            *([Middleware(OwnPagesOnly)] if services.settings.no_auth else []),
            Middleware(HotRoutes, endpoints=endpoints),
            Middleware(AsyncExitStackMiddleware),  # FastAPI's own routes need it
        ]
        for router in (
            module.routes(services) for module in (responses, events, models, tgi, ollama, health)
        ):
            self.include_router(router)
        self._add_documents()

    def build_middleware_stack(self) -> Any:
        app: ASGIApp = self.router
        for cls, args, kwargs in reversed(self.layers):
            app = cls(app, *args, **kwargs)
        return app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As Starlette's. FastAPI's own looks at the environment on each call, for a telemetry that the
        gateway does not use (measured: 8 µs)."""
        scope = usual(scope)
        scope["app"] = self
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        await self.middleware_stack(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = build_document(self, DIALECTS)
        return self.openapi_schema

    def _add_documents(self) -> None:
        @self.get("/openapi.json", include_in_schema=False)
        async def openapi_json() -> Response:
            return JSONResponse(self.openapi())

        @self.get("/docs", include_in_schema=False)
        async def docs_page(request: Request) -> Response:
            address = str(request.base_url).rstrip("/")
            return Response(docs.render(self.openapi(), address), media_type="text/html")


def usual(scope: Scope) -> Scope:
    """HEAD is routed as GET, a path with a slash at its end as the path without, and one that names a model,
    as Azure's and the Hugging Face Hub's do, as the one that does not. The server keeps the scope that it
    made, so it leaves the body of an answer to HEAD out."""
    if scope["type"] != "http":
        return scope
    path = scope["path"]
    changes: dict[str, Any] = {"method": "GET"} if scope["method"] == "HEAD" else {}
    if len(path) > 1 and path.endswith("/"):
        changes["path"] = path = path[:-1]
    if match := _AZURE.fullmatch(path):
        changes["path"] = "/v1/" + (match["rest"] or match["of_deployment"])
        if match["deployment"]:
            changes[DEPLOYMENT] = match["deployment"]
    elif (
        path.startswith("/models/")
        and (match := _OF_MODEL.fullmatch(path))
        and (match["rest"] or scope["method"] == "POST")  # of the paths without rest TGI has this one
    ):
        changes |= {"path": match["rest"] or "/", DEPLOYMENT: match["model"]}
    return {**scope, **changes} if changes else scope


# `/openai/v1/...`, and before that one path a deployment, which is what a model is here.
_AZURE = re.compile(
    r"/openai/(?:v1/(?P<rest>.+)|deployments/(?P<deployment>[^/]+)/(?P<of_deployment>(?:chat/)?completions|embeddings))"
)
# Where TGI's clients name a model, in front of TGI's paths and those of OpenAI: TGI itself has one model.
_OF_MODEL = re.compile(
    r"/models/(?P<model>[^/]+)(?P<rest>|/generate|/generate_stream|/info|/v1/(?:chat/)?completions)"
)


def create_app(services: Services) -> GatewayApp:
    """`services.queue` is started and closed with the application; what it connects to is its maker's."""
    return GatewayApp(services)


def _lifespan(services: Services) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.queue.start(services.calls.deliver, services.calls.lost)
        try:
            yield
        finally:
            await services.calls.shut_down()
            await services.grammars.close()
            await services.kept.close()
            await services.queue.close()

    return lifespan
