"""Runs the installed `tidegate` command as users do: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def tidegate(
    *arguments: str, environment: Mapping[str, str] | None = None, stdin: str = "", timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run the command with `TIDEGATE_*` and `REDIS_URL` set to `environment` alone."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TIDEGATE_") and name != "REDIS_URL"
    }
    return subprocess.run(
        [str(Path(sys.executable).with_name("tidegate")), *arguments],
        env=inherited | {"COLUMNS": "120"} | dict(environment or {}),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed with a sentence that holds `words`, nothing on stdout, and no traceback."""
    assert result.returncode == 1, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
