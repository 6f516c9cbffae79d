"""A real engine killed in the middle of seeded streams: what follows is what would have come (Q2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import tiny
from tests.integration.serving.rig import ReplicaChild, demanding_requests, heard_from, open_ear
from tests.waiting import wait_until
from tidegate.engines.transformers.prompt_pool import LANES

pytestmark = pytest.mark.serial

LOAD_SECONDS = 90.0
PROMPTS = ("The tide", "A gate is", "Water 水 flows")
TOKENS = 150


@pytest.fixture
def spawn(redis_url: str, key_prefix: str, tmp_path: Path) -> Iterator[Callable[[], ReplicaChild]]:
    engine = {
        "name": "transformers",
        "path": str(tiny(tmp_path / "llama", "llama")),
        "precision": "float32",
        "max_slots": 8,
        "args": {"threads": 1},
    }
    children: list[ReplicaChild] = []

    def start() -> ReplicaChild:
        children.append(ReplicaChild(redis_url, key_prefix, engine=engine))
        return children[-1]

    yield start
    for child in children:
        child.close()


async def test_a_killed_seeded_stream_equals_the_undisturbed_one(
    spawn: Callable[[], ReplicaChild], redis_url: str, key_prefix: str
) -> None:
    async with open_ear(redis_url, key_prefix) as ear:
        replica = spawn()
        plain = demanding_requests(PROMPTS, TOKENS)
        await ear.submit(*plain)
        await ear.ended(*plain, timeout=LOAD_SECONDS)

        killed = demanding_requests(PROMPTS, TOKENS)
        await ear.submit(*killed)
        await heard_from(ear, killed[1], 20, LOAD_SECONDS)
        beside = psutil.Process(replica.process.pid).children(recursive=True)
        replica.kill()
        before = [ear.tokens_of(request) for request in killed]
        spawn()
        await ear.ended(*killed, timeout=LOAD_SECONDS)

        assert max(before) < TOKENS
        assert len(beside) > LANES  # the processes that prepare prompts, which end by themselves
        wait_until(lambda: not any(map(psutil.pid_exists, (process.pid for process in beside))))
        for one, other in zip(plain, killed, strict=True):
            assert ear.ids_of(other) == ear.ids_of(one)
            assert await ear.text(other.id) == await ear.text(one.id)
