"""Whether a claim that prefers the replica that holds the prefix is worth it, and what it costs the others.

    python -m loadtests.affinity [--seconds 30] [--rounds 3] [--loads 0.3 0.7 1.1]

The real queue on a real Redis, and eight real replicas, each a process, with a simulated engine: four slots
and a prefix cache of sixteen such prompts; a token that it holds costs no prefill. (On one event loop the
replicas would always hear of a request in the same order.) The same arrivals (Poisson) run without and with,
in turn; *without*, prompts have no chains, so whoever claims first takes what came first. At a load of 1 the
replicas are just busy where no prefix is ever found.

Traffic: `one` prompt of 1,000 tokens that all requests begin with, `many` of them (more than a replica
holds), and `chats` that grow turn by turn. Three in ten requests are others: short ones that share nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

from loadtests.machine import Processes, python
from loadtests.stack import START_SECONDS, start_redis
from tidegate.messages.prefixes import prefix_chain
from tidegate.messages.queue import Accepted, Bounds, QueueLimits
from tidegate.messages.work import Finish, Generate, Request, Sampling, Segment, TextPrompt, Work
from tidegate.replica_args import Times
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.store.queue import GatewayQueue

MODEL, REVISION = "m", "r"
REPLICAS, SLOTS = 8, 4
STEP_MS, PREFILL_MS_PER_1K, ANSWER_TOKENS = 40.0, 250.0, 16
PREFIX_CHARACTERS = 4000  # 1,000 tokens of the simulated engine
CACHE_TOKENS = 16_000  # of each replica
MANY, CHATS, TURNS = 64, 48, 6
OTHERS = 0.3  # their share
BOUNDS = Bounds(QueueLimits(max_requests=10_000), *(10_000, 1 << 30) * 3)
# Of a replica, for one request, where nothing is found: steps are shared by the slots, prefills are not.
COLD_SECONDS = STEP_MS / 1000 * ANSWER_TOKENS / SLOTS + (1 - OTHERS) * PREFILL_MS_PER_1K / 1000


@dataclass
class Arrival:
    at: float  # seconds from the start
    text: str
    is_other: bool
    is_known: bool = False  # another began as this one did


@dataclass
class Ear:
    """When the first and the last of each request came."""

    firsts: dict[str, float] = field(default_factory=dict)
    ends: dict[str, Finish] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def deliver(self, segments: list[Segment]) -> None:
        now = time.monotonic()
        for segment in segments:
            self.firsts.setdefault(segment.request_id, now)
            if segment.finish is not None:
                self.ends[segment.request_id] = segment.finish
                self.ended.set()


@dataclass(frozen=True)
class Figures:
    """Of one run: the share of prompts that found most of themselves, of those that others began with before;
    the share of all their tokens that were found; times to the first token (seconds), and of the others."""

    hits: float
    cached: float
    sharers: list[float]
    others: list[float]


def no_chain(tenant: str, work: Work) -> bytes:  # noqa: ARG001 - in the place of `prefix_chain`
    return b""


def words(draw: random.Random, characters: int) -> str:
    return draw.randbytes(characters // 2).hex()


def arrivals(traffic: str, per_second: float, seconds: float, seed: int) -> list[Arrival]:
    draw = random.Random(seed)
    prefixes = [words(draw, PREFIX_CHARACTERS) for _ in range(1 if traffic == "one" else MANY)]
    chats = [""] * CHATS
    found, at, known = [], 0.0, set()
    while (at := at + draw.expovariate(per_second)) < seconds:
        if draw.random() < OTHERS:
            found.append(Arrival(at, words(draw, 200), True))
        elif traffic == "chats":
            turn = draw.randrange(CHATS)
            if len(chats[turn]) > TURNS * 1500:
                chats[turn] = ""
            is_known = bool(chats[turn])
            chats[turn] = (chats[turn] or words(draw, 2000)) + words(draw, 1200)
            found.append(Arrival(at, chats[turn], False, is_known))
        else:
            prefix = draw.choice(prefixes)
            found.append(Arrival(at, prefix + words(draw, 200), False, prefix in known))
            known.add(prefix)
    return found


@asynccontextmanager
async def platform(
    processes: Processes, url: str, key_prefix: str
) -> AsyncIterator[tuple[GatewayQueue, Ear]]:
    """A gateway's end of the queue, and replicas that listen."""
    engine = {
        "step_ms": STEP_MS,
        "prefill_ms_per_1k": PREFILL_MS_PER_1K,
        "prefix_cache_tokens": CACHE_TOKENS,
    }
    command = [python(), "-m", "tidegate.serving", "--redis-url", url, "--key-prefix", key_prefix]
    command += ["--model", MODEL, "--revision", REVISION, "--engine", "simulated"]
    command += ["--slots", str(SLOTS), "--args", json.dumps(engine)]
    channel = names.wake_channel(key_prefix, names.queue_name(MODEL, REVISION))
    async with Connection(url) as connection:
        gateway = GatewayQueue(connection, key_prefix=key_prefix, gateway_id="gw", times=Times())
        ear = Ear()
        await gateway.start(ear.deliver, lambda: None)
        replicas = [processes.start(f"{key_prefix}-{number}", command) for number in range(REPLICAS)]
        async with asyncio.timeout(START_SECONDS):
            while (await connection.call("PUBSUB", "NUMSUB", channel))[1] < REPLICAS:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        yield gateway, ear
        for replica in replicas:
            processes.stop(replica)
        await gateway.close()


