"""Q1 and Q2 through HTTP: gateways and replicas as processes, killed while clients stream from them."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.integration.serving.rig import MODEL, REVISION, Ear, ReplicaChild, open_ear
from tests.waiting import await_until
from tidegate.messages.registry import ModelEntry
from tidegate.messages.work import Segment
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry

pytestmark = pytest.mark.serial

ENTRY = ModelEntry(
    name=MODEL,
    created=1_700_000_000,
    task="text-generation",
    engine="simulated",
    precision="simulated",
    quantization="none",
    revisions={REVISION: 100},
    accepts=True,
    ready=True,
    reason="",
    message="",
)


IDS = {"x-tidegate-event-ids": "1"}


class GatewayChild:
    """`python -m tidegate.gateway` as a child process, without keys."""

    def __init__(self, redis_url: str, key_prefix: str, log: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
        settings = {
            "REDIS_URL": redis_url,
            "TIDEGATE_KEY_PREFIX": key_prefix,
            "TIDEGATE_PORT": "0",
            "TIDEGATE_NO_AUTH": "true",
            "TIDEGATE_LOG_FORMAT": "json",
        }
        self._log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tidegate.gateway"], env=kept | settings, stderr=stream
            )

    def address(self) -> str:
        """Where it listens, from its log; empty until it does."""
        for line in self._log.read_text().splitlines():
            found = str(orjson.loads(line)["message"]).partition("running on ")[2]
            if found:
                return found.split()[0]
        return ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Stream:
    """One client of a streamed completion: what it was told, and whether that came to its end."""

    def __init__(
        self, address: str, prompt: str, max_tokens: int, headers: Mapping[str, str] | None = None
    ) -> None:
        self.id = ""
        self.numbers: list[int] = []  # of the events, where they have ids
        self._headers = headers
        self.text = ""
        self.is_done = False
        self.is_broken = False
        self.asked = (prompt, max_tokens)
        self._address = address
        self._body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "stream": True,
            "seed": 11,
        }

    async def read(self) -> None:
        try:
            async with (
                httpx.AsyncClient(trust_env=False, timeout=60) as client,
                client.stream(
                    "POST", f"{self._address}/v1/completions", json=self._body, headers=self._headers
                ) as response,
            ):
                await self._take_all(response)
        except httpx.TransportError:
            self.is_broken = True

    async def resume(self, address: str) -> None:
        """Go on at another gateway."""
        url = f"{address}/v1/requests/{self.id}/events"
        last = {"last-event-id": f"{self.id}/{self.numbers[-1]}"}
        async with (
            httpx.AsyncClient(trust_env=False, timeout=60) as client,
            client.stream("GET", url, headers=last) as response,
        ):
            await self._take_all(response)

    async def _take_all(self, response: httpx.Response) -> None:
        """Whole events: what was cut off is not taken."""
        assert response.status_code == 200, await response.aread()
        text = ""
        async for piece in response.aiter_text():
            *events, text = (text + piece).split("\n\n")
            for line in "\n".join(events).split("\n"):
                self._take(line)

    def _take(self, line: str) -> None:
        if line.startswith("id: "):
            self.numbers.append(int(line.rpartition("/")[2]))
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            self.is_done = True
            return
        event = orjson.loads(line.removeprefix("data: "))
        assert "error" not in event, event
        self.id = event["id"]
        self.text += "".join(choice["text"] for choice in event["choices"])


@pytest.fixture
def children() -> Iterator[list[ReplicaChild | GatewayChild]]:
    children: list[ReplicaChild | GatewayChild] = []
    yield children
    for child in children:
        if child.process.poll() is None:
            child.kill()


@pytest.fixture
async def ear(redis_url: str, key_prefix: str, connection: Connection) -> AsyncIterator[Ear]:
    """To look at logs and depths with; also names the model to the gateways."""
    await Registry(connection, key_prefix=key_prefix).put_model(ENTRY)
    async with open_ear(redis_url, key_prefix, gateway_id="onlooker") as ear:
        yield ear


async def test_killed_gateways_and_replicas_break_only_the_connections_of_the_dead_gateway(
    ear: Ear,
    children: list[ReplicaChild | GatewayChild],
    redis_url: str,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    draw = random.Random(9)
    dying, staying = (
        GatewayChild(redis_url, key_prefix, tmp_path / f"gateway-{number}.log") for number in range(2)
    )
    replicas = [ReplicaChild(redis_url, key_prefix, slots=6) for _ in range(2)]
    children += [dying, staying, *replicas]
    await await_until(lambda: dying.address() and staying.address(), 30)
    doomed = [Stream(dying.address(), f"doomed {n}", draw.randint(150, 300)) for n in range(8)]
    safe = [Stream(staying.address(), f"safe {n}", draw.randint(150, 300)) for n in range(8)]
    reading = [asyncio.ensure_future(stream.read()) for stream in (*doomed, *safe)]

    await await_until(lambda: sum(len(stream.text) for stream in doomed) > 2000, 30)
    dying.kill()
    replicas[0].kill()
    children.append(ReplicaChild(redis_url, key_prefix, slots=6))
    await asyncio.gather(*reading)

    assert all(stream.is_done and not stream.is_broken for stream in safe)
    assert any(stream.is_broken for stream in doomed)
    await await_until(lambda: _nothing_left(ear), 30)
    for stream in doomed:
        if not stream.id or stream.is_done:
            continue  # one that still waited was told nothing
        log = await ear.queue.replay(f"{stream.id}.0")
        assert log is not None
        assert _text_of_finished(log).startswith(stream.text)
    undisturbed = [Stream(staying.address(), *stream.asked) for stream in safe]
    await asyncio.gather(*(stream.read() for stream in undisturbed))
    assert [stream.text for stream in safe] == [stream.text for stream in undisturbed]


async def test_streams_of_a_killed_gateway_go_on_at_another_with_every_token_once(
    ear: Ear,
    children: list[ReplicaChild | GatewayChild],
    redis_url: str,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    draw = random.Random(10)
    dying, staying = (
        GatewayChild(redis_url, key_prefix, tmp_path / f"gateway-{number}.log") for number in range(2)
    )
    children += [dying, staying, ReplicaChild(redis_url, key_prefix, slots=8)]
    await await_until(lambda: dying.address() and staying.address(), 30)
    streams = [Stream(dying.address(), f"moved {n}", draw.randint(150, 300), IDS) for n in range(8)]
    reading = [asyncio.ensure_future(stream.read()) for stream in streams]
    await await_until(lambda: all(stream.id for stream in streams), 30)
    await await_until(lambda: sum(len(stream.text) for stream in streams) > 2000, 30)
    dying.kill()
    await asyncio.gather(*reading)

    assert any(stream.is_broken for stream in streams)
    await asyncio.gather(*(stream.resume(staying.address()) for stream in streams if stream.is_broken))
    assert all(stream.is_done for stream in streams)
    for stream in streams:
        assert stream.numbers == list(range(1, len(stream.numbers) + 1))
    undisturbed = [Stream(staying.address(), *stream.asked) for stream in streams]
    await asyncio.gather(*(stream.read() for stream in undisturbed))
    assert [stream.text for stream in streams] == [stream.text for stream in undisturbed]


async def test_a_response_in_the_background_survives_its_gateway(
    ear: Ear,
    children: list[ReplicaChild | GatewayChild],
    redis_url: str,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    dying, staying = (
        GatewayChild(redis_url, key_prefix, tmp_path / f"gateway-{number}.log") for number in range(2)
    )
    children += [dying, staying]
    await await_until(lambda: dying.address() and staying.address(), 30)
    body = {"model": MODEL, "input": "hello", "background": True, "max_output_tokens": 100}
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        begun = (await client.post(f"{dying.address()}/v1/responses", json=body)).json()
        assert begun["status"] == "queued"
        dying.kill()
        children.append(ReplicaChild(redis_url, key_prefix))

        async def ended() -> dict[str, Any] | None:
            found = await client.get(f"{staying.address()}/v1/responses/{begun['id']}")
            answer: dict[str, Any] = found.json()
            return answer if answer["status"] not in ("queued", "in_progress") else None

        answer = await await_until(ended, 30)
    assert answer is not None and answer["status"] == "incomplete"
    assert answer["usage"]["output_tokens"] == 100
    log = await ear.queue.replay(f"{begun['id']}.0")
    assert log is not None and answer["output"][0]["content"][0]["text"] == _text_of_finished(log)


async def test_a_new_gateway_serves_where_a_killed_one_was(
    ear: Ear,
    children: list[ReplicaChild | GatewayChild],
    redis_url: str,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    children.append(ReplicaChild(redis_url, key_prefix))
    first = GatewayChild(redis_url, key_prefix, tmp_path / "first.log")
    children.append(first)
    await await_until(first.address, 30)
    before = Stream(first.address(), "the same", 60)
    await before.read()
    first.kill()
    second = GatewayChild(redis_url, key_prefix, tmp_path / "second.log")
    children.append(second)
    await await_until(second.address, 30)
    after = Stream(second.address(), "the same", 60)
    await after.read()
    assert before.is_done and after.is_done
    assert after.text == before.text


def _text_of_finished(log: list[Segment]) -> str:
    """The whole text; its segments are gapless and exactly the last one is final."""
    assert [segment.seq for segment in log] == list(range(len(log)))
    assert [segment.finish is not None for segment in log] == [False] * (len(log) - 1) + [True]
    return "".join(segment.output.text for segment in log)


async def _nothing_left(ear: Ear) -> bool:
    depth = await ear.queue.depth(MODEL, REVISION)
    return depth.waiting + depth.running == 0
