"""The local Ray: one head, started in a process of its own (`ray_head`), watched by its process ids."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping

import msgspec
import psutil

from tidegate.errors import TidegateError
from tidegate.local import processes
from tidegate.local.home import Home, ProcessRecord
from tidegate.local.ray_head import RayHead, RayOptions
from tidegate.replica_args import NODE_FOLDER_VARIABLE, PARKED_VARIABLE, REDIS_VARIABLE, SPARE_VARIABLES

START_SECONDS = 120.0
OBJECT_STORE_BYTES = 100 * 1024 * 1024  # nothing but Serve's own small objects passes through it


class RayFailed(TidegateError):
    """Ray does not start."""

    reason = "RayFailed"


class RayCluster(msgspec.Struct, frozen=True):
    """`token` opens its doors: Ray listens on all addresses of the machine, and who may speak to it may run
    code."""

    head: RayHead
    token: str
    parts: list[ProcessRecord]

    def dead_part(self) -> str | None:
        """The name of a part that is gone, and with it the cluster."""
        return next((part.name for part in self.parts if not part.is_alive()), None)


def environment(
    base: Mapping[str, str],
    cpus: int,
    token: str,
    redis_url: str,
    *,
    keeps_spare: bool,
    parked_bytes: int = 0,
) -> dict[str, str]:
    """Return the environment of Ray and all of its workers. It alone says where Redis is: what Serve stores,
    and Ray logs, names the variable."""
    return {
        **base,
        REDIS_VARIABLE: redis_url,
        # Their ports ask for no token, and Ray opens them on all addresses of the machine. 65536 is no port:
        # Ray says so in its log and goes on.
        "RAY_enable_metrics_collection": "0",
        "DASHBOARD_METRIC_PORT": "65536",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_DEDUP_LOGS": "0",
        PARKED_VARIABLE: str(parked_bytes),
        **(SPARE_VARIABLES if keeps_spare else {}),
        # Ray would give every replica that reserves less than a core one thread.
        "OMP_NUM_THREADS": base.get("OMP_NUM_THREADS", str(cpus)),
    }


async def start(
    home: Home, *, gpus: int, redis_url: str = "", keeps_spare: bool = True, parked_bytes: int = 0
) -> RayCluster:
    """Start a fresh cluster; what an earlier one left behind goes first. `keeps_spare`: a process waits to
    become the next replica; `parked_bytes` bounds parked weights (0: half of the memory). Raises
    `RayFailed`."""
    await asyncio.to_thread(processes.end, home.instance, "ray", grace_seconds=0.0)
    folder = home.temporary / "ray"
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    cpus = os.cpu_count() or 1
    options = RayOptions(str(folder), free_port(), cpus, gpus, OBJECT_STORE_BYTES)
    log = home.logs / "ray.log"
    token = secrets.token_hex(32)
    child = await processes.start(
        "ray",
        [sys.executable, "-m", "tidegate.local.ray_head", msgspec.json.encode(options).decode()],
        instance=home.instance,
        log=log,
        environment=environment(
            {**os.environ, NODE_FOLDER_VARIABLE: str(home.node)},
            cpus,
            token,
            redis_url,
            keeps_spare=keeps_spare,
            parked_bytes=parked_bytes,
        ),
        stdout=PIPE,
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            assert child.stdout is not None
            line = await child.stdout.readline()
            status = await child.wait()
    except TimeoutError as error:
        await processes.stop(child, grace_seconds=0.1)
        raise RayFailed(f"Ray did not start within {START_SECONDS:.0f} s; see {log}.") from error
    if status != 0 or not line:
        raise RayFailed(f"Ray did not start (status {status}); see {log}.")
    head = msgspec.json.decode(line, type=RayHead)
    try:
        parts = [
            ProcessRecord(f"ray {name}", pid, psutil.Process(pid).create_time())
            for name, pid in head.processes.items()
            if name != "reaper"
        ]
    except psutil.NoSuchProcess as error:
        raise RayFailed(f"Ray ended right after its start; see {folder}/session_latest/logs.") from error
    return RayCluster(head, token, parts)


def gpu_count() -> int:
    """GPUs that the NVIDIA driver lists; 0 without one. No torch import."""
    folder = "/proc/driver/nvidia/gpus"
    return len(os.listdir(folder)) if os.path.isdir(folder) else 0  # noqa: PTH112, PTH208


def free_port(host: str = "127.0.0.1") -> int:
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
