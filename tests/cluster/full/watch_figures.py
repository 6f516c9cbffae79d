"""`python -m tests.cluster.full.watch_figures [PART...]`: what the operator's watches cost and survive.

The operator runs as a process beside a real API server (`TIDEGATE_CLUSTER_PARTS=api tests/cluster/up.sh`), a
real Redis and a simulated Serve, behind a proxy that breaks its watches. Nothing here looks into the process,
so the same program measures the operator of any version (ADR 9 compares two).

A change is an edited Model of a pool that does not exist: its status is one write, and Ray has no part in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
from aiohttp import web

from tests.cluster.cluster import CHART
from tests.cluster.cluster import Cluster as ControlPlane
from tests.cluster.full import control_plane
from tests.cluster.full.fault_proxy import _cut, _headers
from tests.cluster.operator_process import OperatorProcess, World, running
from tests.cluster.simulated_serve import simulated_serve
from tests.redis_server import RedisServer
from tidegate.errors import TidegateError
from tidegate_operator.cluster import Cluster, configuration

OTHER = "other"
GONE = b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired","message":"too old"}}\n'
FORBIDDEN = b'{"kind":"Status","code":403,"reason":"Forbidden","message":"the Role is gone"}'
LONGEST_SECONDS = 100.0
RARE_RESYNC_SECONDS = 900  # so that it mends nothing here
RESYNC_SECONDS = 20
POLL_SECONDS = 0.005


class Proxy:
    """Passes everything on until it is told otherwise."""

    def __init__(self, upstream: str, session: aiohttp.ClientSession) -> None:
        self._upstream = upstream
        self._session = session
        self._watches: dict[int, web.Request] = {}
        self._flows = asyncio.Event()
        self._flows.set()
        self.gone = 0  # watches that are told 410
        self.refused = ""  # the namespace whose every call is refused
        self.calls: Counter[str] = Counter()

    def cut(self) -> None:
        for request in self._watches.values():
            _cut(request)

    def freeze(self) -> None:
        """The watches that are open bring nothing any more, and stay open."""
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.refused and f"/namespaces/{self.refused}/" in request.path:
            return web.Response(status=403, body=FORBIDDEN, content_type="application/json")
        if request.query.get("watch", "") in ("1", "true"):
            self.calls["watch"] += 1
            return await self._watch(request)
        self.calls["list" if request.method == "GET" and "limit" in request.query else request.method] += 1
        body = await request.read()
        async with self._session.request(
            request.method, self._upstream + request.path_qs, headers=_headers(request), data=body or None
        ) as found:
            return web.Response(status=found.status, body=await found.read(), content_type="application/json")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if self.gone:
            self.gone -= 1
            await response.prepare(request)
            await response.write(GONE)
            return response
        was_begun_frozen = not self._flows.is_set()
        async with self._session.get(
            self._upstream + request.path_qs,
            headers=_headers(request),
            timeout=aiohttp.ClientTimeout(total=None),
        ) as upstream:
            response.set_status(upstream.status)
            await response.prepare(request)
            self._watches[id(request)] = request
            try:
                async for chunk in upstream.content.iter_any():
                    if not was_begun_frozen:
                        await self._flows.wait()
                    await response.write(chunk)
            finally:
                del self._watches[id(request)]
        return response


@asynccontextmanager
async def proxied(plane: ControlPlane) -> AsyncIterator[tuple[Proxy, str]]:
    connector = aiohttp.TCPConnector(ssl=control_plane.administrator(plane), limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        proxy = Proxy(control_plane.server_of(plane), session)
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", proxy.answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield proxy, f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


class Bench:
    def __init__(self, world: World, proxy: Proxy) -> None:
        self.world = world
        self.proxy = proxy
        self.edits = 0

    async def change(self, name: str = "one", namespace: str = "default") -> float:
        """Edit a Model. Returns after how many seconds its status says so; nan: not in time."""
        self.edits += 1
        body = await self.world.model(name, namespace, pool="none", contextLength=self.edits)
        return await self.taken_in(body["metadata"]["generation"], name, namespace)

    async def taken_in(self, generation: int, name: str = "one", namespace: str = "default") -> float:
        began = time.monotonic()
        while time.monotonic() - began < LONGEST_SECONDS:
            with contextlib.suppress(TidegateError):  # an API server that has just come
                body = await self.world.get("Model", name, namespace)
                if body and (body.get("status") or {}).get("observedGeneration") == generation:
                    return time.monotonic() - began
            await asyncio.sleep(POLL_SECONDS)
        return float("nan")

    async def until(self, holds: Callable[[str], bool]) -> float:
        """Wait for a reason of the Model's condition Scheduled. Returns the seconds; nan: not in time."""
        began = time.monotonic()
        while time.monotonic() - began < LONGEST_SECONDS:
            if holds((await self.world.condition("one", "Scheduled")).get("reason", "")):
                return time.monotonic() - began
            await asyncio.sleep(POLL_SECONDS)
        return float("nan")

    def process(self) -> psutil.Process:
        return psutil.Process(self.world.operator.pid)

    async def is_alive(self, seconds: float = 1.0) -> str:
        with contextlib.suppress(TimeoutError):
            return f"ended with {await self.world.operator.ended(seconds)}"
        return "alive"


