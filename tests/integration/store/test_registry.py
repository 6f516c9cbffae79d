from __future__ import annotations

import asyncio
import time

import msgspec
from msgspec.structs import replace

from tests.contract.queue_rig import BY_HAND, MODEL, QUEUE, REVISION, a_request, a_token, accept, open_rig
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ModelEntry, ReplicaStats, RevisionReport
from tidegate.store.connection import Connection
from tidegate.store.queue import QueueDepths
from tidegate.store.registry import Registry


def an_entry(name: str = MODEL, **changes: object) -> ModelEntry:
    entry = ModelEntry(
        name=name,
        created=1,
        task="chat",
        engine="simulated",
        precision="float32",
        quantization="none",
        revisions={REVISION: 100},
        accepts=True,
        ready=True,
        reason="",
        message="",
    )
    return msgspec.structs.replace(entry, **changes)


def stats(replica: str, **changes: object) -> ReplicaStats:
    return msgspec.structs.replace(
        ReplicaStats(replica, MODEL, REVISION, 1, "node", 1.0, 2.0, 8, 3, 100, 12.5), **changes
    )


async def test_snapshots_follow_changes(redis_url: str, key_prefix: str) -> None:
    changes: list[int] = []
    async with Connection(redis_url) as one, Connection(redis_url) as two:
        writer = Registry(one, key_prefix=key_prefix)
        await writer.put_model(an_entry("old"))
        reader = Registry(two, key_prefix=key_prefix, changed=lambda: changes.append(1))
        await reader.start()
        assert dict(reader.models()) == {"old": an_entry("old")}
        await asyncio.gather(*(writer.put_model(an_entry(f"m{n}")) for n in range(20)))
        await writer.put_model(an_entry("m3", ready=False, message="Loading."))
        await writer.delete_model("old")
        await await_until(lambda: len(reader.models()) == 20 and not reader.models()["m3"].ready)
        assert dict(reader.models()) == await writer.read_models()
        assert 1 < len(changes) <= 23
        await reader.close()


async def test_snapshots_catch_up_after_a_restart(own_redis: RedisServer, key_prefix: str) -> None:
    async with Connection(own_redis.url) as connection:
        reader = Registry(connection, key_prefix=key_prefix)
        await reader.start()
        own_redis.kill()
        await await_until(lambda: not connection.is_connected)
        own_redis.start()
        async with Connection(own_redis.url) as other:
            await Registry(other, key_prefix=key_prefix).put_model(an_entry())
        await await_until(lambda: reader.models())
        assert dict(reader.models()) == {MODEL: an_entry()}
        await reader.close()


async def test_the_newest_report_of_a_revision_stays(connection: Connection, key_prefix: str) -> None:
    registry = Registry(connection, key_prefix=key_prefix)
    failed = RevisionReport(MODEL, "r1", 1.0, False, "OutOfMemory", "Too little memory.")
    proved = RevisionReport(MODEL, "r1", 2.0, True, notes=["a fallback"], slots=8)
    other = RevisionReport(MODEL, "r2", 1.5, True)
    for report in (failed, other, proved):
        await registry.report(report)
    assert await registry.reports() == {(MODEL, "r1"): proved, (MODEL, "r2"): other}
    assert await registry.reports([(MODEL, "r1"), (MODEL, "r3")]) == {(MODEL, "r1"): proved}
    assert await registry.reports([]) == {}


async def test_models_are_read_by_name(connection: Connection, key_prefix: str) -> None:
    registry = Registry(connection, key_prefix=key_prefix)
    one, other = an_entry(), msgspec.structs.replace(an_entry(), name="other")
    for entry in (one, other):
        await registry.put_model(entry)
    assert await registry.read_models() == {MODEL: one, "other": other}
    assert await registry.read_models(["missing", "other"]) == {"other": other}
    assert await registry.read_models([]) == {}


async def test_only_replicas_that_beat_are_listed(connection: Connection, key_prefix: str) -> None:
    registry = Registry(connection, key_prefix=key_prefix)
    for name in ("b", "a", "silent", "left"):
        await registry.beat(stats(name))
    await registry.beat(stats("a", running=8))
    await registry.gone(stats("left"))
    await connection.call("ZADD", f"{key_prefix}:beats", 1, "silent")
    assert await registry.replicas() == [stats("a", running=8), stats("b")]
    await registry.beat(stats("b"))
    assert await connection.call("HEXISTS", f"{key_prefix}:stats", "silent") == 0


