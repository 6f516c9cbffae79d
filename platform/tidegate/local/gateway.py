"""The gateway as a child process of the local host."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import httpx

from tidegate.errors import ConfigError, FieldProblem, TidegateError
from tidegate.local import processes
from tidegate.local.home import Home
from tidegate.local.ray_cluster import free_port
from tidegate.settings import PREFIX, Settings

START_SECONDS = 60.0
STOP_SECONDS = 8.0
POLL_SECONDS = 0.05
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}  # noqa: S104 - where a client on this machine asks


class GatewayFailed(TidegateError):
    """The gateway process ended or does not answer."""

    reason = "GatewayFailed"


class GatewayProcess:
    """Start, wait for, and start again. The port stays the same."""

    def __init__(self, settings: Settings, home: Home, redis_url: str) -> None:
        self._settings = settings
        self._home = home
        self._redis_url = redis_url
        self._port = settings.port or free_port(settings.host)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def url(self) -> str:
        host = self._settings.host.strip("[]")
        host = WILDCARDS.get(host, host)
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    async def start(self) -> str:
        """Start it and wait until it answers; its address. Raises `GatewayFailed`."""
        log = self._home.logs / "gateway.log"
        self._process = await processes.start(
            "gateway",
            [sys.executable, "-m", "tidegate.gateway"],
            instance=self._home.instance,
            log=log,
            environment=self._environment(),
        )
        async with httpx.AsyncClient(base_url=self.url, timeout=2.0, trust_env=False) as client:
            for _ in range(round(START_SECONDS / POLL_SECONDS)):
                if self._process.returncode is not None:
                    break
                try:
                    if (await client.get("/livez")).is_success:
                        return self.url
                except httpx.HTTPError:
                    await asyncio.sleep(POLL_SECONDS)
        raise GatewayFailed(f"The gateway does not start; see {log}.")

    async def wait(self) -> None:
        if self._process is not None:
            await self._process.wait()

    async def stop(self) -> None:
        if self._process is not None:
            await processes.stop(self._process, grace_seconds=STOP_SECONDS)

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            f"{PREFIX}HOME": str(self._home.root),
            f"{PREFIX}REDIS_URL": self._redis_url,
            f"{PREFIX}KEY_PREFIX": self._settings.key_prefix,
            f"{PREFIX}HOST": self._settings.host,
            f"{PREFIX}PORT": str(self._port),
            f"{PREFIX}NO_AUTH": str(self._settings.no_auth).lower(),
        }


def check_port(settings: Settings) -> None:
    """Raises `ConfigError` where the gateway could not listen."""
    if not settings.port:
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host.strip("[]"), settings.port))
        except OSError as error:
            problem = FieldProblem(
                f"{PREFIX}PORT", f"{settings.host}:{settings.port}", f"{error.strerror}; choose another, or 0"
            )
            raise ConfigError(str(problem), [problem]) from error
