"""Calls that are kept: how long, in how many bytes, and that nothing of them stays."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.queue_rig import BY_HAND, Rig, a_request, a_token, accept
from tests.waiting import await_until
from tidegate.messages.kept import KeptCall, gateway_of
from tidegate.messages.work import Segment
from tidegate.store.kept_calls import KeptCalls

NOW = 0.001  # seconds: over at the next sweep
PLENTY = 1 << 30


def a_call(call_id: str = "c", **changes: Any) -> KeptCall:
    values: dict[str, Any] = {
        "id": call_id,
        "tenant": "default",
        "path": "/v1/completions",
        "created": 1,
        "model": "m",
        "revision": "r1",
        "context_length": 0,
        "sequences": 2,
        "body": b"{}",
        "messages": [{"role": "user", "content": "hi", "huge": 1 << 70}],
    }
    return KeptCall(**(values | changes))


@pytest.fixture
async def kept(rig: Rig) -> KeptCalls:
    return KeptCalls(await rig.connect(), key_prefix=rig.key_prefix, times=BY_HAND)


async def keep(kept: KeptCalls, call: KeptCall, *, seconds: float = 60, linger: float = 60) -> str:
    return await kept.keep(
        call, seconds=seconds, linger_seconds=linger, tenant_bytes=PLENTY, total_bytes=PLENTY
    )


async def leftovers(rig: Rig) -> list[str]:
    """The keys that speak of kept calls or of their requests."""
    connection = await rig.connect()
    keys = await connection.call("KEYS", f"{rig.key_prefix}:*")
    names = [key.decode().removeprefix(f"{rig.key_prefix}:") for key in keys]
    kinds = ("call", "kept", "kept_bytes", "req", "log", "open")
    return [name for name in names if name.split(":")[0] in kinds]


def requests_of(call_id: str) -> list[Any]:
    return [a_request(id=f"{call_id}.{index}", gateway=gateway_of(call_id)) for index in range(2)]


async def test_a_kept_call_outlives_its_gateway_and_its_end_and_then_goes_whole(
    rig: Rig, kept: KeptCalls
) -> None:
    gateway, _ = await rig.gateway()
    replica, sweeper = await rig.replica(), await rig.sweeper()
    call = a_call()
    assert await keep(kept, call, seconds=NOW) == ""
    await accept(gateway, *requests_of("c"))
    claims = await replica.queue.claim(2)
    await replica.queue.emit([(1, a_token(claim, 0, "a")) for claim in claims])
    await gateway.close()
    gateway.forget([claim.request.id for claim in claims])
    await sweeper.sweep()
    assert await kept.find("c", "default") == call
    assert await kept.state("c.0") == "running"
    await replica.queue.emit([(1, a_token(claim, 1, "b", "stop")) for claim in claims])
    for claim in claims:
        log = await gateway.replay(claim.request.id)
        assert log is not None and [segment.output.text for segment in log] == ["a", "b"]
    # It lingers for a minute from its beginning; after the end its seconds count where they are more.
    assert await sweeper.sweep() == 0
    await kept.unkeep("c", "read")
    assert await kept.find("c", "default") is None
    assert await leftovers(rig) == []


async def test_after_its_end_a_call_stays_for_its_seconds(rig: Rig, kept: KeptCalls) -> None:
    gateway, _ = await rig.gateway()
    replica, sweeper = await rig.replica(), await rig.sweeper()
    await keep(kept, a_call(), seconds=60, linger=NOW)
    await accept(gateway, *requests_of("c"))
    claims = await replica.queue.claim(2)
    await replica.queue.emit([(1, a_token(claim, 0, "a", "stop")) for claim in claims])
    await sweeper.sweep()
    assert await kept.find("c", "default") is not None


async def test_one_that_nobody_reads_is_cancelled_when_its_time_is_over(rig: Rig, kept: KeptCalls) -> None:
    gateway, _ = await rig.gateway()
    replica, sweeper = await rig.replica(), await rig.sweeper()
    await keep(kept, a_call(), linger=NOW)
    await accept(gateway, *requests_of("c"))
    [claim] = await replica.queue.claim(1)
    await replica.queue.emit([(1, a_token(claim, 0, "a"))])
    await await_until(sweeper.sweep)
    await await_until(lambda: claim.request.id in replica.cancelled)
    assert await kept.find("c", "default") is None
    assert await replica.queue.emit([(1, a_token(claim, 1, "b"))]) == [claim.request.id]
    assert await leftovers(rig) == []
    depth = await gateway.depth("m", "r1")
    assert (depth.waiting, depth.running) == (0, 0)


async def test_who_reads_it_keeps_it_and_hears_it_beside_others(rig: Rig, kept: KeptCalls) -> None:
    gateway, ear = await rig.gateway()
    replica = await rig.replica()
    heard: tuple[list[Segment], list[Segment]] = ([], [])
    await keep(kept, a_call(), linger=60)
    async with kept.following("c", heard[0].extend):
        await accept(gateway, *requests_of("c"))
        [claim, _] = await replica.queue.claim(2)
        await replica.queue.emit([(1, a_token(claim, 0, "a"))])
        await await_until(lambda: len(heard[0]) == 1)
        async with kept.following("c", heard[1].extend):
            await replica.queue.emit([(1, a_token(claim, 1, "b"))])
            await await_until(lambda: heard[0][1:] == heard[1] != [])
    await replica.queue.emit([(1, a_token(claim, 2, "c"))])
    async with kept.following("c", heard[1].extend):
        await replica.queue.emit([(1, a_token(claim, 3, "d"))])
        await await_until(lambda: len(heard[1]) == 2)
    assert [segment.seq for segment in heard[1]] == [1, 3]
    assert ear.segments == []
    await kept.close()


async def test_reading_puts_the_end_of_its_time_off(rig: Rig, kept: KeptCalls) -> None:
    gateway, _ = await rig.gateway()
    connection = await rig.connect()
    await keep(kept, a_call(), linger=60)
    await accept(gateway, *requests_of("c"))

    async def goes_at() -> float:
        return float(await connection.call("ZSCORE", f"{rig.key_prefix}:kept", "c"))

    before = await goes_at()
    async with kept.following("c", lambda _: None):
        await await_until(lambda: _later(goes_at, before))
    await kept.close()


async def _later(goes_at: Any, before: float) -> bool:
    later: bool = await goes_at() > before
    return later


async def test_bodies_count_at_once_and_logs_when_they_end(rig: Rig, kept: KeptCalls) -> None:
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    connection = await rig.connect()

    async def held() -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = await connection.call("HGETALL", f"{rig.key_prefix}:kept_bytes")
        return found

    await keep(kept, a_call(body=b"x" * 1000))
    before = int((await held())[b"of:default"])
    assert 1000 < before < 1200
    await accept(gateway, *requests_of("c"))
    claims = await replica.queue.claim(2)
    await replica.queue.emit([(1, a_token(claim, 0, "y" * 500, "stop")) for claim in claims])
    after = int((await held())[b"of:default"])
    assert 1000 < after - before < 1200
    for tenant, whose in (("default", "tenant"), ("other", "total")):
        call = a_call("d", tenant=tenant)
        found = await kept.keep(call, seconds=60, linger_seconds=60, tenant_bytes=after, total_bytes=after)
        assert found == whose
    await kept.unkeep("c", "read")
    assert await held() == {}


async def test_only_its_tenant_finds_it(rig: Rig, kept: KeptCalls) -> None:
    await keep(kept, a_call())
    assert await kept.find("c", "default") == a_call()
    assert await kept.find("c", "other") is None
    assert await kept.find("d", "default") is None
