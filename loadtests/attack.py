"""Attack a platform within bounds, while a well-behaved caller measures what it notices of that.

    python -m loadtests.attack --minutes 10                            # a platform of its own
    python -m loadtests.attack --url http://HOST:PORT --key ATTACKER --innocent-key KEY \\
        --model NAME --innocent-model NAME --pid gateway=PID --pid redis=PID

Each attack is one client in a loop, so many of them at once; all have a key but those that need none. The
innocent caller streams from a model of its own, one answer after another, asks for a whole answer in between,
and asks `/livez`. It prints the worst that it saw of each, and the most memory of each process named.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from loadtests.machine import Processes, resident_bytes, wait_for
from loadtests.measure import Target
from loadtests.run import external_target
from loadtests.stack import EngineShape, answers, register, replica_command, start_platform
from tidegate.messages.queue import QueueLimits
from tidegate.store.connection import Connection

ATTACKED, INNOCENT = "attacked", "innocent"
SHAPE = EngineShape(slots=64, step_ms=20)
MAX_MEMORY = "1gb"  # of the chart's Redis
NAP_SECONDS = 0.02
CALM_SECONDS = 20.0  # before the attack: what the machine itself does to a caller
MEGABYTE = 1_000_000
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Door:
    """The address that is attacked, with the attacker's key and model."""

    host: str
    port: int
    key: str
    model: str

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, limit=4096)

    def head(self, size: int, *, more: str = "", path: str = CHAT) -> bytes:
        lines = [f"POST {path} HTTP/1.1", f"host: {self.host}", "content-type: application/json"]
        lines += [f"authorization: Bearer {self.key}", f"content-length: {size}", "connection: close"]
        return ("\r\n".join(lines) + f"\r\n{more}\r\n").encode()

    def chat(self, content: str = "Hello", messages: int = 1, **changes: Any) -> bytes:
        return made_once(self.model, content, messages, tuple(changes.items()))


# What is sent is made once: a client that makes megabytes each time attacks itself.
@cache
def made_once(model: str, content: str, messages: int, changes: tuple[tuple[str, Any], ...]) -> bytes:
    said = [{"role": "user", "content": content}] * messages
    return json.dumps({"model": model, "messages": said, **dict(changes)}).encode()


@cache
def packed_blanks() -> bytes:
    return gzip.compress(b" " * (200 * MEGABYTE))


async def post(
    door: Door, body: bytes, *, more: str = "", reads: bool = True, stay_seconds: float = 0
) -> str:
    """Send a call; its status, or `unread` where nobody reads the answer and the client only stays."""
    reader, writer = await door.open()
    try:
        writer.write(door.head(len(body), more=more) + body)
        with suppress(OSError):  # refused before all of it was sent
            await writer.drain()
        if not reads:
            await asyncio.sleep(stay_seconds)
            return "unread"
        line = await asyncio.wait_for(reader.readline(), 60)
        while await asyncio.wait_for(reader.read(65536), 60):
            continue
        return line.split(b" ")[1].decode() if b" " in line else "closed"
    finally:
        writer.transport.abort()


LARGE = "w " * (4 * MEGABYTE - 5000)


async def large_bodies_of_many(door: Door) -> str:
    return await post(door, door.chat(LARGE, n=128))


async def large_bodies(door: Door) -> str:
    return await post(door, door.chat(LARGE, max_tokens=5))


async def many_small_parts(door: Door) -> str:
    return await post(door, door.chat("x", messages=150_000, max_tokens=5))


async def deep_json(door: Door) -> str:
    return await post(door, b"[" * (4 * MEGABYTE))


async def gzip_bomb(door: Door) -> str:
    return await post(door, packed_blanks(), more="content-encoding: gzip\r\n")


async def unread_streams(door: Door) -> str:
    body = door.chat(n=32, logprobs=True, top_logprobs=5, max_tokens=8000, stream=True)
    return await post(door, body, reads=False, stay_seconds=60)


async def unread_wholes(door: Door) -> str:
    return await post(
        door, door.chat(n=64, logprobs=True, top_logprobs=20, max_tokens=8000), reads=False, stay_seconds=60
    )


async def clients_that_leave(door: Door) -> str:
    return await post(door, door.chat(n=16, max_tokens=500, stream=True), reads=False, stay_seconds=0.05)


async def floods(door: Door) -> str:
    """Fill the line: more at once than may wait."""
    body = door.chat(n=128, max_tokens=200)
    return Counter(await asyncio.gather(*(post(door, body) for _ in range(10)))).most_common(1)[0][0]


