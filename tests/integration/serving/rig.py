"""A gateway's end of a real queue, replicas in this process or as processes, and what they should say."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from tests.engine_requests import add
from tests.waiting import await_until
from tidegate.engines.simulated import SimulatedEngine
from tidegate.messages.queue import Accepted, Bounds, QueueLimits
from tidegate.messages.work import Finish, Generate, Request, Sampling, Segment, TextPrompt
from tidegate.replica_args import EngineSpec, Times, parse_args
from tidegate.serving.process import ReplicaProcess
from tidegate.store.connection import Connection
from tidegate.store.queue import GatewayQueue

MODEL, REVISION = "m", "r1"
LEASE_SECONDS = 1.0
# A test that starts and stops servers must not wait long for the grace that follows a pause.
SWEEP = Times(
    orphan_seconds=3600, sweep_interval_seconds=0.2, sweep_pause_seconds=1.5, sweep_grace_seconds=1.0
)
BOUNDS = Bounds(QueueLimits(max_requests=10_000), *(10_000, 1 << 30) * 3)
_ids = itertools.count()


def a_request(prompt: str = "hello", *, max_tokens: int | None = 20, **changes: Any) -> Request:
    now = time.time()
    sampling = changes.pop("sampling", None) or Sampling(seed=7, max_tokens=max_tokens)
    values: dict[str, Any] = {
        "id": f"cmpl-{next(_ids)}.0",
        "tenant": "default",
        "model": MODEL,
        "revision": REVISION,
        "gateway": "gw",
        "created": now,
        "deadline": now + 300,
        "priority": 0,
        "cost": 10,
        "work": Generate(TextPrompt(prompt), sampling),
    }
    return Request(**(values | changes))


def demanding_requests(prompts: Sequence[str], tokens: int) -> list[Request]:
    """Everything that a continuation must rebuild: noise, penalties, partial characters, a stop buffer."""
    return [
        a_request(
            prompt,
            sampling=Sampling(
                seed=100 + number,
                max_tokens=tokens,
                temperature=0.9,
                top_p=0.95,
                presence_penalty=0.4,
                frequency_penalty=0.2,
                stop=("a stop string that does not come",),
                ignore_eos=True,
            ),
        )
        for number, prompt in enumerate(prompts)
    ]


def undisturbed(request: Request) -> str:
    """What an engine that nobody disturbs answers."""
    engine = SimulatedEngine(EngineSpec("simulated", args={"step_ms": 0.0}))
    engine.load()
    assert add(engine, request) is None
    text = ""
    while engine.has_work():
        text += "".join(output.output.text for output in engine.step())
    return text


class Ear:
    """Hears what a gateway would, and asserts order while it does. It replays what was published while its
    own connection was away, as a gateway does."""

    def __init__(self, queue: GatewayQueue) -> None:
        self.queue = queue
        self.heard: dict[str, list[Segment]] = defaultdict(list)
        self.finished: dict[str, Finish] = {}
        self.disorder: list[str] = []

    def deliver(self, segments: list[Segment]) -> None:
        for segment in segments:
            self.heard[segment.request_id].append(segment)
            if segment.finish is not None:
                if segment.request_id in self.finished:
                    self.disorder.append(f"{segment.request_id} ended twice")
                self.finished[segment.request_id] = segment.finish

    async def submit(self, *requests: Request) -> None:
        for request in requests:
            assert isinstance(await self.queue.submit([request], BOUNDS), Accepted)

    async def text(self, request_id: str) -> str:
        """From the log, which must be gapless, and must agree with all that was heard."""
        log = await self.queue.replay(request_id)
        assert log is not None
        assert [segment.seq for segment in log] == list(range(len(log)))
        heard = self.heard[request_id]
        seqs = [segment.seq for segment in heard]
        assert seqs == sorted(set(seqs)), "heard out of order or twice"
        assert all(segment == log[segment.seq] for segment in heard)
        return "".join(segment.output.text for segment in log)

    async def ended(self, *requests: Request, timeout: float = 30.0) -> list[Finish]:
        await await_until(lambda: all(request.id in self.finished for request in requests), timeout)
        assert self.disorder == []
        return [self.finished[request.id] for request in requests]

    def ids_of(self, request: Request) -> list[int]:
        return [token for segment in self.heard[request.id] for token in segment.output.token_ids]

    def tokens_of(self, request: Request) -> int:
        return len(self.ids_of(request))


@asynccontextmanager
async def open_ear(url: str, key_prefix: str, gateway_id: str = "gw") -> AsyncIterator[Ear]:
    async with Connection(url) as connection:
        queue = GatewayQueue(connection, key_prefix=key_prefix, gateway_id=gateway_id, times=SWEEP)
        ear = Ear(queue)
        await queue.start(ear.deliver, lambda: None)
        yield ear
        await queue.close()


def replica_args(url: str, key_prefix: str, **changes: Any) -> dict[str, Any]:
    """`engine_args` and `slots` go to the engine, times to the times, everything else replaces an argument of
    the replica."""
    engine_args = changes.pop("engine_args", {})
    slots = changes.pop("slots", 8)
    times = {"lease_seconds": LEASE_SECONDS, "drain_seconds": 5.0}
    times |= {name: changes.pop(name) for name in Times.__struct_fields__ if name in changes}
    values = {
        "model": MODEL,
        "revision": REVISION,
        "engine": {"name": "simulated", "max_slots": slots, "args": {"step_ms": 2.0, **engine_args}},
        "redis_url": url,
        "key_prefix": key_prefix,
        "times": times,
    }
    return values | changes


@asynccontextmanager
async def open_replica(url: str, key_prefix: str, **changes: Any) -> AsyncIterator[ReplicaProcess]:
    """A replica on this event loop (its engine has its thread), drained at the end."""
    async with AsyncExitStack() as stack:
        replica = ReplicaProcess(parse_args(replica_args(url, key_prefix, **changes)))
        await replica.start()
        stack.push_async_callback(replica.drain)
        yield replica


class ReplicaChild:
    """`python -m tidegate.serving` as a child process."""

    def __init__(self, url: str, key_prefix: str, **changes: Any) -> None:
        args = replica_args(url, key_prefix, **changes)
        command = [sys.executable, "-m", "tidegate.serving", "--model", MODEL, "--revision", REVISION]
        command += ["--redis-url", url, "--key-prefix", key_prefix]
        engine = args["engine"]
        command += ["--engine", engine["name"], "--path", engine.get("path", "")]
        command += ["--precision", engine.get("precision", "auto"), "--task", engine.get("task", "")]
        command += ["--slots", str(engine["max_slots"]), "--args", json.dumps(engine["args"])]
        for name, seconds in args["times"].items():
            command += [f"--{name.replace('_', '-')}", str(seconds)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.kill()


async def heard_from(ear: Ear, request: Request, tokens: int, timeout: float = 20.0) -> None:
    """Wait until `tokens` of `request` were heard."""
    enough: Callable[[], bool] = lambda: ear.tokens_of(request) >= tokens  # noqa: E731
    await await_until(enough, timeout)
