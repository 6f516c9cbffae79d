"""`/livez`, `/readyz`, `/metrics` and `/`: open to anyone who reaches the address."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from tidegate import __version__
from tidegate.errors import RequestError
from tidegate.gateway.answers import encode
from tidegate.gateway.openapi import answer, text_answer
from tidegate.gateway.services import Services


class Liveness(msgspec.Struct):
    status: Literal["ok"]


class Missing(msgspec.Struct):
    """One thing that keeps the gateway from serving."""

    what: str
    message: str


class Readiness(msgspec.Struct):
    ready: bool
    missing: list[Missing]


class Welcome(msgspec.Struct):
    name: str
    version: str
    docs: str


def routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get(
        "/livez",
        operation_id="livez",
        summary="Whether the process runs",
        response_model=None,
        responses={200: answer("Liveness", "It runs")},
    )
    async def livez() -> Response:
        return _json(200, Liveness("ok"))

    @router.get(
        "/readyz",
        operation_id="readyz",
        summary="Whether requests can be served, and what is missing",
        response_model=None,
        responses={
            200: answer("Readiness", "Ready"),
            503: answer("Readiness", "Not ready: `missing` says why"),
        },
    )
    async def readyz() -> Response:
        missing = await _missing(services)
        return _json(503 if missing else 200, Readiness(not missing, missing))

    @router.get(
        "/metrics",
        operation_id="metrics",
        summary="Prometheus metrics",
        response_model=None,
        response_class=Response,
        responses={200: text_answer("text/plain", "Prometheus' text format")},
    )
    async def metrics() -> Response:
        await _look_at_queues(services)
        return Response(services.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    @router.get(
        "/",
        operation_id="welcome",
        summary="What answers here",
        response_model=None,
        responses={200: answer("Welcome", "Name and version")},
    )
    async def welcome() -> Response:
        return _json(200, Welcome("tidegate", __version__, "/docs"))

    return router


async def _missing(services: Services) -> list[Missing]:
    """No model is fine: the gateway then answers 404 and names none."""
    try:
        await services.queue.ping()
    except RequestError as error:
        return [Missing("redis", error.message)]
    return []


async def _look_at_queues(services: Services) -> None:
    """Refresh the gauges that are read from the queue, at scrape time only."""
    metrics = services.metrics
    metrics.waiting.clear()
    metrics.running.clear()
    metrics.replicas.clear()
    entries = services.registry.models().values()
    for entry in entries:
        metrics.replicas.labels(entry.name, "ready").set(entry.replicas_ready)
        metrics.replicas.labels(entry.name, "wanted").set(entry.replicas_wanted)
    queues = [(entry.name, revision) for entry in entries for revision in entry.revisions]
    depths = await asyncio.gather(
        *(services.queue.depth(model, revision) for model, revision in queues), return_exceptions=True
    )
    for (model, revision), depth in zip(queues, depths, strict=True):
        if isinstance(depth, BaseException):
            continue  # Redis is away: the gauges are absent, the counters are still worth having
        metrics.waiting.labels(model, revision).set(depth.waiting)
        metrics.running.labels(model, revision).set(depth.running)


def _json(status: int, body: msgspec.Struct) -> Response:
    return Response(encode(body), status, media_type="application/json")
