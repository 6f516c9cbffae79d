"""`/healthz` and `/metrics`: what the kubelet and Prometheus ask.

A process that waits for the Lease is as healthy as the one that has it. Unhealthy is one whose event loop
does not answer, or one in which a look at a pool never ends.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from tidegate_operator.metrics import Metrics

STALLED_SECONDS = 180.0


class Pulse:
    """Which work is under way, and since when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: dict[object, float] = {}

    @contextmanager
    def work(self, name: object) -> Iterator[None]:
        self._began[name] = self._clock()
        try:
            yield
        finally:
            del self._began[name]

    def problem(self) -> str:
        """Why the process should be started anew; empty while all is well."""
        now = self._clock()
        for name, began in self._began.items():
            if now - began > STALLED_SECONDS:
                return f"The work on {name} has not ended for {now - began:.0f} s."
        return ""


@asynccontextmanager
async def serve_health(host: str, port: int, pulse: Pulse, metrics: Metrics) -> AsyncIterator[int]:
    """Answer on `host:port` while the block runs; gives the port (0 asks for any free one)."""

    async def healthz(_: web.Request) -> web.Response:
        problem = pulse.problem()
        return web.Response(text=problem or "ok", status=503 if problem else 200)

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"content-type": "text/plain; version=0.0.4"})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/metrics", exposition)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