async def half_heads(door: Door) -> str:
    """Needs no key."""
    reader, writer = await door.open()
    try:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-a: ")
        await asyncio.wait_for(reader.read(), 90)
        return "closed"
    finally:
        writer.transport.abort()


async def header_bombs(door: Door) -> str:
    """Needs no key."""
    reader, writer = await door.open()
    try:
        writer.write(b"GET / HTTP/1.1\r\n" + b"x-a: b\r\n" * 500_000)
        return (await asyncio.wait_for(reader.readline(), 60)).split(b" ")[1].decode()
    finally:
        writer.transport.abort()


async def slow_bodies(door: Door) -> str:
    """7 MB at once, and then a byte in a while."""
    reader, writer = await door.open()
    try:
        writer.write(door.head(8 * MEGABYTE) + b" " * (7 * MEGABYTE))
        while not reader.at_eof():
            writer.write(b" ")
            await writer.drain()
            with suppress(TimeoutError):
                return (await asyncio.wait_for(reader.readline(), 5)).split(b" ")[1].decode()
        return "closed"
    finally:
        writer.transport.abort()


ATTACKS: dict[Callable[[Door], Awaitable[str]], int] = {  # and how many clients at once
    large_bodies_of_many: 3,
    large_bodies: 4,
    many_small_parts: 1,
    deep_json: 1,
    gzip_bomb: 1,
    unread_streams: 8,
    unread_wholes: 4,
    clients_that_leave: 2,
    floods: 1,
    half_heads: 400,
    header_bombs: 2,
    slow_bodies: 24,
}


@dataclass(slots=True)
class Noticed:
    """What the innocent caller saw, in seconds, with the time of day of the worst; and what went wrong.
    `machine` is how late the same process woke from short naps, which asks nobody."""

    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in ("gaps", "first_tokens", "wholes", "lives", "machine")}
    )
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)

    def note(self, name: str, seconds: float) -> None:
        self.seconds[name].append(seconds)
        if name not in self.worst or seconds > self.worst[name][0]:
            self.worst[name] = (seconds, time.strftime("%H:%M:%S"))


async def innocent_streams(door: Door, noticed: Noticed) -> None:
    body = door.chat(max_tokens=400, stream=True)
    while True:
        await asyncio.sleep(0)
        last = time.monotonic()
        reader, writer = await asyncio.open_connection(door.host, door.port)
        try:
            writer.write(door.head(len(body)) + body)
            status = (await reader.readline()).split(b" ")[1].decode()
            is_first = True
            async for line in reader:
                if not line.startswith(b"data: "):
                    continue
                now = time.monotonic()
                noticed.note("first_tokens" if is_first else "gaps", now - last)
                last, is_first = now, False
                if b'"error"' in line:
                    noticed.failures["error in the stream"] += 1
                if b"[DONE]" in line:
                    break
            if status != "200":
                noticed.failures[f"stream {status}"] += 1
                await asyncio.sleep(0.2)
        except (OSError, IndexError) as error:
            noticed.failures[f"stream {type(error).__name__}"] += 1
            await asyncio.sleep(0.2)
        finally:
            writer.transport.abort()


async def innocent_wholes(door: Door, noticed: Noticed) -> None:
    while True:
        began = time.monotonic()
        try:
            status = await post(door, door.chat(max_tokens=1))
        except (OSError, TimeoutError) as error:
            status = type(error).__name__
        noticed.note("wholes", time.monotonic() - began)
        if status != "200":
            noticed.failures[f"whole answer {status}"] += 1
        await asyncio.sleep(0.2)


async def innocent_lives(door: Door, noticed: Noticed) -> None:
    while True:
        began = time.monotonic()
        try:
            reader, writer = await door.open()
            writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            if b" 200 " not in await asyncio.wait_for(reader.readline(), 30):
                noticed.failures["livez"] += 1
            writer.transport.abort()
        except (OSError, TimeoutError) as error:
            noticed.failures[f"livez {type(error).__name__}"] += 1
        noticed.note("lives", time.monotonic() - began)
        await asyncio.sleep(0.1)


async def attack_forever(
    attack: Callable[[Door], Awaitable[str]], door: Door, outcomes: Counter[str]
) -> None:
    while True:
        try:
            outcome = await attack(door)
        except (OSError, TimeoutError, IndexError) as error:
            outcome = type(error).__name__
        outcomes[f"{attack.__name__}: {outcome}"] += 1
        await asyncio.sleep(0.05)


