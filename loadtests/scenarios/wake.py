"""A model that sleeps: from a request to its first streamed token, and where the time goes.

A platform of its own serves one model with `minReplicas: 0`. Before each request the last replica has left
and the platform's processes are at rest, so that the next replica's process is what it would be in an hour.
Seconds of the parts come from the logs: of Serve's controller, and of the replica (`is up`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section
from loadtests.machine import StartFailed, cpu_seconds
from loadtests.scenarios.engine import demo_path
from loadtests.scenarios.warm import tidegate, tidegate_command, wait_for_token
from tidegate.local import processes
from tidegate.local.home import Home

MODEL = "sleeper"
WAKE_SECONDS = Goal("lower", 2.0)
ABOVE_READING_SECONDS = Goal("lower", 2.0)
SLEEP_SECONDS = 120.0  # until it has gone to sleep and all is at rest
REST_SECONDS, REST_SHARE = 2.0, 0.3  # at rest: no thread wants more of a core in so long
PART_BYTES = 1 << 24
RESOURCE = """\
apiVersion: tidegate.dev/v1alpha1
kind: Model
metadata:
  name: {name}
spec:
  source:
    uri: {uri}
  scaling:
    minReplicas: 0
    idleSeconds: 1
"""


@dataclass(frozen=True, slots=True)
class Waking:
    """`seconds` from the request to its first token, what the platform's processes ran meanwhile, and `parts`
    by name, in order."""

    seconds: float
    cpu_seconds: float
    parts: dict[str, float] = field(default_factory=dict)


def run(context: Context) -> Section:
    checkpoint = demo_path(context).resolve()
    models = context.folder / "models.yaml"
    models.write_text(RESOURCE.format(name=MODEL, uri=json.dumps(checkpoint.as_uri())))
    home = Home(context.folder / "home")
    command = tidegate_command(context.tidegate)
    environ = {**os.environ, "TIDEGATE_HOME": str(home.root), "TIDEGATE_PORT": "0"}
    wakings = []
    try:
        running = tidegate([*command, "up", "-f", str(models), "-o", "json"], environ, context.nice)
        for _ in range(context.rounds):
            wait_until_asleep(home)
            wakings.append(wake(home, running["url"].removesuffix("/v1"), running["key"]))
    finally:
        tidegate([*command, "down", "-o", "json"], environ, context.nice)
    return summarize(wakings, reading_seconds(checkpoint), weights_bytes(checkpoint))


def summarize(wakings: list[Waking], reading: float, size: int) -> Section:
    """Pure. `reading`: seconds to read the weights' files once; `size`: their bytes."""
    section = Section(
        "wake", f"From zero replicas to the first streamed token, {size / 1e6:.0f} MB of weights"
    )
    seconds = median(waking.seconds for waking in wakings)
    section.figures = [
        Figure("zero to the first token", seconds, "s", WAKE_SECONDS if size < 1e8 else None),
        Figure("CPU seconds of the platform meanwhile", median(each.cpu_seconds for each in wakings), "s"),
        Figure("reading the weights' files", reading, "s"),
        Figure("zero to the first token, above reading", seconds - reading, "s", ABOVE_READING_SECONDS),
    ]
    names = list(dict.fromkeys(name for waking in wakings for name in waking.parts))
    rows = [[name, *(shown(waking.parts.get(name)) for waking in wakings)] for name in names]
    rows.append(["first token", *(shown(waking.seconds) for waking in wakings)])
    section.tables.append((["seconds", *(f"round {at}" for at in range(1, len(wakings) + 1))], rows))
    return section


def shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


def wake(home: Home, address: str, key: str) -> Waking:
    used = used_seconds(home)
    asked = time.time()
    wait_for_token(address, key, MODEL)
    seconds = time.time() - asked
    used = used_seconds(home) - used
    _, up = replica_log(home)
    return Waking(seconds, used, parts_of(asked, seconds, up[-1], starting_at(home)))


def parts_of(asked: float, seconds: float, up: Mapping[str, Any], starting: float) -> dict[str, float]:
    """Name the parts of a waking: the replica's own, and what comes before and after. Pure. `starting`: when
    Serve asked Ray for a replica, unix seconds."""
    found: dict[str, float] = up["seconds"]
    began: float = up["began"]
    parts = {"noticed, replica asked for": starting - asked, "process": began - starting}
    parts |= {name: value for name, value in found.items() if name != "process"}
    serving = datetime.fromisoformat(up["time"]).timestamp()
    return {**parts, "claim, prompt, first step": asked + seconds - serving}


def wait_until_asleep(home: Home) -> None:
    """Raises `StartFailed` where a replica stays, or the platform does not come to rest."""
    deadline = time.monotonic() + SLEEP_SECONDS
    while time.monotonic() < deadline:
        left, up = replica_log(home)
        if up and left == len(up) and is_at_rest(home):
            return
        time.sleep(0.2)
    raise StartFailed(f"{MODEL} did not go to sleep within {SLEEP_SECONDS:.0f} s; see {home.logs}")


def is_at_rest(home: Home) -> bool:
    """Whether no thread of the platform has much to do, also where it gets no core to do it on."""
    before = wanted_seconds(home)
    time.sleep(REST_SECONDS)
    after = wanted_seconds(home)
    return all(
        seconds - before.get(thread, 0.0) < REST_SHARE * REST_SECONDS for thread, seconds in after.items()
    )


def wanted_seconds(home: Home) -> dict[str, float]:
    """Seconds that each thread has run, or waited to run."""
    found = {}
    for process in processes.of_instance(home.instance):
        for thread in Path(f"/proc/{process.pid}/task").glob("*"):
            with suppress(OSError):
                ran, waited, _ = (thread / "schedstat").read_text().split()
                found[thread.name] = (int(ran) + int(waited)) / 1e9
    return found


def used_seconds(home: Home) -> float:
    """CPU seconds of the platform's processes that live."""
    used = 0.0
    for process in processes.of_instance(home.instance):
        with suppress(OSError):
            used += cpu_seconds(process.pid)
    return used


def replica_log(home: Home) -> tuple[int, list[dict[str, Any]]]:
    """Return how many replicas have left, and the lines of those that came up."""
    try:
        lines = (home.logs / f"replica-{MODEL}.log").read_text().splitlines()
    except FileNotFoundError:
        return 0, []
    entries = [json.loads(line) for line in lines]
    left = sum(entry["message"].endswith(" left") for entry in entries)
    return left, [entry for entry in entries if entry["message"].endswith(" is up")]


def starting_at(home: Home) -> float:
    """When Serve last asked Ray for a replica, unix seconds. Serve's log has local time."""
    folder = home.temporary / "ray" / "session_latest" / "logs" / "serve"
    lines = [
        line
        for file in folder.glob("controller_[0-9]*.log")
        for line in file.read_text().splitlines()
        if "Starting Replica(" in line
    ]
    _, day, clock, *_ = lines[-1].split()
    return datetime.fromisoformat(f"{day} {clock.replace(',', '.')}").timestamp()


def weights_bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def reading_seconds(checkpoint: Path) -> float:
    """Read the weights' files once, as they now lie in the system's cache."""
    began = time.monotonic()
    buffer = bytearray(PART_BYTES)
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - began
