"""Open Responses' own runner, `bin/compliance-test.ts`, one test here for each of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

RUNNER_SECONDS = 200


def results() -> list[dict[str, Any]]:
    modules = Path(os.environ["CLIENTS_NODE_MODULES"])
    with tempfile.TemporaryDirectory() as folder:
        # Node looks for packages beside the file that asks for them.
        for name in ("bin", "src"):
            (Path(folder) / name).symlink_to(Path(os.environ["CLIENTS_SOURCES"]) / name)
        (Path(folder) / "node_modules").symlink_to(modules)
        command = ["node", "--import", str(modules / "tsx" / "dist" / "loader.mjs"), "--preserve-symlinks"]
        command += [
            "--preserve-symlinks-main",
            "--experimental-websocket",
            "bin/compliance-test.ts",
            "--json",
        ]
        command += ["--base-url", f"{os.environ['CLIENTS_URL']}/v1", "--model", os.environ["CLIENTS_MODEL"]]
        ran = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "OPENRESPONSES_API_KEY": os.environ["CLIENTS_KEY"]},
            capture_output=True,
            text=True,
            timeout=RUNNER_SECONDS,
        )
    assert ran.stdout.startswith("{"), ran.stderr
    return list(json.loads(ran.stdout)["results"])


@pytest.mark.parametrize("result", [pytest.param(found, id=found["id"]) for found in results()])
def test_compliance(result: dict[str, Any]) -> None:
    if result["status"] == "skipped":
        pytest.skip("; ".join(result["errors"]))
    assert result["status"] == "passed", f"{result['errors']} {result.get('response')}"
