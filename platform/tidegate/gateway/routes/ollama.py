"""`GET /api/tags`, `/api/ps` and `/api/version`, `POST /api/show`: what Ollama's clients ask of models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar

import msgspec
from fastapi import APIRouter, Depends, Request
from msgspec import Meta
from pydantic import BaseModel

from tidegate.gateway.admission import find_listed
from tidegate.gateway.asgi import read_body
from tidegate.gateway.auth import KnownKey
from tidegate.gateway.bodies import REFERENCE, UNREAD, BodyReader, RequestBody, Rule, describe, refusal, says
from tidegate.gateway.dialects.ollama import LATEST, OLLAMA
from tidegate.gateway.intake import SMALL_BYTES
from tidegate.gateway.openapi import error_responses
from tidegate.gateway.services import Services
from tidegate.messages.registry import ModelEntry

SPOKEN = "0.12.6"  # the version of Ollama whose API this is: some clients ask for one that is new enough
# By task. Whether a model calls tools says its chat template, which only its replicas know.
_CAPABILITIES: dict[str, list[str]] = {"embed": ["embedding"], "score": [], "classify": []}
_IN_USE_UNTIL = "9999-12-31T00:00:00Z"


_ModelName = Annotated[
    Annotated[str, Meta(min_length=1, max_length=256)] | None,
    says("the name of a model that GET /api/tags lists"),
]


def _named(field: str) -> dict[str, Any]:
    return {"required": [field], "properties": {field: {"type": "string"}}}


def _check_named(body: ShowBody) -> None:
    if not (body.model or body.name):
        raise refusal("model", None, "send the name of a model that GET /api/tags lists")


class ShowBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """`name` is the older name of `model`."""

    RULES: ClassVar[tuple[Rule, ...]] = (Rule(_check_named, {"anyOf": [_named("model"), _named("name")]}),)

    model: _ModelName = None
    name: _ModelName = None
    verbose: Annotated[Any, UNREAD] = None
    system: Annotated[Any, UNREAD] = None
    template: Annotated[Any, UNREAD] = None
    options: Annotated[Any, UNREAD] = None


class Details(BaseModel):
    parent_model: str = ""
    format: str = "safetensors"
    family: str
    families: list[str]
    parameter_size: str = ""
    quantization_level: str


class Tag(BaseModel):
    """`digest` is the revision that most requests go to, `size` the bytes of its weights."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(BaseModel):
    models: list[Tag]


class Running(Tag):
    """A model with a replica. It leaves when its own scaling says so, and not at a time that is known."""

    expires_at: str = _IN_USE_UNTIL
    size_vram: int
    context_length: int


class RunningModels(BaseModel):
    models: list[Running]


class Shown(BaseModel):
    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    modified_at: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]


class OllamaVersion(BaseModel):
    version: str


def routes(services: Services) -> APIRouter:
    known = [Depends(KnownKey(services.keys, services.settings))]
    router = APIRouter(tags=["models"])
    reader = BodyReader(ShowBody)

    def listed() -> list[ModelEntry]:
        models = services.registry.models()
        return [models[name] for name in sorted(models)]

    @router.get(
        "/api/tags",
        operation_id="ollama_tags",
        summary="All models, as Ollama",
        response_description="All models, by name",
        responses=error_responses(401, 403, 500, wire=OLLAMA),
        dependencies=known,
    )
    async def tags() -> Tags:
        return Tags(models=[Tag(**_tag(entry)) for entry in listed()])

    @router.get(
        "/api/ps",
        operation_id="ollama_ps",
        summary="The models that have replicas, as Ollama",
        response_description="The models, by name",
        responses=error_responses(401, 403, 500, wire=OLLAMA),
        dependencies=known,
    )
    async def running() -> RunningModels:
        return RunningModels(
            models=[
                Running(**_tag(entry), size_vram=entry.weights_bytes, context_length=entry.context_length)
                for entry in listed()
                if entry.replicas_ready
            ]
        )

    @router.post(
        "/api/show",
        operation_id="ollama_show",
        summary="One model, as Ollama",
        response_description="The model",
        responses=error_responses(400, 401, 403, 404, 408, 413, 415, 500, wire=OLLAMA),
        dependencies=known,
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": _show_schema()}}}
        },
    )
    async def show(request: Request) -> Shown:
        most = min(SMALL_BYTES, services.settings.max_body_bytes)  # so it need not be counted
        raw = await read_body(request.scope, request.receive, most)
        body = reader.read(raw)
        name = (body.model or body.name or "").removesuffix(LATEST)
        entry = find_listed(name, services.registry.models())
        tag = _tag(entry)
        family = tag["details"].family
        return Shown(
            modified_at=tag["modified_at"],
            details=tag["details"],
            model_info={"general.architecture": family, f"{family}.context_length": entry.context_length},
            capabilities=_CAPABILITIES.get(entry.task, ["completion", "tools"]),
        )

    @router.get(
        "/api/version",
        operation_id="ollama_version",
        summary="The version of Ollama's API",
        response_description="The version",
    )
    async def version() -> OllamaVersion:
        return OllamaVersion(version=SPOKEN)

    return router


def _tag(entry: ModelEntry) -> dict[str, Any]:
    family = entry.engine
    level = entry.precision if entry.quantization == "none" else entry.quantization
    return {
        "name": entry.name,
        "model": entry.name,
        "modified_at": datetime.fromtimestamp(entry.created, UTC).isoformat().replace("+00:00", "Z"),
        "size": entry.weights_bytes,
        "digest": max(entry.revisions, key=lambda revision: entry.revisions[revision], default=""),
        "details": Details(family=family, families=[family], quantization_level=level),
    }


def _show_schema() -> dict[str, Any]:
    _, components = msgspec.json.schema_components([ShowBody], ref_template=REFERENCE)
    describe(ShowBody, components)
    schema: dict[str, Any] = components["ShowBody"]
    return schema
