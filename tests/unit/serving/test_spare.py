"""Who is the spare, and whether one is on its way, as files say it. Ray's part is in `test_ray_serve`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tidegate.replica_args import SPARE_VARIABLES
from tidegate.serving import spare

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A node whose folder is `tmp_path`; the workers that its raylet is asked to start."""
    found: list[str] = []
    for name, value in SPARE_VARIABLES.items():
        monkeypatch.setenv(name, value)
    node = SimpleNamespace(get_session_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr(spare, "_node", lambda: node)
    monkeypatch.setattr(spare, "_start_worker", lambda: found.append("worker"))
    monkeypatch.setattr(spare, "begin_ahead", lambda: found.append("imports"))
    monkeypatch.setattr(spare, "MODULES", ())
    yield found
    spare.leave()


def test_one_is_ordered_at_a_time_and_the_worker_that_comes_is_the_spare(orders: list[str]) -> None:
    spare.become()
    assert orders == []  # nobody ordered it
    spare.order()
    spare.order()
    assert orders == ["worker"]  # it may still come
    spare.become()
    assert orders == ["worker", "imports"]
    spare.become()
    assert orders == ["worker", "imports"]
    assert spare.leave()
    assert not spare.leave()
    spare.order()
    assert orders == ["worker", "imports", "worker"]


def test_none_is_ordered_while_one_waits(orders: list[str], tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / spare.LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        spare.order()
        assert orders == []
        holder.kill()
    spare.order()
    assert orders == ["worker"]


def test_a_worker_that_never_came_is_ordered_again(orders: list[str], tmp_path: Path) -> None:
    spare.order()
    long_ago = (tmp_path / spare.MARKER).stat().st_mtime - 2 * spare.COMING_SECONDS
    os.utime(tmp_path / spare.MARKER, (long_ago, long_ago))
    spare.order()
    assert orders == ["worker", "worker"]


def test_nothing_is_ordered_where_workers_look_for_no_order(
    orders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_preload_python_modules", "other")
    spare.order()
    assert orders == []


def test_an_order_that_fails_harms_nobody(
    orders: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise ConnectionError("no raylet")

    monkeypatch.setattr(spare, "_start_worker", refuse)
    spare.order()
    assert "no raylet" in caplog.text