async def watch_memory(pids: dict[str, int], most: dict[str, int]) -> None:
    while True:
        for role, pid in pids.items():
            with suppress(psutil.Error):
                most[role] = max(most.get(role, 0), resident_bytes(pid))
        await asyncio.sleep(0.2)


async def naps(noticed: Noticed) -> None:
    while True:
        due = time.monotonic() + NAP_SECONDS
        await asyncio.sleep(NAP_SECONDS)
        noticed.note("machine", time.monotonic() - due)


async def innocent(door: Door, noticed: Noticed) -> None:
    await asyncio.gather(
        innocent_streams(door, noticed),
        innocent_wholes(door, noticed),
        innocent_lives(door, noticed),
        naps(noticed),
    )


async def run_for(seconds: float, *work: Awaitable[None]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*work)


def table(when: str, noticed: Noticed) -> str:
    lines = [f"| the innocent, {when} | times | p99 s | worst s | at |", "| --- | --- | --- | --- | --- |"]
    for name, (worst, at) in noticed.worst.items():
        values = sorted(noticed.seconds[name])
        p99 = values[int(len(values) * 0.99)]
        lines.append(f"| {name} | {len(values)} | {p99:.3f} | {worst:.3f} | {at} |")
    return "\n".join([*lines, "", f"failures: {dict(noticed.failures) or 'none'}", ""])


@contextmanager
def own_platform(folder: Path) -> Iterator[tuple[Target, Target]]:
    """Redis with the chart's memory, a gateway, and a replica for each of two models."""
    with Processes(folder) as processes:
        platform = start_platform(processes, SHAPE, QueueLimits(), model=ATTACKED)
        asyncio.run(_limit_memory(platform.redis_url))
        key = asyncio.run(register(platform.redis_url, INNOCENT, QueueLimits()))
        replica = processes.start(
            "innocent-replica", replica_command(platform.redis_url, INNOCENT, SHAPE, ())
        )
        target = platform.target
        other = Target("innocent", target.host, target.port, INNOCENT, key)
        wait_for(replica, answers(other), 180.0, "answer through the gateway")
        yield target, other


async def _limit_memory(redis_url: str) -> None:
    async with Connection(redis_url) as connection:
        await connection.call("CONFIG", "SET", "maxmemory", MAX_MEMORY)


def attack(target: Target, other: Target, seconds: float) -> str:
    """Attack `target` for so long; what the innocent of `other` noticed before and meanwhile, as tables."""
    door = Door(target.host, target.port, target.key, target.model)
    calm = Door(other.host, other.port, other.key, other.model)
    outcomes: Counter[str] = Counter()
    most: dict[str, int] = {}
    packed_blanks()
    before = start_innocent(calm, CALM_SECONDS).recv()
    meanwhile = start_innocent(calm, seconds)
    clients = [attack_forever(one, door, outcomes) for one, count in ATTACKS.items() for _ in range(count)]
    asyncio.run(run_for(seconds, watch_memory(dict(target.process_ids), most), *clients))
    lines = [f"{role}: at most {size / 1e6:.0f} MB" for role, size in most.items()]
    lines += ["", *(f"{what}: {count}" for what, count in sorted(outcomes.items()))]
    return "\n".join([table("before", before), table("meanwhile", meanwhile.recv()), *lines])


def start_innocent(door: Door, seconds: float) -> Any:
    """Give a pipe that brings what the innocent caller noticed. It is a process of its own: the attackers'
    work must not delay its clock."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    context.Process(target=_innocent_process, args=(door, seconds, sending), daemon=True).start()
    return receiving


def _innocent_process(door: Door, seconds: float, sending: Any) -> None:
    noticed = Noticed()
    asyncio.run(run_for(seconds, innocent(door, noticed)))
    sending.send(noticed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.attack", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--url", help="attack this running platform instead of starting one")
    parser.add_argument("--key", default="", help="the attacker's key")
    parser.add_argument("--innocent-key", default="")
    parser.add_argument("--model", default=ATTACKED)
    parser.add_argument("--innocent-model", default=INNOCENT)
    parser.add_argument("--pid", action="append", default=[], metavar="ROLE=PID")
    options = parser.parse_args(arguments)
    seconds = options.minutes * 60
    target = external_target(options.url, options.key, options.model, options.pid)
    if target is not None:
        other = Target("innocent", target.host, target.port, options.innocent_model, options.innocent_key)
        print(attack(target, other, seconds))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="tidegate-attack-"))
    print(f"logs in {folder}", flush=True)
    with own_platform(folder) as (target, other):
        print(attack(target, other, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
