"""`python -m loadtests.redis_clients CLIENT URL QUESTION ...`: one client of Redis, one question, JSON out.

Each runs in a process of its own, on uvloop as the gateway does, so that its CPU seconds are its own. The
call is what a submit is: EVALSHA with 17 arguments, the body of a request among them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha1
from itertools import pairwise
from typing import Any

import uvloop

SCRIPT = "return {ARGV[1], #ARGV, '0', 1}"
SHA = sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
ARGUMENTS: list[str | bytes | int | float] = [
    "1732500000.123",
    0,
    1,
    "model--0123456789",
    "tenant",
    "gw-0123456789ab",
    *[10_000] * 6,
]
ARGUMENTS += ["cmpl-0123456789abcdef.0", 1732500300.5, 0, 128, b"x" * 600]
CHANNEL = "loadtests:messages"
LAST = b"last"


@dataclass(frozen=True, slots=True)
class Client:
    """`call` is one EVALSHA. `listen` calls back with each message until it is cancelled."""

    call: Callable[[], Awaitable[Any]]
    listen: Callable[[Callable[[bytes], None], Callable[[], None]], Coroutine[Any, Any, None]]


@asynccontextmanager
async def ours(url: str, _: int) -> AsyncIterator[Client]:
    from tidegate.store.connection import Connection, Script

    script = Script(SCRIPT, SHA)
    async with Connection(url, patience_seconds=20) as connection:

        async def listen(receive: Callable[[bytes], None], ready: Callable[[], None]) -> None:
            await connection.subscribe(CHANNEL, receive)
            ready()
            await asyncio.Event().wait()

        yield Client(lambda: connection.run(script, "p:", *ARGUMENTS, repeat=True), listen)


@asynccontextmanager
async def redis_py(url: str, concurrency: int) -> AsyncIterator[Client]:
    from redis.asyncio import BlockingConnectionPool, Redis

    # As many connections as callers, up to the pool's own bound.
    pool = BlockingConnectionPool.from_url(url, max_connections=min(100, concurrency), timeout=20, protocol=3)
    async with Redis(connection_pool=pool) as client:
        await client.script_load(SCRIPT)

        async def listen(receive: Callable[[bytes], None], ready: Callable[[], None]) -> None:
            async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe(CHANNEL)
                await pubsub.get_message(timeout=1)
                ready()
                async for message in pubsub.listen():
                    receive(message["data"])

        yield Client(lambda: client.evalsha(SHA, 1, "p:", *ARGUMENTS), listen)


@asynccontextmanager
async def coredis(url: str, concurrency: int) -> AsyncIterator[Client]:
    from coredis import Redis  # type: ignore[import-not-found, unused-ignore]

    async with Redis.from_url(url, max_connections=min(100, concurrency)) as client:
        await client.script_load(SCRIPT)

        async def listen(receive: Callable[[bytes], None], ready: Callable[[], None]) -> None:
            async with client.pubsub(channels=[CHANNEL], ignore_subscribe_messages=True) as pubsub:
                ready()
                async for message in pubsub:
                    receive(message["data"])

        async def call() -> Any:
            return await client.evalsha(SHA, keys=["p:"], args=ARGUMENTS)

        yield Client(call, listen)


CLIENTS = {"ours": ours, "redis-py": redis_py, "coredis": coredis}


async def measure_calls(client: Client, concurrency: int, seconds: float) -> dict[str, Any]:
    """Closed loop. Latencies in seconds."""
    latencies: list[float] = []
    await client.call()
    cpu, began = time.process_time(), time.perf_counter()

    async def caller() -> None:
        while (start := time.perf_counter()) - began < seconds:
            await client.call()
            latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    wall = time.perf_counter() - began
    return {
        "calls": len(latencies),
        "seconds": wall,
        "cpu": time.process_time() - cpu,
        "latencies": latencies,
    }


async def measure_messages(client: Client) -> dict[str, Any]:
    """Receive what the parent lets Redis publish, up to the last message."""
    count = 0
    over = asyncio.Event()

    def receive(message: bytes) -> None:
        nonlocal count
        count += 1
        if message == LAST:
            over.set()

    ready = asyncio.Event()
    listening = asyncio.create_task(client.listen(receive, ready.set))
    await ready.wait()
    print("ready", flush=True)
    cpu = time.process_time()
    await over.wait()
    cpu = time.process_time() - cpu
    listening.cancel()
    await asyncio.wait({listening})
    return {"messages": count, "cpu": cpu}


async def measure_breaks(client: Client, concurrency: int, seconds: float) -> dict[str, Any]:
    """Call while the parent kills all connections again and again: errors, and the longest gap."""
    errors: dict[str, int] = {}
    answered: list[float] = []
    await client.call()
    print("ready", flush=True)
    began = time.perf_counter()

    async def caller() -> None:
        while time.perf_counter() - began < seconds:
            try:
                await client.call()
                answered.append(time.perf_counter())
            except Exception as error:
                errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1
                await asyncio.sleep(0.001)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    gaps = [after - before for before, after in pairwise(answered)]
    return {"calls": len(answered), "errors": errors, "gap": max(gaps, default=0.0)}


async def main(name: str, url: str, question: str, concurrency: int, seconds: float) -> None:
    async with CLIENTS[name](url, concurrency) as client:
        if question == "calls":
            found = await measure_calls(client, concurrency, seconds)
        elif question == "messages":
            found = await measure_messages(client)
        else:
            found = await measure_breaks(client, concurrency, seconds)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5])))
