"""Ray Serve's REST API without Ray, for tests of the control plane: `FakeServe` behind HTTP.

Answers for any number of Ray clusters under `/{cluster}/api/serve/applications/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from tests.contract.hosts.fake_serve import FakeServe, Faults
from tidegate.errors import QueueUnavailable
from tidegate.serve_api import ServeRejected, ServeUnavailable
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry

BEAT_SECONDS = 1.0


class SimulatedServe(Faults):
    """Use `simulated_serve`."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self._registry = registry
        self._serves: dict[str, FakeServe] = {}
        self.away_by_default = False  # whether the heads of clusters that hold nothing yet do not answer
        self.url = ""

    @property
    def puts(self) -> Mapping[str, list[list[str]]]:
        """The names of applications of every PUT, by cluster."""
        return {name: serve.puts for name, serve in self._serves.items() if serve.puts}

    def standing(self, cluster: str) -> list[str]:
        return sorted(self._serve(cluster).configs)

    def application(self, cluster: str, name: str) -> Mapping[str, Any]:
        return self._serve(cluster).configs[name]

    def lose_state(self, cluster: str) -> None:
        """As a head without fault tolerance that was killed."""
        self._serve(cluster).configs = {}

    async def get(self, request: web.Request) -> web.Response:
        serve = self._serve(request.match_info["cluster"])
        try:
            await serve.get()
        except ServeUnavailable as error:
            return web.Response(status=503, text=error.message)
        return web.json_response(serve.body())

    async def put(self, request: web.Request) -> web.Response:
        serve = self._serve(request.match_info["cluster"])
        try:
            await serve.put(await request.json())
        except ServeUnavailable as error:
            return web.Response(status=503, text=error.message)
        except ServeRejected as error:
            return web.Response(status=400, text=error.message)
        return web.Response(text="ok")

    async def beat(self) -> None:
        """All replicas of all clusters say that they live."""
        await asyncio.gather(*(serve.beat() for serve in self._serves.values()))

    def _serve(self, cluster: str) -> FakeServe:
        serve = self._serves.get(cluster)
        if serve is None:
            serve = self._serves[cluster] = FakeServe(self._registry, self, time.time, cluster)
        serve.is_away = self.away_by_default and not serve.puts
        return serve


@asynccontextmanager
async def simulated_serve(redis_url: str, key_prefix: str) -> AsyncIterator[SimulatedServe]:
    async with Connection(redis_url, name="simulated-serve") as connection:
        serve = SimulatedServe(Registry(connection, key_prefix=key_prefix))
        app = web.Application(client_max_size=1 << 26)
        path = "/{cluster}/api/serve/applications/"
        app.add_routes([web.get(path, serve.get), web.put(path, serve.put)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        serve.url = f"http://127.0.0.1:{runner.addresses[0][1]}/{{cluster}}"
        beating = asyncio.create_task(_keep_beating(serve))
        try:
            yield serve
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # it is cancelled because we ask for it
                await beating
            await runner.cleanup()


async def _keep_beating(serve: SimulatedServe) -> None:
    while True:
        with contextlib.suppress(QueueUnavailable):  # a test took Redis away
            await serve.beat()
        await asyncio.sleep(BEAT_SECONDS)
