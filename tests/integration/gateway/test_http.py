"""Keys, ids, limits, health and everything around generation."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.integration.gateway.rig import CHAT, MODEL, Gateway, open_gateway
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.messages.engine_metrics import Family, encode_families, pack
from tidegate.messages.queue import QueueLimits
from tidegate.messages.registry import ReplicaStats
from tidegate.messages.work import ChatPrompt, Generate
from tidegate.store.connection import Connection

PATH = "/v1/chat/completions"
KEYED = [("POST", PATH), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", f"/v1/models/{MODEL}")]
OPEN = [
    "/",
    "/livez",
    "/health",
    "/version",
    "/readyz",
    "/metrics",
    "/metrics/engines",
    "/docs",
    "/openapi.json",
]


@pytest.mark.parametrize(("method", "path"), KEYED)
async def test_a_key_is_needed(gateway: Gateway, method: str, path: str) -> None:
    for authorization in (None, "Bearer", "Bearer tg-wrong", "Basic dTpw", f"Token {gateway.key}"):
        headers = {} if authorization is None else {"authorization": authorization}
        async with httpx.AsyncClient(base_url=gateway.address) as http:
            response = await http.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["x-request-id"]


async def test_whole_numbers_of_any_size_reach_the_replica(gateway: Gateway) -> None:
    """In the variables of a chat's template, which hold any JSON."""
    huge = [10**30, -(10**30)]
    message = {"role": "user", "content": "Hi"}
    body = {"model": MODEL, "messages": [message], "chat_template_kwargs": {"a": huge}}
    answering = asyncio.create_task(gateway.replica.answer("Hello"))
    assert (await gateway.post(PATH, body)).status_code == 200
    [claim] = await answering
    assert isinstance(claim.request.work, Generate)
    prompt = claim.request.work.prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_args["a"] == huge


async def test_a_revoked_key_is_refused(gateway: Gateway) -> None:
    assert (await gateway.http.get("/v1/models")).status_code == 200
    await gateway.keys.revoke(gateway.key_id)
    await await_until(lambda: gateway.keys.find(gateway.key) is None)
    assert (await gateway.http.get("/v1/models")).status_code == 401


@pytest.mark.parametrize("path", OPEN)
async def test_what_is_open_needs_no_key(gateway: Gateway, path: str) -> None:
    async with httpx.AsyncClient(base_url=gateway.address) as http:
        response = await http.get(path)
    assert response.status_code == 200
    assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])


async def test_the_clients_own_request_id_comes_back_where_it_is_sane(gateway: Gateway) -> None:
    sane = await gateway.http.get("/livez", headers={"x-request-id": "trace-1/2:3"})
    assert sane.headers["x-request-id"] == "trace-1/2:3"
    odd = await gateway.http.get("/livez", headers={"x-request-id": "a b<script>"})
    assert odd.headers["x-request-id"].startswith("req_")
    refused = await gateway.post(PATH, {}, **{"x-request-id": "mine"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine")


@pytest.mark.parametrize("path", [*OPEN, "/v1/models"])
async def test_head_is_get_without_its_body_and_a_last_slash_is_none(gateway: Gateway, path: str) -> None:
    head, whole = await gateway.http.head(path), await gateway.http.get(path.rstrip("/") + "/")
    assert (head.status_code, head.content, whole.status_code) == (200, b"", 200)
    assert head.headers["content-type"] == whole.headers["content-type"]


async def test_unknown_routes_and_methods(gateway: Gateway) -> None:
    missing = await gateway.http.get("/v1/nope")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    wrong = await gateway.http.delete(PATH)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "invalid_request_error"


async def test_bodies_that_are_too_large(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, max_body_bytes=2048) as gateway:
        declared = await gateway.http.post(PATH, content=b"x" * 4096)
        assert (declared.status_code, declared.json()["error"]["code"]) == (413, "request_too_large")

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(4):
                yield b"x" * 1024

        chunked = await gateway.http.post(PATH, content=pieces())
        assert chunked.status_code == 413


async def test_bodies_that_are_no_json(gateway: Gateway) -> None:
    broken = await gateway.http.post(PATH, content=b'{"model": nope}')
    assert broken.status_code == 400
    assert "byte 1" in broken.json()["error"]["message"]
    tolerated = await gateway.http.post(PATH, content=b"[1]", headers={"content-type": "text/plain"})
    assert tolerated.status_code == 400


async def test_metrics_of_engines_are_those_that_replicas_told(gateway: Gateway) -> None:
    empty = await gateway.http.get("/metrics/engines")
    assert (empty.status_code, empty.text) == (200, "")
    for replica, running in (("a", 3), ("b", 4)):
        sample = f'vllm:num_requests_running{{model_name="{MODEL}",replica="{replica}"}} {running}.0\n'
        family = Family("vllm:num_requests_running", "# TYPE vllm:num_requests_running gauge\n", sample)
        stats = ReplicaStats(replica, MODEL, "r", 1, "node", 1.0, 2.0, 8, running, 0, 0.0)
        await gateway.registry.beat(stats, pack(encode_families([family])))
    told = await gateway.http.get("/metrics/engines")
    assert told.headers["content-type"].startswith("text/plain; version=")
    assert sorted(told.text.splitlines()) == [
        "# TYPE vllm:num_requests_running gauge",
        f'vllm:num_requests_running{{model_name="{MODEL}",replica="a"}} 3.0',
        f'vllm:num_requests_running{{model_name="{MODEL}",replica="b"}} 4.0',
    ]


async def test_metrics_count_what_happened(gateway: Gateway) -> None:
    for stream in (False, True):
        call = asyncio.create_task(gateway.post(PATH, CHAT | {"stream": stream}))
        await gateway.replica.answer("a", "b")
        assert (await call).status_code == 200
    await gateway.post(PATH, CHAT | {"model": "nope"})
    text = (await gateway.http.get("/metrics")).text
    assert f'tidegate_requests_total{{model="{MODEL}",outcome="ok"}} 2.0' in text
    assert 'tidegate_requests_total{model="-",outcome="ModelNotFound"} 1.0' in text
    assert f'gen_ai_server_time_to_first_token_seconds_count{{gen_ai_request_model="{MODEL}"}} 1.0' in text
    assert f'gen_ai_server_request_duration_seconds_count{{gen_ai_request_model="{MODEL}"}} 2.0' in text
    assert f'tidegate_generation_tokens_total{{model="{MODEL}"}} 4.0' in text
    assert f'tidegate_num_requests_waiting{{model="{MODEL}",revision="0123456789"}} 0.0' in text
    assert "tidegate_gateway_open_requests 0.0" in text
    await gateway.put_model(accepts=False, reason="Gone", message="It is gone.")
    assert (await gateway.post(PATH, CHAT)).status_code == 503
    await gateway.put_model(limits=QueueLimits(max_requests=1))
    assert (await gateway.post(PATH, CHAT | {"n": 2})).status_code == 413
    call = asyncio.create_task(gateway.post(PATH, CHAT))
    [claim] = await gateway.replica.next()
    assert (await gateway.post(PATH, CHAT)).status_code == 429
    await gateway.replica.say(claim, "", "error", code="EngineError", message="inside")
    assert (await call).status_code == 500
    text = (await gateway.http.get("/metrics")).text
    for outcome in ("ModelUnavailable", "RequestTooLarge", "QueueFull"):
        assert f'tidegate_requests_total{{model="{MODEL}",outcome="{outcome}"}} 1.0' in text
    await gateway.put_model()
    await gateway.post(PATH, CHAT | {"n": 0})
    text = (await gateway.http.get("/metrics")).text
    assert f'tidegate_requests_total{{model="{MODEL}",outcome="InvalidRequest"}} 1.0' in text
    for line in (
        f'vllm:num_requests_waiting{{model_name="{MODEL}"}} 0.0',
        f'vllm:num_requests_running{{model_name="{MODEL}"}} 0.0',
        f'vllm:time_to_first_token_seconds_count{{model_name="{MODEL}"}} 1.0',
        f'vllm:e2e_request_latency_seconds_count{{model_name="{MODEL}"}} 2.0',
        f'vllm:prompt_tokens_total{{model_name="{MODEL}"}} 14.0',
        f'vllm:generation_tokens_total{{model_name="{MODEL}"}} 4.0',
        f'vllm:request_success_total{{finished_reason="stop",model_name="{MODEL}"}} 2.0',
    ):
        assert line in text


async def test_without_redis_the_gateway_says_what_is_missing(
    own_redis: RedisServer, key_prefix: str
) -> None:
    async with open_gateway(own_redis.url, key_prefix) as gateway:
        assert (await gateway.http.get("/readyz")).json() == {
            "ready": True,
            "missing": [],
            "notes": [],
        }
        own_redis.kill()

        async def is_not_ready() -> bool:
            return (await gateway.http.get("/readyz")).status_code == 503

        await await_until(is_not_ready)
        not_ready = await gateway.http.get("/readyz")
        assert [item["what"] for item in not_ready.json()["missing"]] == ["redis"]
        refused = await gateway.post(PATH, CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_unavailable")
        assert (await gateway.http.get("/livez")).status_code == 200
        assert (await gateway.http.get("/metrics")).status_code == 200
        own_redis.start()

        async def is_ready() -> bool:
            return (await gateway.http.get("/readyz")).status_code == 200

        assert await await_until(is_ready)


async def test_a_slow_redis_takes_no_gateway_away(own_redis: RedisServer, key_prefix: str) -> None:
    async with open_gateway(own_redis.url, key_prefix) as gateway:
        own_redis.pause()
        try:
            body: dict[str, Any] = {}

            async def is_noted() -> bool:
                answer = await gateway.http.get("/readyz")
                body.update(answer.json() | {"status": answer.status_code})
                return bool(body["notes"] or body["missing"])

            await await_until(is_noted)
        finally:
            own_redis.resume()
        assert (body["status"], body["ready"], body["missing"]) == (200, True, [])
        assert "longer than a second" in body["notes"][0]["message"]


@pytest.mark.parametrize(
    ("setting", "value", "state", "word"),
    [("maxmemory", "1", "full", "memory"), ("min-replicas-to-write", "1", "read-only", "no writes")],
)
async def test_a_redis_that_refuses_what_is_new_is_named(
    own_redis: RedisServer, key_prefix: str, setting: str, value: str, state: str, word: str
) -> None:
    async with open_gateway(own_redis.url, key_prefix) as gateway, Connection(own_redis.url) as admin:
        await admin.call("CONFIG", "SET", setting, value)

        async def is_not_ready() -> bool:
            return (await gateway.http.get("/readyz")).status_code == 503

        await await_until(is_not_ready)
        [missing] = (await gateway.http.get("/readyz")).json()["missing"]
        assert missing["what"] == "redis"
        assert word in missing["message"]
        assert f'tidegate_queue_state{{state="{state}"}} 1.0' in (await gateway.http.get("/metrics")).text
        assert (await gateway.post(PATH, CHAT)).status_code == 503
        assert (await gateway.http.get("/livez")).status_code == 200


async def test_a_policy_that_evicts_requests_is_named(
    own_redis: RedisServer, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Connection(own_redis.url) as admin:
        await admin.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    async with open_gateway(own_redis.url, key_prefix) as gateway:
        body = (await gateway.http.get("/readyz")).json()
        assert (body["ready"], [note["what"] for note in body["notes"]]) == (True, ["maxmemory-policy"])
        assert "allkeys-lru" in body["notes"][0]["message"]
        assert "allkeys-lru" in caplog.text
        assert "tidegate_queue_may_evict 1.0" in (await gateway.http.get("/metrics")).text


async def test_the_docs_page_needs_nothing_from_outside(gateway: Gateway) -> None:
    page = (await gateway.http.get("/docs")).text
    outside = re.findall(r"(?:src|href)=[\"']?(?!#|/openapi\.json)([^\"'> ]+)", page)
    assert outside == []
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert "/v1/chat/completions" in page and "temperature" in page


async def test_no_auth_serves_without_keys(redis_url: str, key_prefix: str) -> None:
    async with (
        open_gateway(redis_url, key_prefix, no_auth=True) as gateway,
        httpx.AsyncClient(base_url=gateway.address) as http,
    ):
        assert (await http.get("/v1/models")).status_code == 200
