"""vLLM's process killed in the middle of seeded streams: what follows is what would have come (Q2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import tiny
from tests.integration.serving.rig import ReplicaChild, demanding_requests, heard_from, open_ear
from tests.processes import command
from tests.vllm.environment import vllm_python
from tests.waiting import await_until
from tidegate.engines.vllm.process import PYTHON_VARIABLE

pytestmark = pytest.mark.serial

LOAD_SECONDS = 200.0  # on a machine that loads other models beside
PROMPTS = ("The tide", "A gate is", "Water 水 flows")
TOKENS = 150
CRASHED = 70


@pytest.fixture
def spawn(
    redis_url: str, key_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], ReplicaChild]]:
    monkeypatch.setenv(PYTHON_VARIABLE, str(vllm_python()))
    path = str(tiny(tmp_path / "llama", "llama"))
    own = {"vllm": {"enforce_eager": True}, "transformers": {}}
    children: list[ReplicaChild] = []

    def start(name: str) -> ReplicaChild:
        engine = {
            "name": name,
            "path": path,
            "precision": "float32",
            "max_slots": 8,
            "args": {"threads": 1, **own[name]},
        }
        children.append(ReplicaChild(redis_url, key_prefix, engine=engine))
        return children[-1]

    yield start
    for child in children:
        child.close()


async def test_streams_of_a_killed_vllm_go_on_where_another_engine_runs(
    spawn: Callable[[str], ReplicaChild], redis_url: str, key_prefix: str
) -> None:
    async with open_ear(redis_url, key_prefix) as ear:
        replica = spawn("vllm")
        killed = demanding_requests(PROMPTS, TOKENS)
        await ear.submit(*killed)
        await heard_from(ear, killed[1], 20, LOAD_SECONDS)
        (vllm,) = [
            child
            for child in psutil.Process(replica.process.pid).children()
            if any(word.endswith("vllm/worker.py") for word in command(child))
        ]
        vllm.kill()
        await await_until(lambda: replica.process.poll() is not None, LOAD_SECONDS)
        before = [ear.tokens_of(request) for request in killed]
        spawn("transformers")
        plain = demanding_requests(PROMPTS, TOKENS)
        await ear.submit(*plain)
        await ear.ended(*killed, *plain, timeout=LOAD_SECONDS)

        assert replica.process.returncode == CRASHED
        assert 20 <= max(before) < TOKENS
        for one, other in zip(plain, killed, strict=True):
            assert ear.ids_of(other) == ear.ids_of(one)
            assert await ear.text(other.id) == await ear.text(one.id)
