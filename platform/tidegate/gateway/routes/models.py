"""`GET /v1/models` and `GET /v1/models/{id}`: OpenAI's objects, with the model's state under `tidegate`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict

from tidegate.gateway.admission import find_listed
from tidegate.gateway.auth import KnownKey
from tidegate.gateway.openapi import error_responses
from tidegate.gateway.services import Services
from tidegate.messages.registry import ModelEntry


class ModelState(BaseModel):
    """The state of the model. `reason` and `message` say why it is not ready."""

    model_config = ConfigDict(from_attributes=True)

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


class ModelObject(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    # vLLM's: benchmarks ask for the one, and size their prompts by the other.
    root: str
    max_model_len: int | None
    tidegate: ModelState


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelObject]


def routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["models"], dependencies=[Depends(KnownKey(services.keys, services.settings))])

    @router.get(
        "/v1/models",
        operation_id="list_models",
        summary="All models",
        response_description="All models, by name",
        responses=error_responses(401, 403, 500),
    )
    async def list_models() -> ModelList:
        models = services.registry.models()
        return ModelList(object="list", data=[_model_object(models[name]) for name in sorted(models)])

    @router.get(
        "/v1/models/{model_id:path}",
        operation_id="get_model",
        summary="One model",
        response_description="The model",
        responses=error_responses(401, 403, 404, 500),
    )
    async def get_model(model_id: str) -> ModelObject:
        return _model_object(find_listed(model_id, services.registry.models()))

    return router


def _model_object(entry: ModelEntry) -> ModelObject:
    state = ModelState.model_validate(entry)
    return ModelObject(
        id=entry.name,
        object="model",
        created=entry.created,
        owned_by="tidegate",
        root=entry.name,
        max_model_len=entry.context_length or None,
        tidegate=state,
    )
