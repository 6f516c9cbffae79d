"""The scripts of the test cluster say what they lack before they build for a quarter of an hour."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.integration.chart.rendered import CHART

ROOT = CHART.parents[1]


def checkout(tmp_path: Path) -> Path:
    """What the scripts read of a checkout, without an environment."""
    shutil.copytree(ROOT / "tests" / "cluster", tmp_path / "tests" / "cluster")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    environ |= {"TIDEGATE_CLUSTER_CACHE": str(folder / "cache"), "TIDEGATE_CLUSTER_PARTS": "all"}
    command = ["bash", str(folder / "tests/cluster/environment.sh"), "--check"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_uv_is_missed_at_once(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    done = check(folder)
    assert done.returncode != 0
    assert "uv is missing: `make env` installs it into .venv" in done.stderr
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "uv").write_text("#!/bin/sh\nexit 1\n")
    (folder / ".venv" / "bin" / "uv").chmod(0o755)
    assert check(folder).returncode == 0, "it only looks"


def test_it_is_asked_before_anything_is_built() -> None:
    for name in ("up.sh", "run.sh"):
        text = (ROOT / "tests" / "cluster" / name).read_text(encoding="utf-8")
        assert text.index('"$HERE/environment.sh" --check') < text.index('"$HERE/build.sh"'), name
