"""The OpenAPI document. Schemas come from the msgspec structs that decode and encode the bodies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tidegate import __version__
from tidegate.gateway.schema import HINTS, NOT_HONOURED, ChatBody, CompletionBody

REF = "#/components/schemas/{name}"
_RETRY_AFTER = {"schema": {"type": "integer"}, "description": "Seconds, 1 to 120", "required": False}
_REQUEST_ID = {
    "schema": {"type": "string"},
    "description": "The request's id, also in the log",
    "required": True,
}
_DESCRIPTIONS = {
    400: "A field is wrong; the error names it in `param`",
    401: "The key is missing, wrong or revoked",
    404: "The model does not exist",
    413: "The body is too large",
    429: "The queue is full, or the wait would be too long",
    500: "Generation failed",
    503: "The model or the queue is not available now",
    504: "The request waited past its deadline",
}
_OPEN_ROUTES = ("/livez", "/readyz", "/metrics", "/")


def reference(name: str) -> dict[str, Any]:
    return {"$ref": REF.format(name=name)}


def request_body(name: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": reference(name)}}}


def answer(name: str, description: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A documented answer with a JSON body; `more`: further content types."""
    return {
        "description": description,
        "headers": {"x-request-id": _REQUEST_ID},
        "content": {"application/json": {"schema": reference(name)}, **(more or {})},
    }


def text_answer(content_type: str, description: str) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {"x-request-id": _REQUEST_ID},
        "content": {content_type: {"schema": {"type": "string"}}},
    }


def error_responses(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    responses: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        responses[status] = answer("ErrorBody", _DESCRIPTIONS[status])
        if status in (429, 503):
            responses[status]["headers"] = {"x-request-id": _REQUEST_ID, "retry-after": _RETRY_AFTER}
    return responses


def build_document(app: FastAPI, structs: Iterable[type[msgspec.Struct]]) -> dict[str, Any]:
    """The whole document: FastAPI's paths, the structs' schemas."""
    document = get_openapi(
        title="Tidegate",
        version=__version__,
        description="Language models behind one OpenAI-compatible address.",
        routes=app.routes,
    )
    _, components = msgspec.json.schema_components(structs, ref_template=REF.format(name="{name}"))
    _describe_bodies(components)
    document["components"] = {
        "schemas": components,
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{"bearer": []}]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # FastAPI's own validation is not used
            if path in _OPEN_ROUTES:
                operation["security"] = []
    return document


def _describe_bodies(components: dict[str, Any]) -> None:
    for body in (ChatBody.__name__, CompletionBody.__name__):
        properties = components[body]["properties"]
        for name, schema in properties.items():
            if name in NOT_HONOURED:
                rule = NOT_HONOURED[name]
                properties[name] = {
                    "enum": [None, *rule.same_as_absent],
                    "description": f"Not honoured: {rule.remedy}. Other values are refused.",
                }
            elif name in HINTS:
                schema["description"] = HINTS[name]
    _only_text(components)
    chat = components[ChatBody.__name__]
    chat["allOf"] = [_STREAM_OPTIONS_RULE, _TOP_LOGPROBS_RULE, _MAX_TOKENS_RULE]
    completion = components[CompletionBody.__name__]
    completion["allOf"] = [_STREAM_OPTIONS_RULE, _ECHO_RULE]
    token_ids = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1},
    }
    completion["properties"]["prompt"] = {
        "description": HINTS["prompt"],
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "items": {"type": "string"}},
            token_ids,
            {"type": "array", "minItems": 1, "items": token_ids},
        ],
    }


def _only_text(components: dict[str, Any]) -> None:
    """Messages as `checks` takes them: text in, no tools."""
    message = components["Message"]["properties"]
    message["role"] = {
        "enum": ["system", "developer", "user", "assistant"],
        "description": HINTS["messages.role"],
    }
    message["content"] = {
        "description": HINTS["messages.content"],
        "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": reference("ContentPart")}],
    }
    for name in ("name", "refusal", "audio", "tool_calls", "function_call", "tool_call_id"):
        message[name] = {"type": "null", "description": "Not honoured: leave it out."}
    components["Message"]["required"] = ["role", "content"]
    components["ContentPart"] = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }


def _needs(field: str, other: str, value: bool) -> dict[str, Any]:
    """`field`, where it is not null, needs `other` to be `value`."""
    return {
        "anyOf": [
            {"properties": {field: {"type": "null"}}},
            {"properties": {other: {"const": value}}, "required": [other]},
        ]
    }


_STREAM_OPTIONS_RULE = _needs("stream_options", "stream", True)
_TOP_LOGPROBS_RULE = _needs("top_logprobs", "logprobs", True)
_ECHO_RULE = {
    "anyOf": [
        {"properties": {"max_tokens": {"anyOf": [{"type": "null"}, {"minimum": 1}]}}},
        {"properties": {"echo": {"const": True}}, "required": ["echo"]},
    ]
}
# Both limits may be sent where they agree, which a schema cannot say.
_MAX_TOKENS_RULE = {
    "anyOf": [
        {"properties": {"max_tokens": {"type": "null"}}},
        {"properties": {"max_completion_tokens": {"type": "null"}}},
    ]
}
