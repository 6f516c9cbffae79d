"""What reaches the gateway before a key does: sockets that send too much, too little, or something else."""

from __future__ import annotations

import asyncio
import gc
import gzip
import re
import resource
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import httpx
import orjson
import psutil
import pytest

from tests.integration.gateway.rig import CHAT, MODEL, REVISION, Gateway, open_gateway
from tests.integration.gateway.test_process import address, environment, gateway_process
from tests.redis_server import RedisServer
from tests.waiting import await_until, wait_until
from tidegate.errors import QueueOutOfMemory
from tidegate.gateway.stream import OpenCall
from tidegate.messages.work import Request
from tidegate.store.connection import Connection

PATH = "/v1/chat/completions"


async def opened(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.address.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def sent(gateway: Gateway, *parts: bytes) -> bytes:
    """Everything that one connection answers until it is closed, which the gateway has to do."""
    reader, writer = await opened(gateway)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
    except ConnectionError:
        pass  # it has been refused meanwhile
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_code(answer: bytes) -> str:
    return str(orjson.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"])


MUCH = [
    pytest.param(b"GET /livez HTTP/1.1\r\n", [b"a: b\r\n" * 10_000], id="lines"),
    pytest.param(b"GET /livez HTTP/1.1\r\na: ", [b"b" * 60_000], id="value"),
    pytest.param(b"GET /livez HTTP/1.1\r\n", [b"b" * 60_000], id="name"),
    pytest.param(b"GET /", [b"b" * 60_000], id="path"),
    pytest.param(b"GET /?", [b"b" * 60_000], id="query"),
    pytest.param(b"GET /livez HTTP/1.1\r\n", [b"a: b\r\n" * 300 + b"\r\n"], id="count"),
    pytest.param(
        b"POST /livez HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
        [b"a: b\r\n" * 10_000],
        id="trailers",
    ),
    pytest.param(
        b"POST /v1/nope HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;",
        [b"x" * 60_000],
        id="chunk extension",
    ),
]


@pytest.mark.parametrize(("head", "more"), MUCH)
async def test_too_large_a_head_is_431_and_the_end(gateway: Gateway, head: bytes, more: list[bytes]) -> None:
    answer = await sent(gateway, head, *more)
    # Trailers and chunk extensions may come after the answer to their request is out.
    assert b" 431 " in answer or b" 404 " in answer or b" 405 " in answer
    if head.startswith(b"GET"):
        assert (status(answer), error_code(answer)) == (431, "head_too_large")
        assert b"connection: close" in answer


async def test_a_head_just_within_the_bound_is_answered(gateway: Gateway) -> None:
    response = await gateway.http.get("/livez", headers={"x-long": "b" * 30_000})
    assert response.status_code == 200


async def test_trailers_are_no_headers(gateway: Gateway) -> None:
    answer = await sent(
        gateway,
        b"POST /v1/chat/completions HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        b"2\r\n{}\r\n0\r\nauthorization: Bearer " + gateway.key.encode() + b"\r\n\r\n",
    )
    assert status(answer) == 401


async def test_a_flood_of_pipelined_requests_is_ended(gateway: Gateway) -> None:
    answer = await sent(gateway, b"GET /livez HTTP/1.1\r\n\r\n" * 5000)
    assert answer.count(b"HTTP/1.1 200") <= 64


async def test_a_few_pipelined_requests_are_answered_in_order(gateway: Gateway) -> None:
    answer = await sent(
        gateway,
        b"GET /livez HTTP/1.1\r\nx-request-id: one\r\n\r\nGET /livez HTTP/1.1\r\nx-request-id: two\r\n\r\n"
        b"GET /livez HTTP/1.1\r\nx-request-id: three\r\nconnection: close\r\n\r\n",
    )
    ids = [line for line in answer.split(b"\r\n") if line.startswith(b"x-request-id")]
    assert ids == [b"x-request-id: one", b"x-request-id: two", b"x-request-id: three"]


LATE = [
    b"",
    b"GET /livez HT",
    b"GET /livez HTTP/1.1\r\nhost: x\r\n",
    b"\r\n",
    b"GET /livez HTTP/1.1\r\n\r\nGET /li",
]


@pytest.mark.parametrize("begun", LATE)
async def test_a_head_that_does_not_come_is_408(redis_url: str, key_prefix: str, begun: bytes) -> None:
    async with open_gateway(redis_url, key_prefix, head_timeout_seconds=0.2) as gateway:
        answer = await sent(gateway, begun)
        assert b"HTTP/1.1 408 " in answer
        assert b'"code":"request_timeout"' in answer


async def test_a_body_that_does_not_come_is_408(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, body_timeout_seconds=0.2) as gateway:
        key = gateway.key.encode()
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer %b\r\ncontent-length: 9\r\n\r\n"
            % key
        )
        for begun in (head, head + b'{"'):
            answer = await sent(gateway, begun)
            assert (status(answer), error_code(answer)) == (408, "request_timeout")
        # Without a key the refusal is out before; the connection ends all the same.
        answer = await sent(gateway, b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n")
        assert status(answer) == 401


async def test_a_long_answer_outlives_the_times_of_heads_and_bodies(redis_url: str, key_prefix: str) -> None:
    changes = {"head_timeout_seconds": 0.1, "body_timeout_seconds": 0.1, "heartbeat_seconds": 0.3}
    async with (
        open_gateway(redis_url, key_prefix, hold_status_seconds=0.05, **changes) as gateway,
        gateway.http.stream("POST", PATH, json=CHAT | {"stream": True}) as response,
    ):
        lines = response.aiter_lines()
        beats = 0
        while beats < 2:
            beats += (await anext(lines)).startswith(":")
        await gateway.replica.answer("word")
        assert [line async for line in lines if line][-1] == "data: [DONE]"


async def test_quiet_connections_make_room(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, max_connections=16) as gateway:
        halves = [await opened(gateway) for _ in range(40)]
        for _, writer in halves:
            writer.write(b"GET /livez HTT")
        async with httpx.AsyncClient(base_url=gateway.address) as probe:
            assert (await probe.get("/livez")).status_code == 200
        assert await asyncio.wait_for(halves[0][0].read(), 10) == b""
        for _, writer in halves:
            writer.close()


async def test_above_the_bound_of_busy_connections_it_is_503(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, max_connections=16) as gateway:
        body = orjson.dumps(CHAT)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
        calls = [await opened(gateway) for _ in range(16)]
        for _, writer in calls:
            writer.write(head % (gateway.key.encode(), len(body)) + body)
        await await_until(lambda: len(gateway.services.calls) == 16)
        answer = await sent(gateway, b"GET /livez HTTP/1.1\r\n\r\n")
        assert (status(answer), error_code(answer)) == (503, "too_many_connections")
        for _, writer in calls:
            writer.close()
        await await_until(lambda: len(gateway.services.calls) == 0)


@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"foo/2"])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_an_offered_switch_is_declined_and_the_body_read(
    gateway: Gateway, offer: bytes, is_chunked: bool
) -> None:
    inner = b"GET /smuggled HTTP/1.1\r\n\r\n"
    length = b"transfer-encoding: chunked" if is_chunked else b"content-length: %d" % len(inner)
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner) if is_chunked else inner
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer %b\r\n"
        b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %b\r\nhttp2-settings: AAMAAABk\r\n%b\r\n\r\n"
        % (gateway.key.encode(), offer, length)
    )
    last = b"GET /livez HTTP/1.1\r\nconnection: close\r\n\r\n"
    for parts in (
        (head + body + last,),
        (head, body, last),
        (head[:20], head[20:] + body[:5], body[5:] + last),
    ):
        answer = await sent(gateway, *parts)
        assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"400", b"200"]
        assert b"smuggled" not in answer


