"""Requests made from the OpenAPI document: whatever comes, the answer is one that the document names."""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth

from tests.integration.gateway.rig import MODEL, open_gateway
from tests.redis_server import RedisServer

EXAMPLES = 15  # per operation; a longer run is `schemathesis run http://.../openapi.json`
ALL = list(HealthCheck)  # generating from a large schema is slow and filters much


class GatewayThread(threading.Thread):
    """A gateway with a replica that answers everything, on an event loop of its own: the fuzzer is
    synchronous. `started` gets (address, key)."""

    def __init__(self, redis_url: str) -> None:
        super().__init__(name="gateway", daemon=True)
        self.started: queue.Queue[tuple[str, str]] = queue.Queue()
        self._redis_url = redis_url
        self._ended: asyncio.Event
        self._loop: asyncio.AbstractEventLoop

    def run(self) -> None:
        asyncio.run(self._serve())

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self.join()

    async def _serve(self) -> None:
        self._ended, self._loop = asyncio.Event(), asyncio.get_running_loop()
        async with open_gateway(self._redis_url, "fuzz-" + secrets.token_hex(4)) as gateway:
            answering = asyncio.create_task(gateway.replica.answer_everything())
            self.started.put((gateway.address, gateway.key))
            await self._ended.wait()
            answering.cancel()


@pytest.fixture(scope="module")
def served(redis_server: RedisServer) -> Iterator[tuple[str, str]]:
    thread = GatewayThread(redis_server.url)
    thread.start()
    yield thread.started.get(timeout=30)
    thread.stop()


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/livez"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/"),
]
# Operations that take no input have nothing to get wrong.
CASES = [(method, path, GenerationMode.POSITIVE) for method, path in OPERATIONS] + [
    (method, path, GenerationMode.NEGATIVE) for method, path in OPERATIONS if method == "POST" or "{" in path
]


def served_document(address: str) -> dict[str, Any]:
    """The document, with the one model that exists in place of any name."""
    document: dict[str, Any] = httpx.get(f"{address}/openapi.json").json()
    for body in ("ChatBody", "CompletionBody", "TokenizeBody", "DetokenizeBody"):
        document["components"]["schemas"][body]["properties"]["model"] = {"const": MODEL}
    return document


def test_the_list_of_operations_is_complete(served: tuple[str, str]) -> None:
    paths = served_document(served[0])["paths"]
    assert {(method.upper(), path) for path in paths for method in paths[path]} == set(OPERATIONS)


@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")  # schemathesis does
@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_every_answer_is_a_documented_one(
    served: tuple[str, str], method: str, path: str, mode: GenerationMode
) -> None:
    address, key = served
    operation = schemathesis.openapi.from_dict(served_document(address))[path][method]
    statuses: list[int] = []

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=ALL
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        response = case.call_and_validate(
            base_url=address,
            headers={"authorization": f"Bearer {key}"},
            # It repeats the call "without" the key, but with these headers; test_http covers keys.
            excluded_checks=[ignored_auth],
        )
        statuses.append(response.status_code)

    fuzz()
    assert statuses
    assert max(statuses) < 500
