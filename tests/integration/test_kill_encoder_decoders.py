"""Encoder-decoders over HTTP, through a replica that is killed in the middle of their streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.checkpoints import tiny
from tests.integration.serving.rig import MODEL, ReplicaChild
from tests.integration.test_kill_gateways import ENTRY, GatewayChild, Stream
from tests.waiting import await_until
from tidegate.messages.registry import ModelEntry
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry

pytestmark = pytest.mark.serial

PROMPTS = ("The tide", "Summarise: a gate is opened when the water inside stands higher", "Water 水 flows")
LENGTH = 200
LOAD_SECONDS = 90.0


@pytest.fixture(params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny(tmp_path / request.param, request.param)


@pytest.fixture
def spawn(redis_url: str, key_prefix: str, folder: Path) -> Iterator[Callable[[], ReplicaChild]]:
    engine = {
        "name": "transformers",
        "path": str(folder),
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


@pytest.fixture
async def address(
    redis_url: str, key_prefix: str, connection: Connection, tmp_path: Path
) -> AsyncIterator[str]:
    fields = {name: getattr(ENTRY, name) for name in ModelEntry.__struct_fields__}
    entry = ModelEntry(**(fields | {"engine": "transformers", "precision": "float32"}))
    await Registry(connection, key_prefix=key_prefix).put_model(entry)
    gateway = GatewayChild(redis_url, key_prefix, tmp_path / "gateway.log")
    await await_until(gateway.address, 30)
    yield gateway.address()
    gateway.kill()


class GreedyStream(Stream):
    def __init__(self, address: str, prompt: str) -> None:
        super().__init__(address, prompt, LENGTH)
        self._body |= {"temperature": 0, "ignore_eos": True}


async def test_streams_through_a_killed_replica_are_what_generate_answers(
    spawn: Callable[[], ReplicaChild], address: str, folder: Path
) -> None:
    replica = spawn()
    greedy = [GreedyStream(address, prompt) for prompt in PROMPTS]
    sampled = [Stream(address, prompt, LENGTH) for prompt in PROMPTS]
    reading = [asyncio.ensure_future(stream.read()) for stream in (*greedy, *sampled)]
    await await_until(lambda: all(stream.text for stream in greedy), LOAD_SECONDS)
    replica.kill()
    assert not any(stream.is_done for stream in greedy)
    spawn()
    await asyncio.gather(*reading)

    assert all(stream.is_done and not stream.is_broken for stream in (*greedy, *sampled))
    assert [stream.text for stream in greedy] == generated(folder)
    undisturbed = [Stream(address, prompt, LENGTH) for prompt in PROMPTS]
    await asyncio.gather(*(stream.read() for stream in undisturbed))
    assert [stream.text for stream in sampled] == [stream.text for stream in undisturbed]

    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=60) as client:
        chat = await client.post(
            "/v1/chat/completions",
            json={"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5},
        )
        assert chat.status_code == 200, chat.text
        plain = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 5}
        usage = (await client.post("/v1/completions", json=plain)).json()["usage"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert usage["prompt_tokens"] == len(tokenizer(PROMPTS[0])["input_ids"])
        refused = await client.post("/v1/completions", json=plain | {"echo": True})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("echo: ")


def generated(folder: Path) -> list[str]:
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=LENGTH, do_sample=False, eos_token_id=None)
        texts.append(tokenizer.decode(out[0, 1:], skip_special_tokens=True))
    return texts
