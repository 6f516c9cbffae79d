"""`tidegate up` a second time: how long until the first streamed token of a demo model?

The first start in a new home is timed as well; then everything is stopped and started again. The home is the
scenario's own folder, so a platform that runs elsewhere on the machine is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section
from loadtests.machine import REPOSITORY, StartFailed, prioritize
from loadtests.measure import CHAT_PATH, chat_body
from loadtests.sse import count_events

WARM_SECONDS = Goal("lower", 45.0)
COMMAND_SECONDS = 600.0


def run(context: Context) -> Section:
    command = tidegate_command(context.tidegate)
    environ = {**os.environ, "TIDEGATE_HOME": str(context.folder / "home"), "TIDEGATE_PORT": "0"}
    seconds = []
    try:
        for _ in range(2):
            seconds.append(seconds_to_first_token(command, environ, context.nice))
            tidegate([*command, "down", "-o", "json"], environ, context.nice)
    finally:
        # Also where a start failed half-way: nothing that we began stays.
        tidegate([*command, "down", "-o", "json"], environ, context.nice)
    return summarize(*seconds)


def summarize(first: float, warm: float) -> Section:
    """Pure."""
    section = Section("warm", "`tidegate up` to the first streamed token, demo models, 2 cores")
    section.figures = [
        Figure("warm start to the first streamed token", warm, "s", WARM_SECONDS, 1),
        Figure("first start in a new home", first, "s", None, 1),
    ]
    return section


def tidegate_command(name: str) -> list[str]:
    """The installed command: from the path, or beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise StartFailed(f"no command {name!r}: install Tidegate or name it with --tidegate")
    return [found]


def seconds_to_first_token(command: list[str], environ: dict[str, str], nice: int) -> float:
    """From the start of `up` to the first streamed text of the model that it names. Raises `StartFailed`."""
    began = time.monotonic()
    running = tidegate([*command, "up", "-o", "json"], environ, nice)
    wait_for_token(running["url"].removesuffix("/v1"), running["key"], running["model"])
    return time.monotonic() - began


def wait_for_token(address: str, key: str, model: str) -> None:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    body = chat_body(model, 8, is_stream=True, prompt="What is Tidegate?")
    with httpx.stream("POST", address + CHAT_PATH, content=body, headers=headers, timeout=120) as answer:
        received = b""
        for piece in answer.iter_bytes():
            received += piece
            if count_events(received):
                return
    raise StartFailed(f"{model} streamed no token: {answer.status_code} {received[:300]!r}")


def tidegate(command: list[str], environ: dict[str, str], nice: int) -> dict[str, Any]:
    """Run one command of the CLI to its end and read its JSON. Raises `StartFailed`."""
    done = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
        cwd=REPOSITORY,
        start_new_session=True,
        text=True,
    )
    if nice:
        prioritize(done.pid, nice)
    output, errors = done.communicate(timeout=COMMAND_SECONDS)
    if done.returncode != 0:
        raise StartFailed(f"{' '.join(command)} ended with {done.returncode}:\n{(errors or output)[-2000:]}")
    found: dict[str, Any] = json.loads(output)
    return found
