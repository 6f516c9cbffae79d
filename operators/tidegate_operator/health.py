"""`/healthz` and `/metrics`: what the kubelet and Prometheus ask.

A process that waits for the Lease is as healthy as the one that has it, and one whose API server is away or
refuses too: starting it anew helps neither. Unhealthy is one whose event loop does not answer, in which the
reconcile of a pool never ends, or whose informer makes no more turns.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from tidegate.gateway.listen import listen
from tidegate_operator.metrics import Metrics

STALLED_SECONDS = 180.0


class Liveness:
    """Knows what must move, and since when it has not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._moved_at: dict[str, float] = {}

    def beat(self, name: str) -> None:
        """Note that this moves now, and that it must again."""
        self._moved_at[name] = self._clock()

    @contextmanager
    def work(self, name: str) -> Iterator[None]:
        """Note that what the block does must end."""
        self.beat(name)
        try:
            yield
        finally:
            del self._moved_at[name]

    def problem(self) -> str:
        """Say why the process should be started anew; empty while all is well."""
        now = self._clock()
        for name, moved_at in self._moved_at.items():
            if now - moved_at > STALLED_SECONDS:
                return f"{name} has not moved for {now - moved_at:.0f} s."
        return ""


@asynccontextmanager
async def serve_health(host: str, port: int, liveness: Liveness, metrics: Metrics) -> AsyncIterator[int]:
    """Answer on `host:port` while the block runs; gives the port (0 asks for any free one)."""

    async def healthz(_: web.Request) -> web.Response:
        problem = liveness.problem()
        return web.Response(text=problem or "ok", status=503 if problem else 200)

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"content-type": "text/plain; version=0.0.4"})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/metrics", exposition)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        for listener in listen(host, port, "TIDEGATE_HEALTH_HOST, TIDEGATE_HEALTH_PORT"):
            await web.SockSite(runner, listener).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
