"""`GET /info`: what text-generation-inference says of its model."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from tidegate import __version__
from tidegate.gateway.admission import find_listed
from tidegate.gateway.asgi import DEPLOYMENT
from tidegate.gateway.auth import KnownKey
from tidegate.gateway.dialects.generate import MOST_STOPS
from tidegate.gateway.dialects.tgi import TGI
from tidegate.gateway.openapi import error_responses
from tidegate.gateway.services import Services


class Info(BaseModel):
    model_id: str
    model_sha: str | None
    model_dtype: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    router: str
    version: str


def routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["models"], dependencies=[Depends(KnownKey(services.keys, services.settings))])

    @router.get(
        "/info",
        operation_id="info",
        summary="The only model, or the one that the path /models/{name}/info names, as TGI",
        response_description="The model",
        responses=error_responses(401, 403, 404, 500, wire=TGI),
    )
    async def info(request: Request) -> Info:
        entry = find_listed(request.scope.get(DEPLOYMENT, ""), services.registry.models())
        return Info(
            model_id=entry.name,
            model_sha=next(iter(entry.revisions), None),
            model_dtype=entry.precision,
            model_pipeline_tag="text-generation",
            max_concurrent_requests=entry.limits.max_requests,
            max_best_of=1,
            max_stop_sequences=MOST_STOPS,
            max_input_tokens=max(0, entry.context_length - 1),
            max_total_tokens=entry.context_length,
            router="tidegate",
            version=__version__,
        )

    return router
