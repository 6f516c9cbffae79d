"""What autoscaling sees of a real queue, also while Redis is away."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.serving.rig import MODEL, REVISION, a_request, open_ear, open_replica
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.serving.queue_watch import QueueWatch, Sighting

QUEUE = (MODEL, REVISION)
OTHER = ("other", "r9")


@pytest.fixture
async def watch(redis_url: str, key_prefix: str) -> AsyncIterator[QueueWatch]:
    watch = QueueWatch(redis_url, key_prefix)
    yield watch
    await watch.close()


def saw(watch: QueueWatch, **wanted: int) -> Sighting | None:
    seen = watch.latest(QUEUE)
    if seen is None or any(getattr(seen, name) != value for name, value in wanted.items()):
        return None
    return seen


async def test_it_sees_what_waits_and_runs_and_what_a_replica_has(
    watch: QueueWatch, redis_url: str, key_prefix: str
) -> None:
    async with open_ear(redis_url, key_prefix) as ear:
        requests = [a_request(max_tokens=4000) for _ in range(5)]
        await ear.submit(*requests)
        await await_until(lambda: saw(watch, waiting=5, running=0, slots=0))
        async with open_replica(redis_url, key_prefix, slots=3, drain_seconds=0.01):
            await await_until(lambda: saw(watch, waiting=2, running=3, slots=3))
            await await_until(lambda: not saw(watch, tokens_total=0))
        seen = await await_until(lambda: saw(watch, waiting=5, running=0, tokens_total=0))
        assert seen is not None
        assert seen.slots == 3  # from the revision's proof


async def test_it_sees_all_queues_that_were_asked_for(
    watch: QueueWatch, redis_url: str, key_prefix: str
) -> None:
    async with open_ear(redis_url, key_prefix) as ear:
        await ear.submit(a_request(), a_request(), a_request(model=OTHER[0], revision=OTHER[1]))

    def waiting() -> list[int]:
        seen = [watch.latest(QUEUE), watch.latest(OTHER)]
        return [sighting.waiting for sighting in seen if sighting is not None]

    await await_until(lambda: waiting() == [2, 1])
    assert watch.latest(("never", "asked")) is None


async def test_without_redis_it_keeps_what_it_saw_and_finds_it_again(
    own_redis: RedisServer, key_prefix: str
) -> None:
    watch = QueueWatch(own_redis.url, key_prefix)
    await await_until(lambda: watch.latest(QUEUE))
    own_redis.pause()  # it takes connections and answers nothing
    last = await await_until(lambda: _twice_the_same(watch))
    own_redis.resume()
    await await_until(lambda: _seen_at(watch) > last)
    own_redis.kill()
    last = _seen_at(watch)
    assert last > 0
    own_redis.start()
    await await_until(lambda: _seen_at(watch) > last, 20)
    await watch.close()


async def _twice_the_same(watch: QueueWatch) -> float:
    """When the last sighting was, once a poll went by without a new one; else 0."""
    before = _seen_at(watch)
    polled = watch._poll
    if polled is None:
        return 0
    await polled
    return before if _seen_at(watch) == before else 0


def _seen_at(watch: QueueWatch) -> float:
    seen = watch.latest(QUEUE)
    return 0 if seen is None else seen.at
