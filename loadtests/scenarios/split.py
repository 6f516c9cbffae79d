"""What a process of its own for the engine could gain a replica, and what it would cost. CPU seconds only, so
that a busy machine changes little.

Engine thread and event loop share one interpreter. While the loop runs, the engine may wait for the lock,
and never longer than the loop runs: so the loop's CPU time bounds the gain. Against it stands what the frames
between two processes would cost: each step's outputs packed, sent, received and read.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadtests.context import Context
from loadtests.figures import Figure, Section, middle, ratio
from loadtests.machine import parse_stat_seconds
from loadtests.measure import Load, run_load
from loadtests.scenarios.engine import demo_path, endless_copy
from loadtests.stack import EngineShape, start_platform
from tidegate.engines.base import StepOutput
from tidegate.engines.frames import receive, send
from tidegate.messages.work import Tokens

STREAMS = (1, 16, 64)
TOKENS = 128
FRAMES = 2000
TEXT = " tide"  # of one token


@dataclass(frozen=True, slots=True)
class Measured:
    """CPU seconds of the replica's two threads, for so many tokens."""

    streams: int
    tokens: int
    engine: float
    loop: float


def run(context: Context) -> Section:
    checkpoint = endless_copy(demo_path(context), context.folder / "checkpoint")
    engine = ("--engine", "transformers", "--path", str(checkpoint), "--args", '{"threads": 1}')
    found: list[Measured] = []
    with context.processes() as processes:
        shape = EngineShape(slots=max(STREAMS), step_ms=0)
        platform = start_platform(processes, shape, engine=engine, model="demo")
        replica = platform.replicas[0].pid
        for _ in range(context.rounds):
            for streams in STREAMS:
                load = Load(
                    streams,
                    TOKENS,
                    seconds=300.0,
                    spread_seconds=1e-6,
                    requests_per_client=1,
                    is_counted_at_once=True,
                )
                before = thread_seconds(replica)
                tally = run_load(platform.target, load).tally
                found.append(of_threads(replica, streams, tally.tokens, before, thread_seconds(replica)))
    return summarize(found, {streams: frame_seconds(streams) for streams in STREAMS})


def of_threads(
    replica: int, streams: int, tokens: int, before: Mapping[int, float], after: Mapping[int, float]
) -> Measured:
    """The main thread runs the event loop; of the others the one that did most is the engine's. Pure."""
    used = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
    loop = used.pop(replica)
    return Measured(streams, tokens, max(used.values()), loop)


def summarize(found: list[Measured], frames: Mapping[int, tuple[float, float]]) -> Section:
    """Pure. `frames`: CPU seconds for one step's frame of so many streams, to write and to read it."""
    section = Section("split", "Engine and event loop of a replica: CPU ms per 1,000 tokens, demo model")
    for streams, (writing, reading) in frames.items():
        rows = [one for one in found if one.streams == streams]
        engine = middle([1e6 * ratio(one.engine, one.tokens) for one in rows])
        loop = middle([1e6 * ratio(one.loop, one.tokens) for one in rows])
        write, read = 1e6 * writing / streams, 1e6 * reading / streams
        name = f"{streams} streams:"
        section.figures += [
            Figure(f"{name} engine thread", engine, "ms", None, 1),
            Figure(f"{name} event loop", loop, "ms", None, 1),
            Figure(f"{name} writing frames", write, "ms", None, 1),
            Figure(f"{name} reading frames", read, "ms", None, 1),
            Figure(f"{name} most that a split gains", 100 * ratio(loop - write, engine), "%", None, 1),
        ]
    return section


def thread_seconds(pid: int) -> dict[int, float]:
    """CPU seconds of each thread of a process."""
    return {
        int(thread.name): parse_stat_seconds((thread / "stat").read_text())
        for thread in Path(f"/proc/{pid}/task").glob("*")
    }


def frame_seconds(streams: int) -> tuple[float, float]:
    """CPU seconds that it takes to write and to read the frame of one step."""
    outputs = [StepOutput(os.urandom(8).hex(), Tokens([1000], TEXT), 32, None) for _ in range(streams)]
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(list[StepOutput])
    writing = reading = 0.0
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(FRAMES):
            began = time.thread_time()
            send(theirs, encoder.encode(outputs))
            sent = time.thread_time()
            frame = receive(ours)
            assert frame is not None
            decoder.decode(frame)
            writing += sent - began
            reading += time.thread_time() - sent
    return writing / FRAMES, reading / FRAMES
