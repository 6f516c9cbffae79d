"""The OpenAPI document: FastAPI's for the routes, msgspec's for the bodies."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi

from tidegate import __version__
from tidegate.control_api import views
from tidegate.gateway.bodies import REFERENCE, reference
from tidegate.gateway.dialects.wire import ErrorBody
from tidegate.messages.administration import Usage
from tidegate.messages.registry import Key

_STRUCTS: tuple[type, ...] = (
    *(
        kind
        for kind in vars(views).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind is not views.Body
    ),
    ErrorBody,
    Key,
    Usage,
)
_REFUSALS = {
    400: "A field is wrong; the error names it in `param`",
    401: "The key is missing, wrong or revoked",
    403: "The key lacks the scope that is needed",
    404: "There is none of this name",
    409: "It was changed meanwhile, or cannot be done now",
    413: "The body is too large",
    429: "Sign-ins from this address failed too often",
    500: "The control API failed",
    503: "What the host asks does not answer",
}


def described(
    answer: type,
    *refusals: int,
    takes: type[views.Body] | None = None,
    status: int = 200,
    or_plan: bool = False,
) -> dict[str, Any]:
    """Return FastAPI's arguments of a route that answers with `answer` (with a dry run: `PlanView`), takes a
    body, and may refuse with these statuses beside those of every route."""
    shown: dict[int, tuple[str, list[type]]] = {status: ("Done", [answer])}
    if or_plan:
        shown[200] = ("The plan", [*(shown[200][1] if status == 200 else []), views.PlanView])
    codes = sorted({401, 403, 429, 500, 503, *refusals, *((400, 413) if takes is not None else ())})
    return {
        "status_code": status,
        "response_class": Response,
        "responses": {
            **{code: {"description": text, **_content(*kinds)} for code, (text, kinds) in shown.items()},
            **{code: {"description": _REFUSALS[code], **_content(ErrorBody)} for code in codes},
        },
        "openapi_extra": {"requestBody": {"required": True, **_content(takes)}}
        if takes is not None
        else None,
    }


def build_document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=__version__,
        description="Models, rollouts and keys of a Tidegate platform.",
        routes=app.routes,
    )
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # a wrong parameter is a 400
    _, components = msgspec.json.schema_components(
        _STRUCTS, schema_hook=lambda _: {"description": "Any value"}, ref_template=REFERENCE
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update(components)
    return document


def _content(*kinds: type) -> dict[str, Any]:
    schemas = [reference(kind.__name__) for kind in kinds]
    return {
        "content": {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
    }
