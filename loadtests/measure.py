"""One run of the generator against one target, with everybody's CPU seconds over the very same window."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from loadtests.generator import LoadPlan, Tally
from loadtests.machine import REPOSITORY, cpu_seconds, machine_busy_seconds, python

CHAT_PATH = "/v1/chat/completions"
PROMPT = "Say something about the tide, please."
START_SECONDS = 1.0  # for the generator's own start


class GeneratorFailed(Exception):
    """The load generator ended without a tally."""


@dataclass(frozen=True, slots=True)
class Target:
    """An address that answers chat completions. `process_ids` by role: what is charged for the work."""

    name: str
    host: str
    port: int
    model: str
    key: str = ""
    process_ids: Mapping[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}{CHAT_PATH}"


@dataclass(frozen=True, slots=True)
class Load:
    """The work of the clients. Seconds throughout; a request asks for `tokens` tokens.

    `stream_seconds` is how long one request takes undisturbed: clients start spread over it (or over
    `spread_seconds`), and the window opens once all have started.
    """

    clients: int
    tokens: int
    seconds: float
    is_stream: bool = True
    stream_seconds: float = 0.0
    spread_seconds: float = 0.0
    think_seconds: float = 0.0
    drain_seconds: float = 15.0
    backoff_seconds: float = 0.5
    requests_per_client: int = 0  # 0: until the window ends
    is_counted_at_once: bool = False  # the window opens with the first client and ends with the last
    prompt: str = PROMPT
    more: Mapping[str, object] = field(default_factory=dict)  # of the body: else each server's own defaults


@dataclass(frozen=True, slots=True)
class Run:
    """A tally and the CPU seconds that each role spent inside the window."""

    tally: Tally
    cpu: dict[str, float]
    cores_of_others: float = 0.0  # what processes outside the test took meanwhile

    def cpu_total(self) -> float:
        """Of the target: the generator is not charged."""
        return sum(seconds for role, seconds in self.cpu.items() if role != "generator")

    def window_tokens(self) -> float:
        return self.tally.tokens_per_second() * self.tally.window_seconds


@dataclass(frozen=True, slots=True)
class Generator:
    """A running load generator and where it will leave its tally."""

    process: subprocess.Popen[bytes]
    tally_path: Path


def chat_body(
    model: str, tokens: int, is_stream: bool, prompt: str = PROMPT, more: Mapping[str, object] | None = None
) -> str:
    """An ordinary call as clients write it: one message, a limit, and sampling left at its default but for
    `more`."""
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
    }
    if is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body | dict(more or {}))


def run_load(target: Target, load: Load) -> Run:
    """Drive `load` against `target` and wait for its end. Raises `GeneratorFailed`."""
    plan = make_load_plan(target, load, time.monotonic() + START_SECONDS)
    with tempfile.TemporaryDirectory(prefix="tidegate-generator-") as folder:
        generator = start_generator(plan, Path(folder))
        try:
            return _follow(target, generator, plan)
        finally:
            if generator.process.poll() is None:
                generator.process.kill()
                generator.process.wait()


def make_load_plan(target: Target, load: Load, start: float) -> LoadPlan:
    """Pure: the window opens when all clients have started, and a second later."""
    spread = load.spread_seconds or load.stream_seconds
    window_from = start - 0.01 if load.is_counted_at_once else start + spread + 1.0
    window_to = window_from + load.seconds
    return LoadPlan(
        host=target.host,
        port=target.port,
        path=CHAT_PATH,
        body=chat_body(target.model, load.tokens, load.is_stream, load.prompt, load.more),
        clients=load.clients,
        start_at=start,
        window_from=window_from,
        window_to=window_to,
        stop_at=window_to + 2 * load.stream_seconds + load.drain_seconds,
        spread_seconds=spread,
        key=target.key,
        backoff_seconds=load.backoff_seconds,
        with_gaps=load.is_stream,
        think_seconds=load.think_seconds,
        requests_per_client=load.requests_per_client,
    )


def _follow(target: Target, generator: Generator, plan: LoadPlan) -> Run:
    """Read everybody's CPU seconds at both ends of the window, then take the tally."""
    cores = sorted(os.sched_getaffinity(0))
    time.sleep(max(0.0, plan.window_from - time.monotonic()))
    before, busy_before = _cpu_of(target, generator), machine_busy_seconds(cores)
    with contextlib.suppress(subprocess.TimeoutExpired):  # most generators work to the end of the window
        generator.process.wait(max(0.0, plan.window_to - time.monotonic()))
    after, busy_after = _cpu_of(target, generator), machine_busy_seconds(cores)
    seconds = time.monotonic() - plan.window_from
    tally = finish_generator(generator, plan.stop_at - time.monotonic() + 20)
    after.setdefault("generator", tally.cpu_seconds)
    cpu = {role: after[role] - before.get(role, 0.0) for role in after}
    others = busy_after - busy_before - sum(cpu.values())
    return Run(tally, cpu, max(0.0, others) / seconds)


def start_generator(plan: LoadPlan, folder: Path) -> Generator:
    """Plan and tally pass through files: a tally is larger than a pipe's buffer and is read late."""
    plan_path, tally_path = folder / "plan.json", folder / "tally.json"
    plan_path.write_bytes(msgspec.json.encode(plan))
    command = [python(), "-m", "loadtests.generator", str(plan_path), str(tally_path)]
    return Generator(
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY),
        tally_path,
    )


def finish_generator(generator: Generator, seconds: float) -> Tally:
    """Wait for its end. Raises `GeneratorFailed`."""
    _, errors = generator.process.communicate(timeout=seconds)
    if generator.process.returncode != 0 or not generator.tally_path.exists():
        raise GeneratorFailed(
            f"the generator ended with status {generator.process.returncode}:\n{errors.decode()[-2000:]}"
        )
    return msgspec.json.decode(generator.tally_path.read_bytes(), type=Tally)


def _cpu_of(target: Target, generator: Generator) -> dict[str, float]:
    found = {role: cpu_seconds(pid) for role, pid in target.process_ids.items()}
    if generator.process.poll() is None:
        found["generator"] = cpu_seconds(generator.process.pid)
    return found
