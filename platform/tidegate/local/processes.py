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

from tidegate.children import send_signal

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
    """All living processes of this home (and part) with all that they started, but not the caller and what
    it descends from."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    marks = [f"{INSTANCE}={instance}".encode()]
    if part is not None:
        marks.append(f"{PART}={part}".encode())
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid in spared or process.pid in found:
            continue
        with contextlib.suppress(psutil.Error, OSError):  # gone, or somebody else's
            variables = _environment(process)
            if all(mark in variables for mark in marks) and lives(process):
                found[process.pid] = process
                children = process.children(recursive=True)
                found.update({child.pid: child for child in children if lives(child)})
    return list(found.values())


def end(instance: str, part: str | None = None, *, grace_seconds: float = 5.0) -> int:
    """End all of them: politely, then for certain. Returns how many there were. Blocks."""
    targets: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + grace_seconds
    while True:
        found = {process.pid: process for process in of_instance(instance, part)}
        fresh = [process for pid, process in found.items() if pid not in targets]
        targets.update(found)
        living = [process for process in targets.values() if lives(process)]
        if not living:
            return len(targets)
        if time.monotonic() >= deadline:
            _signal(living, signal.SIGKILL)
        else:
            _signal(fresh, signal.SIGTERM)
        time.sleep(POLL_SECONDS)


def lives(process: psutil.Process) -> bool:
    """Not gone, and not a zombie that only waits for its parent."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _environment(process: psutil.Process) -> list[bytes]:
    """Its variables, as NAME=value. Read raw where that is possible: a process that sets its title, as Ray's
    do, writes over the first of them, after which psutil sees none."""
    try:
        return Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except FileNotFoundError:
        return [f"{name}={value}".encode() for name, value in process.environ().items()]


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it went by itself
            process.send_signal(number)


async def stop(process: asyncio.subprocess.Process, *, grace_seconds: float) -> None:
    """End one child and wait for it."""
    if process.returncode is not None:
        return
    send_signal(process, signal.SIGTERM)
    try:
        async with asyncio.timeout(grace_seconds):
            await process.wait()
    except TimeoutError:
        send_signal(process, signal.SIGKILL)
        await process.wait()