async def test_a_call_that_offers_http2_is_answered(gateway: Gateway) -> None:
    headers = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABk"}
    call = asyncio.create_task(gateway.post(PATH, CHAT, **headers))
    await gateway.replica.answer("word")
    assert (await call).json()["choices"][0]["message"]["content"] == "word"
    assert (await gateway.http.get("/livez", headers=headers)).status_code == 200


async def test_connect_is_refused(gateway: Gateway) -> None:
    assert status(await sent(gateway, b"CONNECT example.org:443 HTTP/1.1\r\n\r\n")) == 400


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_http_1_0_gets_no_chunk_sizes(gateway: Gateway, is_streamed: bool) -> None:
    body = orjson.dumps(CHAT | {"stream": is_streamed})
    head = b"POST /v1/chat/completions HTTP/1.0\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
    call = asyncio.create_task(sent(gateway, head % (gateway.key.encode(), len(body)) + body))
    await gateway.replica.answer("one", "two")
    top, _, text = (await call).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in top.lower() and b"connection: close" in top
    if is_streamed:
        assert all(line.startswith((b"data: ", b"id: ", b":")) for line in text.split(b"\n") if line)
        assert text.endswith(b"data: [DONE]\n\n")
    else:
        assert orjson.loads(text)["choices"][0]["message"]["content"] == "onetwo"


