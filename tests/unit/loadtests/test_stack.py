"""The processes that the scenarios start are the product's own: this breaks when their command lines move."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from loadtests.context import Context
from loadtests.machine import Processes, StartFailed, python, wait_for
from loadtests.measure import Load, run_load
from loadtests.scenarios.engine import demo_path, endless_copy
from loadtests.stack import EngineShape, start_direct, start_platform

SHAPE = EngineShape(slots=4, step_ms=1.0)
FEW = Load(2, 5, seconds=30.0, requests_per_client=2, is_counted_at_once=True)


def test_platform_and_baselines_answer_alike_and_leave_nothing(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        platform = start_platform(processes, SHAPE)
        raw = start_direct(processes, SHAPE)
        usual = start_direct(processes, SHAPE, "direct-uvicorn", "loadtests.direct_asgi")
        streamed = [run_load(target, FEW) for target in (raw, platform.target)]
        whole = run_load(
            usual, Load(2, 5, 30.0, is_stream=False, requests_per_client=2, is_counted_at_once=True)
        )
        ids = [one.pid for one in processes.started]
    for run in (*streamed, whole):
        assert run.tally.statuses == {"200": 4}
        assert run.tally.token_counts == {"5": 4}
        assert run.tally.unfinished + run.tally.broken_streams + run.tally.connection_errors == 0
    assert set(streamed[1].cpu) == {"gateway", "redis", "replica", "generator"}
    assert not any(psutil.pid_exists(pid) for pid in ids)


def test_a_process_that_ends_at_once_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        started = processes.start("broken", [python(), "-c", "raise SystemExit('no room')"])
        with pytest.raises(StartFailed, match="no room"):
            wait_for(started, lambda: False, 30.0, "listening")


def test_the_endless_copy_ends_on_the_padding_token_alone(tmp_path: Path) -> None:
    source = demo_path(Context(tmp_path, 1.0, 1))
    copy = endless_copy(source, tmp_path / "copy")
    assert '"eos_token_id": 0' in (copy / "config.json").read_text()
    assert (copy / "model.safetensors").stat().st_size == (source / "model.safetensors").stat().st_size
