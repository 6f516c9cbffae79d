"""Our connection to Redis beside redis-py and coredis: the calls, messages and breaks of the queue.

No platform runs, only Redis and one client at a time. A library that is not installed is left out.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from typing import Any

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, middle, percentile, ratio
from loadtests.machine import REPOSITORY, prioritize, python, read_line
from loadtests.redis_clients import CHANNEL, CLIENTS, LAST
from loadtests.stack import start_redis
from tidegate.store.connection import Connection, Script

MODULES = {"ours": "tidegate", "redis-py": "redis", "coredis": "coredis"}
CONCURRENCIES = (1, 16, 128)
BURST, BURST_SECONDS, MESSAGE = 10, 0.002, b"x" * 200
BREAKS, BREAK_SECONDS = 3, 1.0
BETTER = Goal("higher", 1.3)  # the house rule: below it, a well-kept library beats our own code
TEXT = f"for i = 1, {BURST} do redis.call('PUBLISH', KEYS[1], ARGV[1]) end"
PUBLISH = Script(TEXT, sha1(TEXT.encode(), usedforsecurity=False).hexdigest())

Found = dict[str, Any]


def run(context: Context) -> Section:
    names = [name for name in CLIENTS if importlib.util.find_spec(MODULES[name])]
    calls: dict[tuple[str, int], list[Found]] = {}
    messages: dict[str, list[Found]] = {}
    breaks: dict[str, list[Found]] = {}
    with context.processes() as processes:
        url = start_redis(processes)[1]
        for _ in range(context.rounds):
            for name in names:
                for concurrency in CONCURRENCIES:
                    with child(context, name, url, "calls", concurrency, context.seconds / 4) as process:
                        calls.setdefault((name, concurrency), []).append(answer(process))
                with child(context, name, url, "messages", 1, 0) as process:
                    assert read_line(process.stdout) == "ready"
                    asyncio.run(publish(url, context.seconds / 4))
                    messages.setdefault(name, []).append(answer(process))
                with child(context, name, url, "breaks", 16, BREAKS * BREAK_SECONDS) as process:
                    assert read_line(process.stdout) == "ready"
                    asyncio.run(break_connections(url))
                    breaks.setdefault(name, []).append(answer(process))
    return summarize(names, calls, messages, breaks)


def summarize(
    names: list[str],
    calls: dict[tuple[str, int], list[Found]],
    messages: dict[str, list[Found]],
    breaks: dict[str, list[Found]],
) -> Section:
    """Pure."""
    section = Section("connections", "One connection to Redis: ours beside what others have")
    cpu = {key: 1000 * middle([ratio(f["cpu"], f["calls"]) for f in found]) for key, found in calls.items()}
    heard = {
        name: 1000 * middle([ratio(f["cpu"], f["messages"]) for f in found])
        for name, found in messages.items()
    }
    for name in names[1:]:
        for concurrency in CONCURRENCIES:
            share = ratio(cpu[name, concurrency], cpu["ours", concurrency])
            section.figures.append(
                Figure(f"CPU of a call, {concurrency} at once: {name}, of ours", share, "", BETTER)
            )
        section.figures.append(
            Figure(f"CPU of a message: {name}, of ours", ratio(heard[name], heard["ours"]), "", BETTER)
        )
    rows = []
    for (name, concurrency), found in sorted(calls.items(), key=lambda item: item[0][1]):
        latencies = [1000 * value for one in found for value in one["latencies"]]
        rows.append(
            [
                f"{concurrency}",
                name,
                f"{middle([ratio(one['calls'], one['seconds']) for one in found]):.0f}",
                f"{cpu[name, concurrency]:.3f}",
                f"{percentile(latencies, 50):.2f} / {percentile(latencies, 99):.2f}",
            ]
        )
    section.tables.append((["at once", "client", "calls/s", "CPU s per 1,000", "p50 / p99 ms"], rows))
    rows = []
    for name in names:
        errors = {kind for one in breaks[name] for kind in one["errors"]}
        failed = middle([sum(one["errors"].values()) for one in breaks[name]])
        gap = middle([one["gap"] for one in breaks[name]])
        shown = f"{failed:.0f} ({', '.join(sorted(errors))})" if errors else "none"
        rows.append([name, f"{heard[name]:.4f}", f"{1000 * gap:.0f} ms", shown])
    section.tables.append(
        (["client", "CPU s per 1,000 messages", f"longest gap of {BREAKS} breaks", "calls that failed"], rows)
    )
    missing = [name for name in CLIENTS if name not in names]
    if missing:
        section.remarks.append(f"Not installed, left out: {', '.join(missing)}.")
    return section


@contextmanager
def child(
    context: Context, name: str, url: str, question: str, concurrency: int, seconds: float
) -> Iterator[subprocess.Popen[bytes]]:
    """One client in a process of its own."""
    command = [python(), "-m", "loadtests.redis_clients", name, url, question, str(concurrency), str(seconds)]
    with (
        (context.folder / f"{name}.log").open("ab") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=REPOSITORY) as process,
    ):
        if context.nice:
            prioritize(process.pid, context.nice)
        try:
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen[bytes]) -> Found:
    found: Found = json.loads(read_line(process.stdout))
    return found


async def publish(url: str, seconds: float) -> None:
    """Bursts at a fixed rate, as replicas' steps make them; then the last message."""
    end = time.monotonic() + seconds
    async with Connection(url, name="loadtests") as connection:
        while time.monotonic() < end:
            await connection.run(PUBLISH, CHANNEL, MESSAGE)
            await asyncio.sleep(BURST_SECONDS)
        await connection.call("PUBLISH", CHANNEL, LAST)


async def break_connections(url: str) -> None:
    async with Connection(url, name="loadtests") as connection:
        for _ in range(BREAKS):
            await asyncio.sleep(BREAK_SECONDS / 2)
            await connection.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
