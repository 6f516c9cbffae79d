"""Gateway and replica with nothing to do: CPU, memory, and what the gateway has imported."""

from __future__ import annotations

import time
from pathlib import Path

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section
from loadtests.machine import cpu_seconds, resident_bytes
from loadtests.scenarios.streams import platform_target
from loadtests.stack import EngineShape

IDLE_PERCENT = Goal("lower", 2.0)
GATEWAY_MEGABYTES = Goal("lower", 150.0)
NONE = Goal("lower", 0)
SETTLE_SECONDS = 3.0
HEAVY = ("libtorch", "/torch/", "/transformers/", "/ray/_raylet")


def run(context: Context) -> Section:
    with (
        context.processes() as processes,
        platform_target(context, processes, EngineShape(slots=64, step_ms=20)) as platform,
    ):
        time.sleep(SETTLE_SECONDS)
        before = {role: cpu_seconds(pid) for role, pid in platform.process_ids.items()}
        began = time.monotonic()
        time.sleep(2 * context.seconds)
        seconds = time.monotonic() - began
        percent = {
            role: 100 * (cpu_seconds(pid) - before[role]) / seconds
            for role, pid in platform.process_ids.items()
        }
        megabytes = {role: resident_bytes(pid) / 1e6 for role, pid in platform.process_ids.items()}
        gateway = platform.process_ids.get("gateway")
        heavy = heavy_libraries(Path(f"/proc/{gateway}/maps").read_text()) if gateway else []
    return summarize(percent, megabytes, heavy, seconds)


def heavy_libraries(maps: str) -> list[str]:
    """Return those of torch, transformers and ray that a process has mapped."""
    return [mark for mark in HEAVY if mark in maps]


def summarize(
    percent: dict[str, float], megabytes: dict[str, float], heavy: list[str], seconds: float
) -> Section:
    """Pure."""
    section = Section("idle", f"At rest, over {seconds:.0f} s")
    section.figures = [
        Figure("idle gateway, of a core", percent.get("gateway"), "%", IDLE_PERCENT),
        Figure("idle replica, of a core", percent.get("replica"), "%", IDLE_PERCENT),
        Figure("gateway resident memory", megabytes.get("gateway"), "MB", GATEWAY_MEGABYTES, 0),
        Figure("torch, transformers, ray in the gateway", float(len(heavy)), "", NONE, 0),
    ]
    rows = [[role, f"{percent[role]:.2f} %", f"{megabytes[role]:.0f} MB"] for role in percent]
    section.tables.append((["process", "of a core", "resident"], rows))
    return section