async def one_run(processes: Processes, url: str, key_prefix: str, coming: Sequence[Arrival]) -> Figures:
    async with platform(processes, url, key_prefix) as (gateway, ear):
        begun, ids = time.monotonic(), count()
        sent: dict[str, tuple[float, Arrival]] = {}
        submits = []
        for arrival in coming:
            await asyncio.sleep(max(0.0, begun + arrival.at - time.monotonic()))
            now = time.time()
            name = f"{key_prefix}-{next(ids)}.0"
            work = Generate(TextPrompt(arrival.text), Sampling(seed=1, max_tokens=ANSWER_TOKENS))
            request = Request(
                id=name,
                tenant="t",
                model=MODEL,
                revision=REVISION,
                gateway="gw",
                created=now,
                deadline=now + 600,
                priority=0,
                cost=1,
                work=work,
            )
            sent[name] = time.monotonic(), arrival
            submits.append(asyncio.ensure_future(gateway.submit([request], BOUNDS)))
        assert all(isinstance(outcome, Accepted) for outcome in await asyncio.gather(*submits))
        while len(ear.ends) < len(sent):
            ear.ended.clear()
            await ear.ended.wait()
    waits = {name: ear.firsts[name] - at for name, (at, _) in sent.items()}
    sharers = [name for name, (_, arrival) in sent.items() if not arrival.is_other]
    ends = [ear.ends[name] for name in sharers]
    known = [ear.ends[name] for name in sharers if sent[name][1].is_known]
    return Figures(
        statistics.mean(2 * end.cached_tokens > end.prompt_tokens for end in known),
        sum(end.cached_tokens for end in ends) / sum(end.prompt_tokens for end in ends),
        [waits[name] for name in sharers],
        [waits[name] for name, (_, arrival) in sent.items() if arrival.is_other],
    )


def of(runs: Sequence[Figures]) -> str:
    def times(waits: list[float]) -> str:
        cuts = statistics.quantiles(waits, n=100)
        return f"{1000 * cuts[49]:6.0f} {1000 * cuts[98]:6.0f}"

    sharers, others = ([w for run in runs for w in getattr(run, name)] for name in ("sharers", "others"))
    hits, cached = (statistics.mean(getattr(run, name) for run in runs) for name in ("hits", "cached"))
    return f"{100 * hits:5.1f} % {100 * cached:5.1f} % | {times(sharers)} | {times(others)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.affinity", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.7, 1.1])
    parser.add_argument("--traffic", nargs="+", default=["one", "many", "chats"])
    options = parser.parse_args()
    print("traffic load          | found, tokens   | first token ms p50 p99: sharers | others", flush=True)
    with Processes(Path(mkdtemp(prefix="tidegate-affinity-"))) as processes:
        _, url = start_redis(processes)
        for traffic in options.traffic:
            for load in options.loads:
                per_second = load * REPLICAS / COLD_SECONDS
                runs: dict[bool, list[Figures]] = {False: [], True: []}
                for seed in range(options.rounds):
                    coming = arrivals(traffic, per_second, options.seconds, seed)
                    for has_affinity in (False, True):
                        key_prefix = f"{traffic}-{load}-{seed}-{has_affinity}"
                        chain = prefix_chain if has_affinity else no_chain
                        with patch("tidegate.store.scripts.prefix_chain", chain):
                            runs[has_affinity].append(
                                asyncio.run(one_run(processes, url, key_prefix, coming))
                            )
                for has_affinity, made in runs.items():
                    name = "with" if has_affinity else "without"
                    print(f"{traffic:6} {load:4.1f} {name:8} | {of(made)}", flush=True)


if __name__ == "__main__":
    main()