async def test_a_client_that_reads_nothing_is_left(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, stall_timeout_seconds=0.3) as gateway:
        _, writer = await opened(gateway)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        body = orjson.dumps(CHAT | {"stream": True})
        head = b"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % (gateway.key.encode(), len(body)) + body)
        (claim,) = await gateway.replica.next()
        for _ in range(16):
            await gateway.replica.say(claim, "w" * 1_000_000)
        await await_until(lambda: len(gateway.services.calls) == 0)
        await await_until(lambda: claim.request.id in gateway.replica.cancelled)
        writer.close()


async def test_gzip_is_read_within_the_bound(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, max_body_bytes=4096) as gateway:

        async def post(packed: bytes, encoding: str = "gzip") -> httpx.Response:
            return await gateway.http.post(PATH, content=packed, headers={"content-encoding": encoding})

        call = asyncio.create_task(post(gzip.compress(orjson.dumps(CHAT))))
        await gateway.replica.answer("word")
        assert (await call).status_code == 200
        half = len(orjson.dumps(CHAT)) // 2
        members = gzip.compress(orjson.dumps(CHAT)[:half]) + gzip.compress(orjson.dumps(CHAT)[half:])
        call = asyncio.create_task(post(members, "X-GZIP"))
        await gateway.replica.answer("word")
        assert (await call).status_code == 200

        assert (await post(gzip.compress(b" " * 3_000_000))).status_code == 413
        assert (await post(gzip.compress(b"") * 100)).status_code == 400
        assert (await post(gzip.compress(b"{}" * 100)[:-4])).status_code == 400
        plain = await post(b"{}")
        assert (plain.status_code, plain.json()["error"]["param"]) == (400, "content-encoding")
        for other in ("br", "deflate", "gzip, gzip", "zstd"):
            refused = await post(b"{}", other)
            assert (refused.status_code, refused.headers["accept-encoding"]) == (415, "gzip")


async def test_an_azure_key(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.address) as http:
        assert (await http.get("/v1/models", headers={"api-key": gateway.key})).status_code == 200
        assert (await http.get("/v1/models", headers={"api-key": "tg-wrong"})).status_code == 401
        assert (await http.post(PATH, headers={"api-key": gateway.key}, json={})).status_code == 400


async def test_pages_of_the_set_origins_may_call(redis_url: str, key_prefix: str) -> None:
    mine, other = "https://chat.example.org", "https://evil.example.org"
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-a",
    }
    async with (
        open_gateway(redis_url, key_prefix, cors_origins=f"{mine}, http://localhost:3000") as gateway,
        httpx.AsyncClient(base_url=gateway.address) as http,
    ):
        allowed = await http.options(PATH, headers={"origin": mine, **preflight})
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (204, mine)
        assert allowed.headers["access-control-allow-headers"] == "authorization,x-a"
        assert "POST" in allowed.headers["access-control-allow-methods"]
        for response in (
            await http.post(PATH, headers={"origin": mine}, json=CHAT),  # 401
            await gateway.post(PATH, {}, origin=mine),  # 400
            await http.get("/nope", headers={"origin": mine}),  # 404
            await http.get("/livez", headers={"origin": mine}),
        ):
            assert response.headers["access-control-allow-origin"] == mine
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        for response in (
            await http.options(PATH, headers={"origin": other, **preflight}),
            await http.get("/livez", headers={"origin": other}),
        ):
            assert "access-control-allow-origin" not in response.headers
            assert response.headers["vary"] == "origin"


