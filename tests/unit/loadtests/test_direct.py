"""The baseline and the generator together, in one process: real sockets, the real simulated engine."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec

from loadtests.direct import Connection, DirectServer
from loadtests.generator import LoadPlan, Tally, drive, spread_pauses
from loadtests.measure import Load, Target, make_load_plan
from tests.waiting import await_until
from tidegate.engines.create import create_engine
from tidegate.replica_args import EngineSpec

TOKENS = 7


@asynccontextmanager
async def direct(slots: int = 4, step_ms: float = 0.0) -> AsyncIterator[tuple[DirectServer, int]]:
    loop = asyncio.get_running_loop()
    spec = EngineSpec("simulated", max_slots=slots, args={"step_ms": step_ms})
    server = DirectServer(create_engine(spec), loop)
    server.driver.start()
    try:
        async with await loop.create_server(lambda: Connection(server), "127.0.0.1", 0) as listener:
            yield server, listener.sockets[0].getsockname()[1]
    finally:
        server.driver.close()


def plan_for(port: int, clients: int, is_stream: bool, requests: int = 3) -> LoadPlan:
    load = Load(
        clients,
        TOKENS,
        seconds=30.0,
        is_stream=is_stream,
        spread_seconds=1e-6,
        requests_per_client=requests,
        is_counted_at_once=True,
    )
    return make_load_plan(Target("direct", "127.0.0.1", port, "simulated"), load, time.monotonic())


async def test_streams_are_counted_token_by_token() -> None:
    async with direct() as (server, port):
        tally = await drive(plan_for(port, clients=4, is_stream=True))
    assert tally.statuses == {"200": 12}
    assert tally.token_counts == {str(TOKENS): 12}
    assert tally.events == tally.tokens == 12 * TOKENS
    assert len(tally.ttft) == 12
    assert tally.tokens_per_event() == 1.0
    assert len(tally.gaps) <= 12 * (TOKENS - 1)
    assert _troubles(tally) == 0
    assert server.waiting == {}


async def test_more_clients_than_slots_wait_and_all_are_answered() -> None:
    async with direct(slots=2) as (_, port):
        tally = await drive(plan_for(port, clients=9, is_stream=False, requests=2))
    assert tally.statuses == {"200": 18}
    assert tally.token_counts == {str(TOKENS): 18}
    assert tally.window_finished == 18
    assert tally.busy_seconds() > 0
    assert _troubles(tally) == 0


async def test_a_client_that_leaves_frees_its_slot() -> None:
    async with direct(slots=1, step_ms=5.0) as (server, port):
        request = b'{"model":"m","messages":[],"max_tokens":8000,"stream":true}'
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(request) + request)
        await await_until(lambda: len(server.waiting) == 1)
        writer.close()
        await await_until(lambda: not server.waiting)
        tally = await drive(plan_for(port, clients=1, is_stream=True, requests=1))
    assert tally.statuses == {"200": 1}


async def test_what_is_unfinished_at_the_end_is_counted() -> None:
    async with direct(slots=1, step_ms=800.0) as (_, port):
        plan = replace_times(plan_for(port, clients=1, is_stream=True))
        tally = await drive(plan)
        assert tally.unfinished == 1
        assert tally.finished == 0


async def test_a_server_that_is_not_there_counts_as_connection_errors() -> None:
    async with direct() as (_, port):
        pass
    tally = await drive(replace_times(plan_for(port, clients=1, is_stream=True)))
    assert tally.connection_errors >= 1
    assert tally.statuses == {}


def test_a_plan_opens_its_window_when_all_clients_have_started() -> None:
    target = Target("platform", "127.0.0.1", 1, "m", "key")
    load = Load(8, 100, seconds=10.0, stream_seconds=2.0, think_seconds=0.02)
    plan = make_load_plan(target, load, 50.0)
    assert (plan.start_at, plan.window_from, plan.window_to) == (50.0, 53.0, 63.0)
    assert plan.stop_at > plan.window_to + load.stream_seconds
    assert '"stream": true' in plan.body
    assert make_load_plan(target, replace(load, is_counted_at_once=True), 50.0).window_from < 50.0


def test_pauses_fill_their_range_evenly() -> None:
    pauses = spread_pauses(1.0)
    found = sorted(next(pauses) for _ in range(100))
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert 0 <= found[0] <= found[-1] < 1
    assert max(gaps) < 0.03


def replace_times(plan: LoadPlan) -> LoadPlan:
    """The same plan, over in a moment."""
    now = time.monotonic()
    return msgspec.structs.replace(plan, window_to=now + 0.3, stop_at=now + 0.3, backoff_seconds=0.05)


def _troubles(tally: Tally) -> int:
    return tally.unfinished + tally.broken_streams + tally.connection_errors
