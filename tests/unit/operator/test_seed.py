"""Pools of the chart's values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tidegate_operator.cluster import ApiError, ApiGone, Object
from tidegate_operator.kinds import Kind
from tidegate_operator.seed import TIMEOUT_SECONDS, seed

POOLS = [{"metadata": {"name": name, "namespace": "models"}} for name in ("a", "b")]


class FakeCluster:
    def __init__(self, *answers: Exception | None) -> None:
        self.now = 0.0
        self.applied: list[str] = []
        self.answers = list(answers)

    async def apply(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        assert kind == "Pool"
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        self.applied.append(manifest["metadata"]["name"])
        return dict(manifest)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def test_it_waits_until_the_definition_is_served() -> None:
    cluster = FakeCluster(ApiGone("no Pool yet"), ApiGone("no Pool yet"))
    await seed(cluster, POOLS, clock=lambda: cluster.now, sleep=cluster.sleep)
    assert cluster.applied == ["a", "b"]


async def test_it_gives_up_with_the_last_answer() -> None:
    cluster = FakeCluster(*[ApiGone("no Pool")] * 1000)
    with pytest.raises(ApiGone):
        await seed(cluster, POOLS, clock=lambda: cluster.now, sleep=cluster.sleep)
    assert cluster.now == TIMEOUT_SECONDS


async def test_a_refused_pool_ends_it_at_once() -> None:
    cluster = FakeCluster(None, ApiError("spec.groups: must be unique"))
    with pytest.raises(ApiError, match=r"spec\.groups"):
        await seed(cluster, POOLS, clock=lambda: cluster.now, sleep=cluster.sleep)
    assert cluster.applied == ["a"]
    assert cluster.now == 0


def test_a_file_that_is_no_yaml_is_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "pools.yaml"
    file.write_text("spec: {")
    command = [sys.executable, "-m", "tidegate_operator.seed", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr
