"""Embeddings from an HTTP call to a real model and back, also where its replica is killed on the way."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator

import openai
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tests.encoders import MINILM
from tests.integration.gateway.rig import Gateway, open_gateway
from tests.integration.serving.rig import LEASE_SECONDS, MODEL, REVISION, ReplicaChild
from tests.waiting import await_until
from tidegate.store.connection import Connection

pytestmark = pytest.mark.serial

LOAD_SECONDS = 90.0
TEXTS = [f"{number} ships wait for the tide " + "and for a pilot " * (number % 40) for number in range(64)]


@pytest.fixture
def spawn(redis_url: str, key_prefix: str) -> Iterator[Callable[[], ReplicaChild]]:
    # Steps of few inputs, so that a call is on its way for some seconds.
    args = {"threads": 1, "prefill_tokens_per_step": 256}
    engine = {"name": "transformers", "path": str(MINILM), "task": "embed", "max_slots": 8, "args": args}
    children: list[ReplicaChild] = []

    def start() -> ReplicaChild:
        children.append(ReplicaChild(redis_url, key_prefix, engine=engine))
        return children[-1]

    yield start
    for child in children:
        child.close()


async def segments(gateway: Gateway) -> float:
    found = re.search(
        r"^tidegate_gateway_segments\S* (\S+)$", (await gateway.http.get("/metrics")).text, re.M
    )
    return float(found[1]) if found else 0.0


async def test_a_call_whose_replica_is_killed_is_answered_whole_and_in_order(
    spawn: Callable[[], ReplicaChild], redis_url: str, key_prefix: str, connection: Connection
) -> None:
    async with open_gateway(redis_url, key_prefix, lease_seconds=LEASE_SECONDS) as gateway:
        await gateway.put_model(name=MODEL, revisions={REVISION: 100}, task="embed")
        client = openai.AsyncOpenAI(
            base_url=f"{gateway.address}/v1", api_key=gateway.key, max_retries=0, timeout=LOAD_SECONDS
        )
        first = spawn()
        call = asyncio.create_task(client.embeddings.create(model=MODEL, input=TEXTS))

        async def begun() -> bool:
            return await segments(gateway) > 0

        await await_until(begun, LOAD_SECONDS)
        first.kill()
        spawn()
        answer = await call
        await client.close()
    replicas = await connection.call("KEYS", f"{key_prefix}:replica:*")
    claimed = [await connection.call("HEXISTS", replica, "claimed") for replica in replicas]
    assert claimed == [1, 1], "the second had nothing left to do"
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS)
    found = torch.tensor([each.embedding for each in answer.data])
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)
    assert answer.usage.prompt_tokens > len(TEXTS)