async def costs(bench: Bench) -> None:
    say("resident, 1 Model", f"{bench.process().memory_info().rss / 1e6:.0f} MB")
    before, began = bench.process().cpu_times(), time.monotonic()
    await asyncio.sleep(20)
    after = bench.process().cpu_times()
    share = (after.user + after.system - before.user - before.system) / (time.monotonic() - began)
    say("idle", f"{100 * share:.1f} % of a core")
    for number in range(50):
        await bench.world.model(f"m{number}", pool="none")
    await bench.world.settled(timeout=60)
    say("resident, 51 Models", f"{bench.process().memory_info().rss / 1e6:.0f} MB")
    found = sorted([1000 * await bench.change() for _ in range(60)])
    say(
        "a change is in the status after",
        f"{statistics.median(found):.0f} ms (p90 {found[53]:.0f})",
    )


async def faults(bench: Bench) -> None:
    bench.proxy.cut()
    say("watches cut, then a change", f"{await bench.change():.2f} s")

    bench.proxy.freeze()
    say("watches silent but open, then a change", f"{await bench.change():.1f} s; {await bench.is_alive()}")
    bench.proxy.thaw()

    pool = await bench.world.pool("none")
    await bench.until(lambda reason: reason != "NoSuchPool")
    bench.proxy.gone = 10
    bench.proxy.cut()
    await bench.world.api.delete("Pool", pool)
    found = await bench.until(lambda reason: reason == "NoSuchPool")
    say("410 for all; a Pool that went meanwhile is noticed after", f"{found:.1f} s")
    for body in (await bench.world.api.list("RayCluster", "default"))[0]:
        await bench.world.api.delete("RayCluster", body)


async def restart(bench: Bench, plane: ControlPlane) -> None:
    """The API server is killed; its own script starts it again."""
    recorded = (plane.facts.kubeconfig.parent / "live" / "run" / "apiserver.pid").read_text()
    process = psutil.Process(int(recorded.split()[0]))
    process.kill()
    await asyncio.to_thread(process.wait, 10)
    script = Path(control_plane.__file__).parents[1] / "up.sh"
    up = await asyncio.create_subprocess_exec(
        str(script), env={**os.environ, "TIDEGATE_CLUSTER_PARTS": "api"}, stderr=asyncio.subprocess.DEVNULL
    )
    await up.wait()
    say(
        "the API server was killed and came again, then a change",
        f"{await bench.change():.1f} s; {await bench.is_alive()}",
    )


async def refusal(bench: Bench) -> None:
    """As where a namespace is deleted: the Role in it goes, and with it the right to watch there."""
    environment = {**bench.world.operator._environment, "TIDEGATE_RESYNC_SECONDS": str(RESYNC_SECONDS)}
    await bench.world.operator.stop()
    bench.world.operator._environment = environment
    await bench.world.operator.start()
    await bench.change()
    bench.proxy.refused = OTHER
    bench.proxy.cut()
    found = await bench.is_alive(RESYNC_SECONDS + 10)
    say("403 in one namespace of two: the operator", found)
    if found == "alive":
        say("  a change in the other namespace", f"{await bench.change():.2f} s")
        await bench.world.operator.stop()
    await bench.world.operator.start()
    say("  started anew meanwhile, a change in the other namespace", f"{await bench.change():.1f} s")
    bench.proxy.refused = ""
    say("  the namespace is open again, a change in it", f"{await bench.change('far', OTHER):.1f} s")


async def main() -> int:
    logging.getLogger("aiohttp.server").disabled = True  # what the operator's end or the API server's breaks
    plane = ControlPlane.running("api")
    plane.kubectl("apply", "--server-side", "-f", str(CHART / "files" / "crds"))
    definition = plane.facts.programs / "kuberay-config" / "crd" / "bases" / "ray.io_rayclusters.yaml"
    plane.kubectl("apply", "--server-side", "-f", str(definition))
    plane.wait_for("RayClusters", lambda: plane.kubectl("get", "--raw", "/apis/ray.io/v1"))
    if not plane.get("namespace", OTHER):
        plane.kubectl("create", "namespace", OTHER)
    redis = RedisServer(durable=True)
    redis.start()
    folder = Path(tempfile.mkdtemp(prefix="tidegate-watches-"))
    async with AsyncExitStack() as stack:
        stack.callback(redis.close)
        serve = await stack.enter_async_context(simulated_serve(redis.url, control_plane.KEY_PREFIX))
        api = await stack.enter_async_context(
            Cluster(await configuration(str(plane.facts.kubeconfig)), lambda *_: None)
        )
        await control_plane.clean(api)
        stack.push_async_callback(control_plane.clean, api)
        proxy, url = await stack.enter_async_context(proxied(plane))
        kubeconfig = control_plane.kubeconfig_for(url, folder / "kubeconfig")
        environment = {
            **control_plane.operator_environment(kubeconfig, redis.url, serve.url),
            "TIDEGATE_NAMESPACES": f"default,{OTHER}",
            "TIDEGATE_RESYNC_SECONDS": str(RARE_RESYNC_SECONDS),
        }
        operator = OperatorProcess(environment, folder / "operator.log")
        world = World(api, serve, operator)
        bench = Bench(world, proxy)
        await world.model("one", pool="none")
        await world.model("far", OTHER, pool="none")
        began = time.monotonic()
        await stack.enter_async_context(running(operator))
        await bench.taken_in(1)
        say("from the start to the first status", f"{time.monotonic() - began:.1f} s")
        say("log", str(folder / "operator.log"))
        parts = {
            "costs": lambda: costs(bench),
            "faults": lambda: faults(bench),
            "restart": lambda: restart(bench, plane),
            "refusal": lambda: refusal(bench),
        }
        for part in sys.argv[1:] or parts:
            await parts[part]()
        say("calls", dict(proxy.calls))
    return 0


def say(what: str, found: object) -> None:
    print(f"{what:60} {found}", flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
