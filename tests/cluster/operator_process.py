"""The operator as a process of its own, beside a real API server and a simulated Serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.cluster.simulated_serve import SimulatedServe
from tidegate.children import send_signal
from tidegate_operator.cluster import Cluster, Object
from tidegate_operator.kinds import Kind

T = TypeVar("T")
POLL_SECONDS = 0.1
_WRITES = re.compile(r'^tidegate_operator_writes_total\{kind="(\w+)",verb="(\w+)"\} (\S+)$', re.MULTILINE)


class OperatorProcess:
    """One process of the operator. `environment` is what its Deployment would set."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._environment = dict(environment)
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._port = 0

    async def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tidegate_operator",
                env={**_plain(os.environ), **self._environment, "TIDEGATE_HEALTH_PORT": str(self._port)},
                stdout=log,
                stderr=log,
            )

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        assert self._process is not None
        send_signal(self._process, number)
        return await asyncio.wait_for(self._process.wait(), 20)

    async def ended(self, timeout: float = 30) -> int:
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), timeout)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def writes(self) -> dict[tuple[str, str], int]:
        """What it has written since it started, by (kind, verb)."""
        text = await self.metrics()
        return {(kind, verb): int(float(count)) for kind, verb, count in _WRITES.findall(text)}

    async def metrics(self) -> str:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"http://127.0.0.1:{self._port}/metrics")).text

    async def leads(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):  # it is still on its way up
            return "tidegate_operator_leading 1.0" in await self.metrics()
        return False


def _plain(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what is meant for other processes of the tests: the operator refuses a setting that it does
    not know."""
    return {name: value for name, value in environment.items() if not name.startswith("TIDEGATE_")}


class World:
    """What a test of the operator acts on and looks at."""

    def __init__(self, api: Cluster, serve: SimulatedServe, operator: OperatorProcess) -> None:
        self.api = api
        self.serve = serve
        self.operator = operator

    async def pool(self, name: str = "default", namespace: str = "default", **spec: Any) -> Object:
        return await self._apply("Pool", name, namespace, spec)

    async def model(self, name: str, namespace: str = "default", **spec: Any) -> Object:
        spec.setdefault("engine", {"name": "simulated"})
        return await self._apply("Model", name, namespace, spec)

    async def get(self, kind: Kind, name: str, namespace: str = "default") -> Object | None:
        found, _ = await self.api.list(kind, namespace, field_selector=f"metadata.name={name}")
        return found[0] if found else None

    async def condition(
        self, name: str, wanted: str, kind: Kind = "Model", namespace: str = "default"
    ) -> Any:
        body = await self.get(kind, name, namespace)
        conditions = (body or {}).get("status", {}).get("conditions", [])
        return next((item for item in conditions if item["type"] == wanted), {})

    async def wait_for_condition(
        self, name: str, wanted: str, status: str, reason: str = "", *, timeout: float = 60, **place: Any
    ) -> Any:
        """The condition, once it has this status and reason."""

        async def holds() -> Any:
            found = await self.condition(name, wanted, **place)
            return found if found.get("status") == status and reason in ("", found["reason"]) else None

        try:
            return await self.wait_for(f"{name}: {wanted}={status} {reason}", holds, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {await self.condition(name, wanted, **place)}") from None

    async def wait_for(self, what: str, look: Callable[[], Awaitable[T | None]], timeout: float = 60) -> T:
        end = time.monotonic() + timeout
        while not (found := await look()):
            if time.monotonic() > end:
                raise AssertionError(f"not within {timeout:.0f} s: {what}")
            await asyncio.sleep(POLL_SECONDS)
        return found

    async def settled(self, quiet_seconds: float = 4.0, timeout: float = 40) -> dict[tuple[str, str], int]:
        """Wait until the operator writes nothing for a while; what it has written."""
        end = time.monotonic() + timeout
        before = await self.operator.writes()
        while True:
            await asyncio.sleep(quiet_seconds)
            after = await self.operator.writes()
            if after == before:
                return after
            assert time.monotonic() < end, f"it goes on writing: {before} {after}"
            before = after

    async def _apply(self, kind: Kind, name: str, namespace: str, spec: Mapping[str, Any]) -> Object:
        return await self.api.apply(
            kind,
            {
                "apiVersion": "tidegate.dev/v1alpha1",
                "kind": kind,
                "metadata": {"name": name, "namespace": namespace},
                "spec": dict(spec),
            },
        )


@asynccontextmanager
async def running(operator: OperatorProcess) -> AsyncIterator[None]:
    await operator.start()
    try:
        yield
    finally:
        await operator.stop()