async def test_metrics_of_an_engine_last_as_long_as_its_replica(
    connection: Connection, key_prefix: str
) -> None:
    registry = Registry(connection, key_prefix=key_prefix)
    for name in ("a", "silent", "left", "none"):
        await registry.beat(stats(name), b"" if name == "none" else name.encode())
    await registry.beat(stats("a"))  # nothing newer
    await registry.gone(stats("left"))
    await connection.call("ZADD", f"{key_prefix}:beats", 1, "silent")
    assert await registry.engine_metrics() == [b"a"]
    await registry.beat(stats("a"), b"newer")
    assert await registry.engine_metrics() == [b"newer"]
    assert await connection.call("HKEYS", f"{key_prefix}:metrics") == [b"a"]


async def test_deleting_a_model_ends_what_waits_and_leaves_nothing(redis_url: str, key_prefix: str) -> None:
    async with open_rig(redis_url, key_prefix) as rig:
        gateway, ear = await rig.gateway()
        replica = await rig.replica()
        connection = await rig.connect()
        registry = Registry(connection, key_prefix=key_prefix)
        await registry.put_model(an_entry())
        await registry.report(RevisionReport(MODEL, "r0", 1.0, True))
        running, old, other = a_request(), a_request(revision="r0"), a_request(model="other")
        waiting = [a_request() for _ in range(450)]  # more than one step of the script
        await accept(gateway, running)
        await accept(gateway, *waiting)
        await accept(gateway, old)
        await accept(gateway, other)
        [claim] = await replica.queue.claim(1)
        await registry.delete_model(MODEL, "The model was removed by its owner.")
        await await_until(lambda: all(ear.finish_of(request.id) for request in (*waiting, old)))
        finish = ear.finish_of(old.id)
        assert finish is not None
        assert (finish.reason, finish.code) == ("cancelled", "ModelRemoved")
        assert finish.message == "The model was removed by its owner."
        assert ear.of(other.id) == []
        assert await replica.queue.emit([(1, a_token(claim, 0, finish="stop"))]) == []
        assert await registry.reports() == {}
        keys = [
            f"{key_prefix}:{kind}:{MODEL}--{revision}"
            for kind in ("queue", "waiting")
            for revision in ("r0", "r1")
        ]
        assert await connection.call("EXISTS", *keys) == 0


async def test_a_model_that_comes_back_starts_afresh(redis_url: str, key_prefix: str) -> None:
    async with open_rig(redis_url, key_prefix) as rig:
        gateway, _ = await rig.gateway()
        replica = await rig.replica()
        connection = await rig.connect()
        registry = Registry(connection, key_prefix=key_prefix)
        await registry.put_model(an_entry())
        await accept(gateway, a_request())
        [before] = await replica.queue.claim(1)
        await registry.delete_model(MODEL)  # one still runs
        await registry.put_model(an_entry())
        await accept(gateway, a_request())
        await replica.queue.emit([(1, a_token(before, 0, finish="stop"))])
        assert await gateway.depth(MODEL, REVISION) == Depth(1, 0, 0.0)
        [after] = await replica.queue.claim(1)
        await replica.queue.emit([(1, a_token(after, 0, finish="stop"))])
        assert await gateway.depth(MODEL, REVISION) == Depth(0, 0, 0.0)
        assert await connection.call("HGET", f"{key_prefix}:queue:{QUEUE}", "requests") == b"0"


async def test_depths_of_many_queues_come_together(redis_url: str, key_prefix: str) -> None:
    async with open_rig(redis_url, key_prefix) as rig:
        gateway, _ = await rig.gateway()
        replica = await rig.replica()
        await accept(gateway, a_request(), a_request(), a_request())
        await replica.queue.claim(1)
        depths = QueueDepths(await rig.connect(), key_prefix=key_prefix)
        asked = [(f"idle{n}", "r") for n in range(300)] + [(MODEL, REVISION)]
        found = await depths.poll(asked)
        assert found.pop((MODEL, REVISION)) == Depth(2, 1, 0.0)
        assert set(found.values()) == {Depth(0, 0, 0.0)}
        assert len(found) == 300
        assert await depths.poll([]) == {}


async def test_heartbeats_do_not_outlive_a_gateway_without_requests(redis_url: str, key_prefix: str) -> None:
    async with open_rig(redis_url, key_prefix) as rig:
        await rig.gateway("dead")
        alive, _ = await rig.gateway("alive", replace(BY_HAND, orphan_seconds=0.05))
        connection = await rig.connect()
        started = time.monotonic()

        async def only_one_left() -> bool:
            await alive._sweeper.sweep()
            return bool(await connection.call("ZCARD", f"{key_prefix}:gateways") == 1)

        await await_until(only_one_left)
        assert await connection.call("ZRANGE", f"{key_prefix}:gateways", 0, -1) == [b"alive"]
        assert time.monotonic() > started
