"""`GET /v1/models` and `GET /v1/models/{id}`: OpenAI's objects, with the model's state under `tidegate`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Header, Response

from tidegate.gateway.admission import find_listed
from tidegate.gateway.answers import encode
from tidegate.gateway.auth import find_tenant
from tidegate.gateway.openapi import answer, error_responses
from tidegate.gateway.services import Services
from tidegate.messages.registry import ModelEntry


class ModelState(msgspec.Struct):
    """How the model is. `reason` and `message` say why it is not ready."""

    task: str
    engine: str
    precision: str
    quantization: str
    context_length: int
    weights_bytes: int
    revisions: dict[str, int]
    ready: bool
    accepts: bool
    reason: str
    message: str
    replicas_ready: int
    replicas_wanted: int


class ModelObject(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    tidegate: ModelState


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[ModelObject]


def routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["models"])

    def require_key(authorization: str | None) -> None:
        find_tenant(authorization, services.keys, no_auth=services.settings.no_auth)

    @router.get(
        "/v1/models",
        operation_id="list_models",
        summary="All models",
        response_model=None,
        responses={200: answer("ModelList", "All models, by name"), **error_responses((401, 500))},
    )
    async def list_models(
        authorization: Annotated[str | None, Header(include_in_schema=False)] = None,
    ) -> Response:
        require_key(authorization)
        models = services.registry.models()
        listed = ModelList("list", [model_object(models[name]) for name in sorted(models)])
        return Response(encode(listed), media_type="application/json")

    @router.get(
        "/v1/models/{model_id:path}",
        operation_id="get_model",
        summary="One model",
        response_model=None,
        responses={200: answer("ModelObject", "The model"), **error_responses((401, 404, 500))},
    )
    async def get_model(
        model_id: str, authorization: Annotated[str | None, Header(include_in_schema=False)] = None
    ) -> Response:
        require_key(authorization)
        entry = find_listed(model_id, services.registry.models())
        return Response(encode(model_object(entry)), media_type="application/json")

    return router


def model_object(entry: ModelEntry) -> ModelObject:
    state = ModelState(
        task=entry.task,
        engine=entry.engine,
        precision=entry.precision,
        quantization=entry.quantization,
        context_length=entry.context_length,
        weights_bytes=entry.weights_bytes,
        revisions=entry.revisions,
        ready=entry.ready,
        accepts=entry.accepts,
        reason=entry.reason,
        message=entry.message,
        replicas_ready=entry.replicas_ready,
        replicas_wanted=entry.replicas_wanted,
    )
    return ModelObject(entry.name, "model", entry.created, "tidegate", state)
