"""An API server of a few lines, for tests of listings and watches. It keeps objects and what changed, and can
be told to behave badly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from kubernetes.aio.client.configuration import Configuration

from tests.unit.operator.bodies import model_body
from tidegate_operator.cluster import Cluster

Body = dict[str, Any]
Key = tuple[str, str]  # (plural, namespace)


class HttpApiServer:
    """Use `listening`. `asked` are the queries of every listing and watch, in order."""

    def __init__(self) -> None:
        self.version = 100
        self.objects: dict[Key, dict[str, Body]] = {}
        self.changes: list[tuple[int, Key, str, Body]] = []
        self.compacted_at = 0  # a watch from an older version is told that it is gone
        self.refused: dict[Key, int] = {}  # the status of every answer
        self.is_silent = False  # watches bring nothing
        self.page_faults = 0  # further pages of a listing that are told to be gone
        self.asked: list[tuple[Key, Mapping[str, str]]] = []
        self.port = 0
        self._watches: list[_Watch] = []

    # What tests do -----------------------------------------------------------------------------------------

    def put(self, plural: str, name: str, namespace: str = "models", **changes: Any) -> Body:
        objects = self.objects.setdefault((plural, namespace), {})
        self.version += 1
        change = "MODIFIED" if name in objects else "ADDED"
        objects[name] = model_body(name, namespace, resourceVersion=str(self.version), **changes)
        self._tell((plural, namespace), change, objects[name])
        return objects[name]

    def delete(self, plural: str, name: str, namespace: str = "models") -> None:
        body = self.objects[(plural, namespace)].pop(name)
        self.version += 1
        body = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        self._tell((plural, namespace), "DELETED", body)

    def bookmark(self, plural: str, namespace: str = "models") -> None:
        """Tell the watches the version of now, without an object."""
        body = {"kind": "Model", "metadata": {"resourceVersion": str(self.version)}}
        for watch in self._watches_of((plural, namespace)):
            watch.lines.put_nowait(_event("BOOKMARK", body))

    def compact(self) -> None:
        """Forget all changes up to now."""
        self.version += 1
        self.compacted_at = self.version
        self.changes.clear()

    def end(self, last: bytes = b"") -> None:
        """End every watch, as the API server does after some minutes; `last` is written first."""
        for watch in self._watches:
            watch.lines.put_nowait(last)
            watch.lines.put_nowait(None)

    def cut(self) -> None:
        """Break the connection of every watch, as a machine that goes away does."""
        for watch in self._watches:
            if watch.request.transport is not None:
                watch.request.transport.abort()

    def queries(self, plural: str, namespace: str = "models", *, watch: bool) -> list[Mapping[str, str]]:
        return [
            query for key, query in self.asked if key == (plural, namespace) and ("watch" in query) == watch
        ]

    def is_watched(self, plural: str, namespace: str = "models") -> bool:
        return bool(self._watches_of((plural, namespace)))

    # What the operator asks --------------------------------------------------------------------------------

    async def answer(self, request: web.Request) -> web.StreamResponse:
        key = (request.match_info["plural"], request.match_info["namespace"])
        self.asked.append((key, dict(request.query)))
        if (status := self.refused.get(key)) is not None:
            return web.Response(status=status, body=_status(status), content_type="application/json")
        if "watch" in request.query:
            return await self._watch(key, request)
        return self._list(key, request)

    def _list(self, key: Key, request: web.Request) -> web.Response:
        start, limit = int(request.query.get("continue", 0)), int(request.query["limit"])
        if start and self.page_faults:
            self.page_faults -= 1
            return web.Response(status=410, body=_status(410), content_type="application/json")
        found = list(self.objects.get(key, {}).values())
        metadata = {"resourceVersion": str(self.version)}
        if start + limit < len(found):
            metadata["continue"] = str(start + limit)
        items = found[start : start + limit]
        return web.json_response(
            {"apiVersion": "tidegate.dev/v1alpha1", "metadata": metadata, "items": items}
        )

    async def _watch(self, key: Key, request: web.Request) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if version < self.compacted_at:
            await response.write(b'{"type":"ERROR","object":' + _status(410) + b"}\n")
            return response
        watch = _Watch(key, request, asyncio.Queue())
        for at, changed, change, body in self.changes:
            if at > version and changed == key:
                watch.lines.put_nowait(_event(change, body))
        self._watches.append(watch)
        try:
            while (line := await watch.lines.get()) is not None:
                if not self.is_silent:
                    await response.write(line)
        finally:
            self._watches.remove(watch)
        return response

    def _tell(self, key: Key, change: str, body: Body) -> None:
        self.changes.append((self.version, key, change, body))
        for watch in self._watches_of(key):
            watch.lines.put_nowait(_event(change, body))

    def _watches_of(self, key: Key) -> list[_Watch]:
        return [watch for watch in self._watches if watch.key == key]


@dataclass(eq=False)
class _Watch:
    key: Key
    request: web.Request
    lines: asyncio.Queue[bytes | None]


@asynccontextmanager
async def listening(server: HttpApiServer) -> AsyncIterator[None]:
    """Serve on the port that it had before, if it had one."""
    app = web.Application()
    app.router.add_get("/{root:.*}/namespaces/{namespace}/{plural}", server.answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", server.port, reuse_address=True).start()
        server.port = int(runner.addresses[0][1])
        yield
    finally:
        server.cut()
        await runner.cleanup()


@asynccontextmanager
async def connected(server: HttpApiServer) -> AsyncIterator[Cluster]:
    settings = Configuration(host=f"http://127.0.0.1:{server.port}")
    async with Cluster(settings, lambda *_: None) as cluster:
        yield cluster


def _status(code: int) -> bytes:
    return json.dumps({"kind": "Status", "code": code, "message": f"the answer is {code}"}).encode()


def _event(change: str, body: Body) -> bytes:
    return json.dumps({"type": change, "object": body}).encode() + b"\n"
