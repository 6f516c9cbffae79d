"""The OpenAPI document: FastAPI's for its routes, the dialects' own parts for theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tidegate import __version__
from tidegate.gateway.bodies import REFERENCE, describe
from tidegate.gateway.dialects.base import Dialect
from tidegate.gateway.dialects.wire import OPENAI, Wire

_RETRY_AFTER = {"schema": {"type": "integer"}, "description": "Seconds, 1 to 120", "required": False}
_REQUEST_ID = {
    "schema": {"type": "string"},
    "description": "The request's id, also in the log",
    "required": True,
}
_DESCRIPTIONS = {
    400: "A field is wrong; the error names it in `param`",
    401: "The key is missing, wrong or revoked",
    403: "The key lacks the scope inference",
    404: "The model does not exist",
    408: "The body did not come in time",
    413: "The body is too large, or its prompts times its sequences are",
    415: "The body's encoding is neither gzip nor none",
    429: "The queue is full, or the wait would be too long",
    500: "Generation failed",
    503: "The model or the queue is not available now",
    504: "The request waited past its deadline",
}
_WAIT_HEADER = {
    "name": "x-tidegate-max-wait-seconds",
    "in": "header",
    "required": False,
    "description": "The longest that the request may wait; can only lower the bound of the model.",
    "schema": {"type": "number", "minimum": 1},
}
_SESSION_HEADER = {
    "name": "x-tidegate-session",
    "in": "header",
    "required": False,
    "description": "While a model changes, calls with the same one go to one revision; left out: `user`.",
    "schema": {"type": "string"},
}


def error_responses(*statuses: int, wire: Wire = OPENAI) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": _DESCRIPTIONS[status], "content": _json(wire.error_body)}
        | ({"headers": {"retry-after": _RETRY_AFTER}} if status in (429, 503) else {})
        for status in statuses
    }


def build_document(app: FastAPI, dialects: Sequence[Dialect]) -> dict[str, Any]:
    document = get_openapi(
        title="Tidegate",
        version=__version__,
        description="Language models behind one OpenAI-compatible address.",
        routes=app.routes,
    )
    routes = document["paths"]
    document["paths"] = {
        dialect.path: {"post": _generation(dialect), **routes.pop(dialect.path, {})} for dialect in dialects
    } | routes
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # no parameter of FastAPI's routes can be wrong
            for response in operation["responses"].values():
                response["headers"] = {"x-request-id": _REQUEST_ID, **response.get("headers", {})}
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update(_components(dialects))
    return document


def _components(dialects: Sequence[Dialect]) -> dict[str, Any]:
    structs = [s for dialect in dialects for s in (dialect.body, dialect.answer, dialect.wire.error_body)]
    _, components = msgspec.json.schema_components(structs, ref_template=REFERENCE)
    for dialect in dialects:
        describe(dialect.body, components)
    return components


def _generation(dialect: Dialect) -> dict[str, Any]:
    # No schema for events, because one would describe JSON bodies.
    answer = _json(dialect.answer) | ({dialect.wire.media_type: {}} if dialect.may_stream else {})
    statuses = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
    responses = error_responses(*statuses, wire=dialect.wire)
    responses[200] = {"description": dialect.answer_description, "content": answer}
    return {
        "tags": ["generation"],
        "summary": dialect.summary,
        "operationId": dialect.operation_id,
        "requestBody": {"required": True, "content": _json(dialect.body)},
        "parameters": [_WAIT_HEADER, _SESSION_HEADER],
        "responses": {str(status): response for status, response in sorted(responses.items())},
        "security": [{"bearer": []}],
    }


def _json(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REFERENCE)
    return {"application/json": {"schema": schema}}
