"""Processes are found by what they carry, and end whatever they do."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.waiting import await_until
from tidegate.local import processes

SLEEP = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
BARE = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}], env={{}})"
PARENT = f"import subprocess, sys, os; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); os._exit(0)"


@pytest.fixture
def instance() -> Iterator[str]:
    name = secrets.token_hex(6)
    yield name
    processes.end(name, grace_seconds=0.0)


async def start(instance: str, code: str, log: Path, part: str = "a") -> asyncio.subprocess.Process:
    return await processes.start(
        part, [sys.executable, "-c", code], instance=instance, log=log, environment=os.environ
    )


async def test_children_are_found_and_ended(instance: str, tmp_path: Path) -> None:
    child = await start(instance, SLEEP, tmp_path / "log")
    await await_until(lambda: [p.pid for p in processes.of_instance(instance)] == [child.pid])
    assert await asyncio.to_thread(processes.end, instance) == 1
    assert processes.of_instance(instance) == []
    assert await child.wait() == -15


async def test_orphans_are_found_too(instance: str, tmp_path: Path) -> None:
    parent = await start(instance, PARENT, tmp_path / "log")
    await parent.wait()
    (orphan,) = processes.of_instance(instance)
    assert orphan.pid != parent.pid
    await asyncio.to_thread(processes.end, instance)
    assert not processes.lives(orphan)


async def test_who_ignores_the_polite_signal_is_killed(instance: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = await start(instance, DEAF, log)
    await await_until(lambda: "deaf" in log.read_text())
    await asyncio.to_thread(processes.end, instance, grace_seconds=0.2)
    assert await child.wait() == -9


async def test_what_a_process_started_belongs_to_it_whatever_it_carries(
    instance: str, tmp_path: Path
) -> None:
    await start(instance, BARE, tmp_path / "log")
    await await_until(lambda: len(processes.of_instance(instance)) == 2)
    assert await asyncio.to_thread(processes.end, instance) == 2


async def test_a_part_is_ended_alone(instance: str, tmp_path: Path) -> None:
    one = await start(instance, SLEEP, tmp_path / "log", "one")
    two = await start(instance, SLEEP, tmp_path / "log", "two")
    await await_until(lambda: len(processes.of_instance(instance)) == 2)
    await asyncio.to_thread(processes.end, instance, "one")
    assert [process.pid for process in processes.of_instance(instance)] == [two.pid]
    assert one.returncode is None or one.returncode < 0


async def test_a_child_is_out_of_the_terminals_reach(instance: str, tmp_path: Path) -> None:
    child = await start(instance, SLEEP, tmp_path / "log")
    assert os.getsid(child.pid) != os.getsid(0)
    await processes.stop(child, grace_seconds=5.0)
    assert not psutil.pid_exists(child.pid)
