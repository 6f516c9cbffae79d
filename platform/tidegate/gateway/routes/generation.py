"""`POST /v1/chat/completions` and `POST /v1/completions`.

FastAPI knows the routes for its document and its 405s; calls run in `GenerationEndpoint`, which the
middleware `HotRoutes` reaches without route matching.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter

from tidegate.gateway.asgi import ASGIApp
from tidegate.gateway.generation import GenerationEndpoint
from tidegate.gateway.openapi import answer, error_responses, request_body
from tidegate.gateway.services import Services

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# Events of `data: {...}` with `id`s, then `data: [DONE]`; no schema, because one would describe JSON bodies.
_STREAM: dict[str, dict[str, object]] = {"text/event-stream": {}}
_WAIT_HEADER = {
    "name": "x-tidegate-max-wait-seconds",
    "in": "header",
    "required": False,
    "description": "The longest that the request may wait; can only lower the bound of the model.",
    "schema": {"type": "number", "minimum": 1},
}
_REFUSALS = (400, 401, 404, 413, 429, 500, 503, 504)


def hot_routes(services: Services) -> Mapping[str, ASGIApp]:
    return {
        CHAT: GenerationEndpoint("chat", services),
        COMPLETIONS: GenerationEndpoint("completion", services),
    }


def routes() -> APIRouter:
    """The documented routes; `HotRoutes` answers before they are matched."""
    router = APIRouter(tags=["generation"])
    router.add_api_route(
        CHAT,
        _answered_by_hot_routes,
        methods=["POST"],
        operation_id="create_chat_completion",
        summary="Answer a conversation",
        response_model=None,
        responses={
            200: answer("ChatCompletion", "The answer, or its events where stream is true", _STREAM),
            **error_responses(_REFUSALS),
        },
        openapi_extra={"requestBody": request_body("ChatBody"), "parameters": [_WAIT_HEADER]},
    )
    router.add_api_route(
        COMPLETIONS,
        _answered_by_hot_routes,
        methods=["POST"],
        operation_id="create_completion",
        summary="Continue a text",
        response_model=None,
        responses={
            200: answer("Completion", "The continuation, or its events where stream is true", _STREAM),
            **error_responses(_REFUSALS),
        },
        openapi_extra={"requestBody": request_body("CompletionBody"), "parameters": [_WAIT_HEADER]},
    )
    return router


async def _answered_by_hot_routes() -> None:
    raise AssertionError("HotRoutes answers this route")
