"""Start, find and end the processes of one home.

Every process carries `TIDEGATE_INSTANCE` in its environment, which its own children inherit: so all of them
are found, also those that Ray started, and also after the host was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

INSTANCE = "TIDEGATE_INSTANCE"
PART = "TG_PART"  # which part of the platform a process belongs to: redis, ray, gateway, host
POLL_SECONDS = 0.05


async def start(
    part: str,
    command: Sequence[str],
    *,
    instance: str,
    log: Path,
    environment: Mapping[str, str],
    stdout: int | None = None,
) -> asyncio.subprocess.Process:
    """Start a child in a session of its own (a terminal's Ctrl-C must reach the host alone)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file if stdout is None else stdout,
            stderr=file,
            env={**environment, INSTANCE: instance, PART: part},
            start_new_session=True,
        )


def of_instance(instance: str, part: str | None = None) -> list[psutil.Process]:
    """All living processes of this home (and part), but not the caller and what it descends from."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid in spared:
            continue
        with contextlib.suppress(psutil.Error):  # gone, or somebody else's
            environment = process.environ()
            is_ours = environment.get(INSTANCE) == instance
            if is_ours and (part is None or environment.get(PART) == part):
                found.append(process)
    return found


def end(instance: str, part: str | None = None, *, grace_seconds: float = 5.0) -> int:
    """End all of them: politely, then for certain. Returns how many there were. Blocks."""
    seen: set[int] = set()
    deadline = time.monotonic() + grace_seconds
    number = signal.SIGTERM if grace_seconds else signal.SIGKILL
    while found := of_instance(instance, part):
        fresh = [process for process in found if process.pid not in seen]
        if time.monotonic() >= deadline:
            number, fresh = signal.SIGKILL, found
        _signal(fresh, number)
        seen.update(process.pid for process in found)
        psutil.wait_procs(found, timeout=POLL_SECONDS)
    return len(seen)


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it went by itself
            process.send_signal(number)


async def stop(process: asyncio.subprocess.Process, *, grace_seconds: float) -> None:
    """End one child and wait for it."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(grace_seconds):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
