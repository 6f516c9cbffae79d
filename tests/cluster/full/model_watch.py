"""Every write to a Model or a Pool as a client sees it: when, of which object, and what it then said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.cluster.full.control_plane import NAMESPACE
from tidegate_operator.cluster import Cluster, Object
from tidegate_operator.kinds import Kind

KINDS: tuple[tuple[Kind, str], ...] = (("Model", "models"), ("Pool", "pools"))


@dataclass(frozen=True, slots=True)
class Write:
    at: float  # monotonic seconds
    kind: str
    name: str


@dataclass
class ModelWatch:
    """`writes` since `forget`; `newest` is the last version of each Model."""

    writes: list[Write] = field(default_factory=list)
    newest: dict[str, Object] = field(default_factory=dict)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    def forget(self) -> None:
        self.writes.clear()

    async def until(self, what: str, holds: Callable[[], bool], timeout: float) -> float:
        """Wait until this holds of `newest`. Returns when the write that made it true was seen."""
        try:
            async with asyncio.timeout(timeout), self._news:
                await self._news.wait_for(holds)
        except TimeoutError:
            raise AssertionError(f"not within {timeout:.0f} s: {what}") from None
        return time.monotonic()

    def condition(self, name: str, wanted: str) -> dict[str, Any]:
        conditions = self.newest.get(name, {}).get("status", {}).get("conditions", [])
        return next((item for item in conditions if item["type"] == wanted), {})

    def has_taken_in(self, name: str, generation: int) -> bool:
        status = self.newest.get(name, {}).get("status", {})
        return bool(status.get("observedGeneration", 0) >= generation)

    def is_settled(self, name: str, generation: int = 1) -> bool:
        """Ready as of this generation, with nothing under way."""
        return (
            self.has_taken_in(name, generation)
            and self.condition(name, "Ready").get("status") == "True"
            and self.condition(name, "Progressing").get("status") == "False"
        )

    async def take(self, kind: str, event: dict[str, Any]) -> None:
        at, body = time.monotonic(), event["object"]
        name = body["metadata"]["name"]
        async with self._news:
            self.writes.append(Write(at, kind, name))
            if kind == "Model" and event["type"] == "DELETED":
                self.newest.pop(name, None)
            elif kind == "Model":
                self.newest[name] = body
            self._news.notify_all()


@asynccontextmanager
async def watching(server: str, tls: ssl.SSLContext, api: Cluster) -> AsyncIterator[ModelWatch]:
    watch = ModelWatch()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=tls),
        timeout=aiohttp.ClientTimeout(total=None),
        read_bufsize=1 << 22,
    ) as session:
        tasks = []
        for kind, plural in KINDS:
            found, version = await api.list(kind, NAMESPACE)
            if kind == "Model":
                watch.newest.update({body["metadata"]["name"]: body for body in found})
            url = f"{server}/apis/tidegate.dev/v1alpha1/namespaces/{NAMESPACE}/{plural}"
            tasks.append(asyncio.create_task(_follow(session, url, version, kind, watch)))
        try:
            yield watch
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):  # because we ask for it
                    await task


async def _follow(
    session: aiohttp.ClientSession, url: str, version: int, kind: str, watch: ModelWatch
) -> None:
    """The API server ends a watch now and then, as one whose reader is slow; the next goes on from there."""
    while True:
        query = {"watch": "1", "resourceVersion": str(version)}
        async with session.get(url, params=query) as answer:
            answer.raise_for_status()
            with contextlib.suppress(aiohttp.ClientPayloadError, json.JSONDecodeError):  # within a line
                async for line in answer.content:
                    event = json.loads(line)
                    version = int(event["object"]["metadata"]["resourceVersion"])
                    await watch.take(kind, event)
