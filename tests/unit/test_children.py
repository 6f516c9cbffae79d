"""A signal to a child that has just ended leaves its exit status to the event loop."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator

import pytest

from tests.processes import runs
from tests.waiting import wait_until
from tidegate.children import send_signal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="waits for children by descriptors")


@pytest.fixture
def _watched_by_the_loop() -> Iterator[None]:
    """A child's status is looked up by the event loop's own thread, so that a test decides when."""
    if sys.version_info >= (3, 12):
        yield
        return
    policy = asyncio.get_event_loop_policy()
    before = policy.get_child_watcher()
    policy.set_child_watcher(asyncio.PidfdChildWatcher())
    yield
    policy.set_child_watcher(before)


@pytest.fixture
async def child(_watched_by_the_loop: None) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", "raise SystemExit(7 if input() else 8)", stdin=asyncio.subprocess.PIPE
    )


async def test_a_child_that_has_just_ended_keeps_its_status(child: asyncio.subprocess.Process) -> None:
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    await child.stdin.drain()
    wait_until(lambda: not runs(child.pid))  # blocks the event loop: it has not looked yet
    send_signal(child, signal.SIGKILL)
    assert await child.wait() == 7
    send_signal(child, signal.SIGKILL)


async def test_a_child_that_runs_is_signalled(child: asyncio.subprocess.Process) -> None:
    send_signal(child, signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL
