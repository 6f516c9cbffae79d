"""`/livez`, `/health`, `/version`, `/readyz`, `/metrics`, `/metrics/engines` and `/`: open to anyone who
reaches the address."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from tidegate import __version__
from tidegate.errors import QueueUnavailable
from tidegate.gateway.services import Services
from tidegate.messages.engine_metrics import exposition

T = TypeVar("T")


class Liveness(BaseModel):
    status: Literal["ok"]


class Trouble(BaseModel):
    """One thing that is not as it should be."""

    what: str
    message: str


class Readiness(BaseModel):
    """`missing` keeps the gateway from serving, `notes` do not."""

    ready: bool
    missing: list[Trouble]
    notes: list[Trouble]


class Version(BaseModel):
    version: str


class Welcome(BaseModel):
    name: str
    version: str
    docs: str


def routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["health"])
    # Nobody needs a key for them, so all who ask at once cost as much as one.
    read_queues = shared(lambda: _read_queues(services))
    read_engines = shared(lambda: _read_engines(services))

    @router.get(
        "/livez",
        operation_id="livez",
        summary="Whether the process runs",
        response_description="It runs",
    )
    async def livez() -> Liveness:
        return Liveness(status="ok")

    @router.get(
        "/health",
        operation_id="health",
        summary="The same under vLLM's name",
        response_description="It runs",
    )
    async def health() -> Liveness:
        return Liveness(status="ok")

    @router.get(
        "/version",
        operation_id="version",
        summary="Tidegate's version",
        response_description="The version",
    )
    async def version() -> Version:
        return Version(version=__version__)

    @router.get(
        "/readyz",
        operation_id="readyz",
        summary="Whether requests can be served, and what is missing",
        response_description="Ready",
        responses={503: {"model": Readiness, "description": "Not ready: `missing` says why"}},
    )
    async def readyz(response: Response) -> Readiness:
        health = await services.queue.health()  # no model is fine: the gateway then answers 404
        troubles = [Trouble(what=what, message=message) for what, message in health.troubles().items()]
        missing = [] if health.takes_requests else troubles[:1]
        response.status_code = 503 if missing else 200
        return Readiness(ready=not missing, missing=missing, notes=troubles[len(missing) :])

    @router.get(
        "/metrics",
        operation_id="metrics",
        summary="Prometheus metrics",
        response_class=PlainTextResponse,
        response_description="Prometheus' text format",
    )
    async def metrics() -> Response:
        await read_queues()
        return Response(services.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    @router.get(
        "/metrics/engines",
        operation_id="engine_metrics",
        summary="Prometheus metrics that engines keep under names of their own",
        response_class=PlainTextResponse,
        response_description="Prometheus' text format",
    )
    async def engine_metrics() -> Response:
        return Response(await read_engines(), headers={"content-type": CONTENT_TYPE_LATEST})

    @router.get(
        "/",
        operation_id="welcome",
        summary="What answers here",
        response_description="Name and version",
    )
    async def welcome() -> Welcome:
        return Welcome(name="tidegate", version=__version__, docs="/docs")

    return router


def shared(work: Callable[[], Coroutine[Any, Any, T]]) -> Callable[[], Awaitable[T]]:
    """Return what does `work` once for all who ask while it runs, also where some of them leave."""
    running: asyncio.Task[T] | None = None

    async def run() -> T:
        nonlocal running
        if running is None or running.done():
            running = asyncio.get_running_loop().create_task(work())
        return await asyncio.shield(running)

    return run


async def _read_engines(services: Services) -> str:
    """Return what engines told; nothing while Redis is away, as with the gauges of queues."""
    try:
        # In a thread: hundreds of replicas tell megabytes.
        return await asyncio.to_thread(exposition, await services.registry.engine_metrics())
    except QueueUnavailable:
        return ""


async def _read_queues(services: Services) -> None:
    """Refresh the gauges that are read from the queue, at scrape time only."""
    metrics = services.metrics
    metrics.queue_health(await services.queue.health())
    metrics.clear_queues()
    metrics.replicas.clear()
    entries = services.registry.models().values()
    for entry in entries:
        metrics.replicas.labels(entry.name, "ready").set(entry.replicas_ready)
        metrics.replicas.labels(entry.name, "wanted").set(entry.replicas_wanted)
    queues = [
        (entry.name, revision)
        for entry in entries
        for revision in dict.fromkeys((*entry.revisions, entry.shadow))
        if revision
    ]
    metrics.keep_revisions(queues)
    depths = await asyncio.gather(
        *(services.queue.depth(model, revision) for model, revision in queues), return_exceptions=True
    )
    for (model, revision), depth in zip(queues, depths, strict=True):
        if isinstance(depth, BaseException):
            continue  # Redis is away: the gauges are absent, the counters are still worth having
        metrics.queue(model, revision, waiting=depth.waiting, running=depth.running)
