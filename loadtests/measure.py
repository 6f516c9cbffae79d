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

from loadtests.generator import Plan, Tally, merge
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
    """What the clients do. Seconds throughout; a request asks for `tokens` tokens.

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
    generators: int = 1
    requests_per_client: int = 0  # 0: until the window ends
    is_counted_at_once: bool = False  # the window opens with the first client and ends with the last


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


def chat_body(model: str, tokens: int, is_stream: bool, prompt: str = PROMPT) -> str:
    """An ordinary call as clients write it: one message, a limit, sampling left at its default."""
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
    }
    if is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body)


def run_load(target: Target, load: Load) -> Run:
    """Drive `load` against `target` and wait for its end. Raises `GeneratorFailed`."""
    start = time.monotonic() + START_SECONDS
    spread = load.spread_seconds or load.stream_seconds
    window_from = start - 0.01 if load.is_counted_at_once else start + spread + 1.0
    window_to = window_from + load.seconds
    share, odd = divmod(load.clients, load.generators)
    plans = [
        Plan(
            host=target.host,
            port=target.port,
            path=CHAT_PATH,
            body=chat_body(target.model, load.tokens, load.is_stream),
            clients=share + (1 if index < odd else 0),
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
        for index in range(load.generators)
    ]
    with tempfile.TemporaryDirectory(prefix="tidegate-generator-") as folder:
        generators = [
            start_generator(plan, _made(Path(folder) / str(index))) for index, plan in enumerate(plans)
        ]
        return _follow(target, generators, plans[0])


def _follow(target: Target, generators: list[Generator], plan: Plan) -> Run:
    try:
        time.sleep(max(0.0, plan.window_from - time.monotonic()))
        cores = sorted(os.sched_getaffinity(0))
        before, busy_before = _cpu_of(target, generators), machine_busy_seconds(cores)
        _wait_until(plan.window_to, generators)
        after, busy_after = _cpu_of(target, generators), machine_busy_seconds(cores)
        patience = plan.stop_at - time.monotonic() + 20
        tallies = [finish_generator(generator, patience) for generator in generators]
    finally:
        for generator in generators:
            if generator.process.poll() is None:
                generator.process.kill()
    cpu = {role: after[role] - before[role] for role in before}
    others = busy_after - busy_before - sum(cpu.values())
    return Run(merge(tallies), cpu, max(0.0, others) / (plan.window_to - plan.window_from))


def start_generator(plan: Plan, folder: Path) -> Generator:
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


def _wait_until(moment: float, generators: list[Generator]) -> None:
    """Sleep until then, or until all generators have done their share of requests and ended."""
    while (left := moment - time.monotonic()) > 0:
        running = [one for one in generators if one.process.poll() is None]
        if not running:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):  # looked at again above
            running[0].process.wait(left)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _cpu_of(target: Target, generators: list[Generator]) -> dict[str, float]:
    found = {role: cpu_seconds(pid) for role, pid in target.process_ids.items()}
    found["generator"] = sum(cpu_seconds(generator.process.pid) for generator in generators)
    return found
