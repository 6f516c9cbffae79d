"""Measures memory, and how many requests a KV cache in it holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from tidegate.engines.base import EngineLoadError
from tidegate.sources.facts import CUDA_RUNTIME_BYTES, PREFIX_SHARE, WEIGHTS_OVERHEAD

MOST_SLOTS = 256
GIB = 1 << 30
CPU_SHARE = 0.25
CPU_MOST_BYTES = 2 * GIB
CUDA_SHARE = 0.85
CUDA_CONTEXT_BYTES = GIB // 2  # a part of CUDA_RUNTIME_BYTES that torch does not count
CPU_RUNTIME_BYTES = GIB // 2
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Budget:
    """The bytes that the KV cache of what runs may take, and how many requests at most; beside them those for
    what prompts begin with."""

    bytes: int
    slots: int
    prefix_bytes: int = 0


def check_weights_fit(weights_bytes: int, free_bytes: int, device: str) -> None:
    """Raise `EngineLoadError` (OutOfMemory) with the numbers where the weights cannot fit."""
    needed = int(weights_bytes * WEIGHTS_OVERHEAD)
    if needed > free_bytes:
        raise EngineLoadError(
            "OutOfMemory",
            f"The weights need {gib(needed)} of memory on {device}, but {gib(free_bytes)} are free.",
        )


def runtime_bytes(device: str) -> int:
    return CPU_RUNTIME_BYTES if device == "cpu" else CUDA_RUNTIME_BYTES


def within_cap(free_bytes: int, cap_bytes: int, weights_bytes: int, device: str) -> int:
    """Return what of `free_bytes` a cap on the whole engine still leaves; no cap: all of it."""
    if not cap_bytes:
        return free_bytes
    return max(0, min(free_bytes, cap_bytes - int(weights_bytes * WEIGHTS_OVERHEAD) - runtime_bytes(device)))


def torch_share(cap_bytes: int, total_bytes: int) -> float:
    """The share of a GPU that torch itself may take, so that with its CUDA context the cap holds."""
    return max(0.0, min(1.0, (cap_bytes - CUDA_CONTEXT_BYTES) / total_bytes))


def kv_budget(
    *,
    free_bytes: int,
    device: str,
    kv_cache_bytes: int,
    share: float,
    bytes_per_row: int,
    least_bytes: int,
    max_slots: int,
    keeps_prefixes: bool = False,
    prefix_bytes: int = 0,
) -> Budget:
    """Return bytes for the KV cache, which hold at least one request of full context (`bytes_per_row`), and
    how many may run in them at once: as many as take `least_bytes` each, at most 256 or `max_slots`. Where
    prefixes are kept, `prefix_bytes` of the whole are for them, or one part in `PREFIX_SHARE` + 1, but never
    so much that more than that share of the requests of full context would lose their place.

    `free_bytes` is what is free with the weights loaded. Raises `EngineLoadError` (OutOfMemory) where not
    even one request fits.
    """
    is_cpu = device == "cpu"
    budget = kv_cache_bytes or int(free_bytes * (share or (CPU_SHARE if is_cpu else CUDA_SHARE)))
    if is_cpu and not kv_cache_bytes and not share:
        budget = min(budget, CPU_MOST_BYTES)
    budget = min(budget, free_bytes)
    bytes_per_row, least_bytes = max(1, bytes_per_row), max(1, least_bytes)
    kept = prefix_bytes * keeps_prefixes
    rows = (budget - kept) // bytes_per_row
    if rows < 1:
        raise EngineLoadError(
            "OutOfMemory",
            f"The KV cache of one request of full context needs {gib(bytes_per_row)}, but the cache may take "
            f"{gib(budget)} on {device}"
            + (f", {gib(kept)} of it prefix_cache_bytes: lower that, " if kept else ": lower ")
            + "contextLength or give it more memory.",
        )
    most = min(max_slots or MOST_SLOTS, MOST_SLOTS)
    share_bytes = 0 if prefix_bytes or not keeps_prefixes else budget // (PREFIX_SHARE + 1)
    whole = rows if not share_bytes else rows - rows // (PREFIX_SHARE + 1)
    running = min(max(budget - kept - share_bytes, whole * bytes_per_row), most * bytes_per_row)
    slots = min(most, running // least_bytes)
    return Budget(running, slots, kept or min(budget - running, share_bytes))


def free_host_bytes() -> int:
    """Memory that this process could still take: the machine's, or its control group's where that is less."""
    free = int(psutil.virtual_memory().available)
    group = _own_cgroup()
    limit = _number(group / "memory.max")
    used = _number(group / "memory.current")
    if limit is None or used is None:
        return free
    return max(0, min(free, limit - used + _reclaimable(group)))


def total_host_bytes() -> int:
    """The machine's memory, or what this process's control group may take where that is less."""
    total = int(psutil.virtual_memory().total)
    limit = _number(_own_cgroup() / "memory.max")
    return total if limit is None else min(total, limit)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, or its control group's quota where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (_own_cgroup() / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def gib(size: int) -> str:
    """A size for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"


def _own_cgroup() -> Path:
    """The folder of this process's version 2 control group; the root where there is none."""
    try:
        line = Path("/proc/self/cgroup").read_text().splitlines()[-1]
    except (OSError, IndexError):
        return CGROUP
    folder = CGROUP / line.rpartition(":")[2].lstrip("/")
    return folder if folder.is_dir() else CGROUP


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None  # no such limit, or "max"


def _reclaimable(group: Path) -> int:
    """Bytes of file cache that count as used but that the kernel gives up under pressure."""
    try:
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(fields.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0