async def test_no_pages_may_call_unless_set(gateway: Gateway) -> None:
    response = await gateway.http.get("/livez", headers={"origin": "https://chat.example.org"})
    assert "access-control-allow-origin" not in response.headers


async def test_without_keys_only_own_names_and_json(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, no_auth=True) as gateway:

        async def get(host: str) -> int:
            return (await gateway.http.get("/v1/models", headers={"host": host})).status_code

        for own in ("localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:1", "127.1.2.3", "[::1]:8000"):
            assert await get(own) == 200, own
        for other in ("evil.example.org", "localhost.evil.org", "10.0.0.1", "[::2]", "127.0.0.1.nip.io", "["):
            assert await get(other) == 403, other
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            refused = await gateway.http.post(PATH, content=b"{}", headers={"content-type": kind})
            assert (refused.status_code, refused.json()["error"]["param"]) == (415, "content-type")
        bare = await gateway.http.post(PATH, content=b"{}", headers={"origin": "http://evil.example.org"})
        assert bare.status_code == 415
        typed = await gateway.http.post(
            PATH, content=b"{}", headers={"content-type": "application/json; charset=utf-8"}
        )
        assert typed.status_code == 400
        assert (await gateway.http.post(PATH, content=b"{}")).status_code == 400


ECHOES = [
    {"x" * 3_000_000: 1},
    CHAT | {"model": "m" * 3_000_000},
    CHAT | {"n": "n" * 3_000_000},
    CHAT | {"service_tier": "s" * 3_000_000},
    CHAT | {"metadata": {"k" * 3_000_000: "v"}},
    CHAT | {"messages": [{"role": "r" * 3_000_000, "content": "x"}]},
    CHAT | {"messages": [{"role": "user", "content": "x", "y" * 3_000_000: 1}]},
    CHAT | {"stream_options": {"z" * 3_000_000: 1}},
]


@pytest.mark.parametrize("body", ECHOES)
async def test_what_was_sent_does_not_come_back_whole(gateway: Gateway, body: dict[str, object]) -> None:
    refused = await gateway.post(PATH, body)
    assert refused.status_code == 400
    assert len(refused.content) < 5000


async def test_a_long_path_does_not_come_back_whole(gateway: Gateway) -> None:
    for path in ("/" + "p" * 20_000, "/v1/models/" + "m" * 20_000):
        refused = await gateway.http.get(path)
        assert refused.status_code == 404
        assert len(refused.content) < 5000


