"""Runs the installed `tidegate` command as users do: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import coverage

ROOT = Path(__file__).parents[3]


def tidegate(
    *arguments: str, environment: Mapping[str, str] | None = None, stdin: str = "", timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run the command with `TIDEGATE_*` and `REDIS_URL` set to `environment` alone, and no cluster at
    hand."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TIDEGATE_") and name != "REDIS_URL"
    }
    return subprocess.run(
        [*program(), *arguments],
        env=inherited | {"COLUMNS": "120", "KUBECONFIG": os.devnull} | dict(environment or {}),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def program() -> list[str]:
    """The installed command; where this run measures coverage, the same code measured too."""
    if coverage.Coverage.current() is None:
        return [str(Path(sys.executable).with_name("tidegate"))]
    measured = ["coverage", "run", "--parallel-mode", f"--rcfile={ROOT / 'pyproject.toml'}"]
    return [sys.executable, "-m", *measured, f"--data-file={ROOT / '.coverage'}", "-m", "tidegate.cli"]


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed with a sentence that holds `words`, nothing on stdout, and no traceback."""
    assert result.returncode == 1, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
