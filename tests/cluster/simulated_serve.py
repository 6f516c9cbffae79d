"""Ray Serve's REST API without Ray, for tests of the control plane: what the operator writes to and reads.

Answers for any number of Ray clusters under `/{cluster}/api/serve/applications/`. An application that is PUT
runs at once; its revision proves itself and its replicas beat in the registry, as replicas do. What is
refused, broken or away is set from the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from tidegate.control.serve_config import split_application_name
from tidegate.errors import QueueUnavailable
from tidegate.messages.registry import ReplicaStats, RevisionReport
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry

BEAT_SECONDS = 1.0


class SimulatedServe:
    """Use `simulated_serve`. `puts` are the names of applications of every PUT, by cluster."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._configs: dict[str, dict[str, dict[str, Any]]] = {}
        self.puts: dict[str, list[list[str]]] = {}
        self.away_by_default = False  # whether the heads of clusters not yet seen do not answer
        self.refused: set[str] = set()  # models whose application Serve refuses
        self.broken: set[str] = set()  # models whose revision cannot load
        self.url = ""

    def standing(self, cluster: str) -> list[str]:
        return sorted(self._configs.get(cluster, {}))

    def application(self, cluster: str, name: str) -> dict[str, Any]:
        return self._configs[cluster][name]

    def lose_state(self, cluster: str) -> None:
        """As a head without fault tolerance that was killed."""
        self._configs[cluster] = {}

    async def get(self, request: web.Request) -> web.Response:
        cluster = request.match_info["cluster"]
        if self._is_away(cluster):
            return web.Response(status=503, text="away")
        found = {name: _details(name, config) for name, config in self._configs.get(cluster, {}).items()}
        return web.json_response({"controller_info": {"actor_id": "c"}, "applications": found})

    async def put(self, request: web.Request) -> web.Response:
        cluster = request.match_info["cluster"]
        if self._is_away(cluster):
            return web.Response(status=503, text="away")
        body = await request.json()
        configs = {config["name"]: config for config in body["applications"]}
        self.puts.setdefault(cluster, []).append(list(configs))
        for name in configs:
            if _model(name) in self.refused:
                return web.Response(status=400, text=f"{name}: import_path: not one that can be imported")
        fresh = configs.keys() - self._configs.get(cluster, {}).keys()
        self._configs[cluster] = configs
        for name in fresh:
            await self._report(name, configs[name])
        await self.beat(cluster)
        return web.Response(text="ok")

    async def beat(self, *clusters: str) -> None:
        """All replicas of these clusters, or of all, say that they live."""
        now = time.time()
        beats = []
        for cluster in clusters or list(self._configs):
            for name, config in self._configs[cluster].items():
                model, revision = _key(name)
                if model in self.broken or not _replicas(config):
                    continue
                stats = ReplicaStats(f"{cluster}-{name}", model, revision, 1, "n", now, now, 4, 0, 0, 0.0)
                beats.append(self._registry.beat(stats))
        await asyncio.gather(*beats)  # hundreds, one after the other, would take longer than a beat may

    def _is_away(self, cluster: str) -> bool:
        return self.away_by_default and cluster not in self._configs

    async def _report(self, name: str, config: dict[str, Any]) -> None:
        model, revision = _key(name)
        proved = model not in self.broken
        report = RevisionReport(
            model,
            revision,
            time.time(),
            proved,
            reason="" if proved else "WeightsMissing",
            message="" if proved else "model.safetensors is not there.",
            context_length=config["args"]["engine"]["context_length"],
        )
        await self._registry.report(report)


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


def _key(name: str) -> tuple[str, str]:
    key = split_application_name(name)
    assert key is not None, name
    return key


def _model(name: str) -> str:
    return _key(name)[0]


def _replicas(config: dict[str, Any]) -> int:
    return int(config["deployments"][0]["autoscaling_config"]["min_replicas"])


def _details(name: str, config: dict[str, Any]) -> dict[str, Any]:
    replicas = [
        {"replica_id": f"{name}-{number}", "state": "RUNNING", "pid": 1, "node_id": "n"}
        for number in range(_replicas(config))
    ]
    deployment = {"target_num_replicas": len(replicas), "replicas": replicas, "message": ""}
    return {
        "status": "RUNNING",
        "message": "",
        "deployed_app_config": config,
        "deployments": {"Replica": deployment},
    }