@pytest.mark.parametrize(("host", "urls"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"])])
def test_ipv6(redis_url: str, key_prefix: str, tmp_path: Path, host: str, urls: list[str]) -> None:
    log = tmp_path / "gateway.log"
    variables = {"REDIS_URL": redis_url, "TIDEGATE_KEY_PREFIX": key_prefix, "TIDEGATE_PORT": "0"}
    with gateway_process(log, TIDEGATE_HOST=host, **variables):
        said = wait_until(lambda: address(log), timeout=30)
        assert said is not None
        port = said.rpartition(":")[2]
        for url in urls:
            assert httpx.get(f"http://{url}:{port}/livez").status_code == 200


def test_a_taken_port_is_named(redis_url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "tidegate.gateway"],
            env=environment(REDIS_URL=redis_url, TIDEGATE_PORT=port),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr and "Traceback" not in done.stderr


def test_few_descriptors_bound_the_connections(redis_url: str, key_prefix: str, tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    variables = {"REDIS_URL": redis_url, "TIDEGATE_KEY_PREFIX": key_prefix, "TIDEGATE_PORT": "0"}
    with gateway_process(log, **variables) as process:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (256, 256))
        url = wait_until(lambda: address(log), timeout=30)
        assert url is not None
        host, port = url.removeprefix("http://").split(":")
        halves = []
        for _ in range(400):
            half = socket.create_connection((host, int(port)), timeout=10)
            half.sendall(b"GET /livez HT")
            halves.append(half)
        assert httpx.get(f"{url}/livez").status_code == 200
        assert psutil.Process(process.pid).num_fds() < 256
        for half in halves:
            half.close()
    assert soft <= hard


async def test_sequences_times_bytes_are_refused_before_they_are_encoded(gateway: Gateway) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "x" * 4_000_000}], "n": 128}
    refused = await gateway.post(PATH, body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert "128 sequences" in refused.json()["error"]["message"]
    assert (await gateway.services.queue.depth(MODEL, REVISION)).waiting == 0


async def test_a_finished_call_is_freed_without_the_collector(gateway: Gateway) -> None:
    seen: list[weakref.ref[OpenCall]] = []
    opened_as = gateway.services.calls.open

    def open_and_watch(requests: Sequence[Request], *, is_streamed: bool, is_kept: bool = False) -> OpenCall:
        call = opened_as(requests, is_streamed=is_streamed, is_kept=is_kept)
        seen.append(weakref.ref(call))
        return call

    gateway.services.calls.open = open_and_watch  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        for is_streamed in (False, True):
            call = asyncio.create_task(gateway.post(PATH, CHAT | {"stream": is_streamed}))
            await gateway.replica.answer("one", "two")
            assert (await call).status_code == 200
            await await_until(lambda: seen[-1]() is None)
    finally:
        gc.enable()


async def test_a_stream_that_is_read_too_slowly_stops_running(gateway: Gateway) -> None:
    _, writer = await opened(gateway)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    body = orjson.dumps(CHAT | {"stream": True})
    head = b"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % (gateway.key.encode(), len(body)) + body)
    (claim,) = await gateway.replica.next()
    for _ in range(64):
        await gateway.replica.say(claim, "w" * 1_000_000)
        if claim.request.id in gateway.replica.cancelled:
            break
    await await_until(lambda: claim.request.id in gateway.replica.cancelled)
    writer.close()


async def test_a_503_shows_nothing_of_redis(own_redis: RedisServer, key_prefix: str) -> None:
    async with open_gateway(own_redis.url, key_prefix) as gateway, Connection(own_redis.url) as admin:
        await admin.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
        await admin.call("CONFIG", "SET", "maxmemory", "1")
        for is_streamed in (False, True):
            full = await gateway.post(PATH, CHAT | {"stream": is_streamed})
            assert (full.status_code, full.json()["error"]["message"]) == (503, QueueOutOfMemory.SHOWN)
            assert full.headers["retry-after"] == "5"
        own_redis.kill()
        for gone in (await gateway.post(PATH, CHAT), await gateway.http.get("/readyz")):
            assert gone.status_code == 503
            assert not re.search(r"maxmemory|OOM|\d+\.\d+\.\d+\.\d+|localhost|:\d{4}|Connect", gone.text)


async def test_bodies_on_their_way_in_have_a_bound_together(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, max_body_bytes=200_000, bodies_max_bytes=1) as gateway:
        _, holding = await opened(gateway)  # one key's half is 200,000
        head = b"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
        head = head % (gateway.key.encode(), 190_000)
        holding.write(head + b" " * 150_000)
        await await_until(lambda: gateway.services.intake.held_bytes == 150_000)
        large = orjson.dumps(CHAT | {"user": "u"}) + b" " * 100_000
        reader, writer = await opened(gateway)
        writer.write(head.replace(b"190000", b"%d" % len(large)) + large[:90_000])
        await await_until(lambda: gateway.services.intake.held_bytes == 150_000)
        writer.write(large[90_000:])  # it is read to its end, or the answer would be lost in a reset
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 30)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1" in answer
        assert b'"too_many_bytes"' in answer
        writer.write(
            head.replace(b"190000", b"2") + b"{}"
        )  # the connection goes on, and small bodies are taken
        assert (await asyncio.wait_for(reader.readuntil(b"}}"), 30)).startswith(b"HTTP/1.1 400 ")
        writer.close()
        holding.transport.abort()
        await await_until(lambda: gateway.services.intake.held_bytes == 0)
        whole = await gateway.http.post(PATH, content=large.replace(b'"tide"', b'"none"'))
        assert whole.status_code == 404
