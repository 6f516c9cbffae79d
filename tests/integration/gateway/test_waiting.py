"""Held status lines, news of the place, heartbeats, errors before and after the first token."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest

from tests.integration.gateway.rig import CHAT, MODEL, Gateway, open_gateway
from tests.waiting import await_until
from tidegate.messages.queue import QueueLimits
from tidegate.messages.work import FinishReason, Segment

STREAM = CHAT | {"stream": True}
PATH = "/v1/chat/completions"


@pytest.fixture
async def impatient(redis_url: str, key_prefix: str) -> AsyncIterator[Gateway]:
    """Holds the status line for a moment only."""
    async with open_gateway(
        redis_url, key_prefix, hold_status_seconds=0.05, heartbeat_seconds=0.1
    ) as gateway:
        yield gateway


async def test_a_waiting_stream_hears_its_place_and_heartbeats(impatient: Gateway) -> None:
    ahead = asyncio.create_task(impatient.post(PATH, CHAT))
    await await_until(lambda: len(impatient.services.calls) == 1)
    async with impatient.http.stream("POST", PATH, json=STREAM) as response:
        assert response.status_code == 200
        assert response.headers["x-tidegate-queue-position"] == "2"
        lines = response.aiter_lines()
        seen = [await anext(lines) for _ in range(4)]
        while not any("position 2" in line for line in seen):
            seen.append(await anext(lines))
        claims = await impatient.replica.next(2)
        for claim in claims:
            await impatient.replica.say(claim, "done", "stop")
        rest = [line async for line in lines]
    assert ": heartbeat" in seen
    assert rest[-2] == "data: [DONE]" or "data: [DONE]" in rest
    assert (await ahead).status_code == 200


async def test_the_estimate_is_told_where_the_model_sleeps(impatient: Gateway) -> None:
    await impatient.put_model(replicas_ready=0, wake_seconds=12.0)
    async with impatient.http.stream("POST", PATH, json=STREAM) as response:
        assert response.headers["x-tidegate-queue-position"] == "1"
        assert response.headers["x-tidegate-estimated-wait-seconds"] == "12"
        lines = response.aiter_lines()
        seen: list[str] = []
        while not any(line.startswith(": waiting") for line in seen):
            seen.append(await anext(lines))
        await impatient.replica.answer("awake")
        assert any("awake" in line for line in [line async for line in lines])
    assert ": waiting, position 1, estimated wait 12 s" in seen


async def test_where_others_hold_the_room_the_reason_is_told_and_no_estimate_is_made_up(
    impatient: Gateway,
) -> None:
    why = "A replica needs 1 CPU core, which is held by other."
    await impatient.put_model(replicas_ready=0, wake_seconds=12.0, reason="WaitingForRoom", message=why)
    async with impatient.http.stream("POST", PATH, json=STREAM) as response:
        assert response.headers["x-tidegate-queue-position"] == "1"
        assert "x-tidegate-estimated-wait-seconds" not in response.headers
        seen: list[str] = []
        lines = response.aiter_lines()
        while not any(line.startswith(": waiting") for line in seen):
            seen.append(await anext(lines))
        await impatient.replica.answer("awake")
        assert any("awake" in line for line in [line async for line in lines])
    assert f": waiting, position 1, WaitingForRoom: {why}" in seen


async def test_who_waited_in_vain_for_room_is_told_who_held_it(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post(PATH, CHAT))
    [claim] = await gateway.replica.next()
    await gateway.put_model(replicas_ready=0, reason="WaitingForRoom", message="It is held by other.")
    await gateway.replica.say(claim, "", "expired", message="It waited past its deadline.")
    response = await call
    assert response.status_code == 504
    assert response.json()["error"]["message"] == "It waited past its deadline. It is held by other."


async def test_a_stream_is_data_lines_unless_ids_are_asked_for(gateway: Gateway) -> None:
    """`vllm bench serve` and parsers like it take a chunk for `data:` and JSON, whatever stands before."""
    call = asyncio.create_task(gateway.post(PATH, STREAM))
    await gateway.replica.answer("a", "b", "c")
    events = [event.strip() for event in (await call).text.split("\n\n") if event.strip()]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "abc"


@pytest.mark.parametrize("headers", [{"x-tidegate-event-ids": "1"}, {"last-event-id": "x/3"}])
async def test_event_ids_count_up_for_who_asks(gateway: Gateway, headers: dict[str, str]) -> None:
    call = asyncio.create_task(gateway.post(PATH, STREAM, **headers))
    await gateway.replica.answer("a", "b", "c")
    text = (await call).text
    ids = re.findall(r"^id: (chatcmpl-[\w-]{22})/(\d+)$", text, re.MULTILINE)
    assert [int(number) for _, number in ids] == list(range(1, len(ids) + 1))
    assert len({call_id for call_id, _ in ids}) == 1
    assert text.endswith("data: [DONE]\n\n")


FAILURES: list[tuple[FinishReason, str, int, str | None, str | None]] = [
    ("error", "ContextLengthExceeded", 400, "context_length_exceeded", "messages"),
    ("error", "InvalidPrompt", 400, "invalid_prompt", "messages"),
    ("error", "PromptTooCostly", 400, "prompt_too_costly", "messages"),
    ("error", "PromptFailed", 500, "generation_failed", None),
    ("error", "ChatTemplateInvalid", 500, "chat_template_invalid", None),
    ("error", "PoisonRequest", 500, "generation_failed", None),
    ("expired", "Expired", 504, "deadline_exceeded", None),
    ("cancelled", "ModelRemoved", 503, "request_cancelled", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("reason", "code", "status", "error_code", "param"), FAILURES)
async def test_a_failure_before_the_first_token_is_a_status(
    gateway: Gateway,
    reason: FinishReason,
    code: str,
    status: int,
    error_code: str | None,
    param: str | None,
    stream: bool,
) -> None:
    call = asyncio.create_task(gateway.post(PATH, CHAT | {"stream": stream}))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "", reason, code=code, message="secret inside")
    response = await call
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (error_code, param)
    assert response.headers["x-request-id"]
    assert ("secret inside" in error["message"]) is (status != 500 or code == "ChatTemplateInvalid")


async def test_an_error_after_the_first_token_travels_in_the_stream(gateway: Gateway) -> None:
    shown = asyncio.Event()

    async def fail_once_shown() -> None:
        # Read together with the first token, the error would still be a status of its own.
        [claim] = await gateway.replica.next()
        await gateway.replica.say(claim, "first")
        await shown.wait()
        await gateway.replica.say(claim, "", "error", code="EngineError", message="secret inside")

    engine = asyncio.create_task(fail_once_shown())
    lines: list[str] = []
    async with gateway.http.stream("POST", PATH, json=STREAM) as response:
        async for line in response.aiter_lines():
            lines.append(line)
            if "first" in line:
                shown.set()
    await engine
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data")]
    assert response.status_code == 200
    assert orjson.loads(events[-1])["error"]["type"] == "server_error"
    assert "[DONE]" not in events
    assert not any("secret" in line for line in lines)
    assert shown.is_set()


async def test_the_failure_of_one_choice_cancels_the_others(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post(PATH, CHAT | {"n": 2}))
    bad, other = await gateway.replica.next(2)
    await gateway.replica.say(bad, "", "error", code="EngineError")
    assert (await call).status_code == 500
    await await_until(lambda: other.request.id in gateway.replica.cancelled)
    assert bad.request.id not in gateway.replica.cancelled


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels(gateway: Gateway, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=gateway.address) as http:
        headers = {"authorization": f"Bearer {gateway.key}"}
        call = asyncio.create_task(http.post(PATH, json=CHAT | {"stream": stream, "n": 2}, headers=headers))
        claims = await gateway.replica.next(2)
        if stream:
            await gateway.replica.say(claims[0], "some")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await await_until(lambda: gateway.replica.cancelled == {claim.request.id for claim in claims})
    assert len(gateway.services.calls) == 0


async def test_a_client_that_leaves_while_waiting_frees_its_place(impatient: Gateway) -> None:
    async with impatient.http.stream("POST", PATH, json=STREAM) as response:
        assert response.headers["x-tidegate-queue-position"] == "1"

    async def is_empty() -> bool:
        return (await impatient.services.queue.depth(MODEL, "0123456789")).waiting == 0

    assert await await_until(is_empty)


async def test_a_full_queue_is_refused_with_retry_after(gateway: Gateway) -> None:
    await gateway.put_model(limits=QueueLimits(max_requests=1))
    first = asyncio.create_task(gateway.post(PATH, CHAT))
    await gateway.replica.next()
    refused = await gateway.post(PATH, STREAM)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert len(gateway.services.calls) == 1
    first.cancel()


async def test_a_hopeless_wait_is_refused_and_leaves_nothing_behind(gateway: Gateway) -> None:
    await gateway.put_model(replicas_ready=0, wake_seconds=60.0)
    refused = await gateway.post(PATH, CHAT, **{"x-tidegate-max-wait-seconds": "5"})
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "60"

    async def is_empty() -> bool:
        return (await gateway.services.queue.depth(MODEL, "0123456789")).waiting == 0

    assert await await_until(is_empty)


async def test_the_header_lowers_the_deadline(gateway: Gateway) -> None:
    before = time.time()
    call = asyncio.create_task(gateway.post(PATH, CHAT, **{"x-tidegate-max-wait-seconds": "20"}))
    [claim] = await gateway.replica.answer("x")
    assert (await call).status_code == 200
    assert claim.request.deadline - claim.request.created == pytest.approx(20)
    assert claim.request.created >= before - 1
    wrong = await gateway.post(PATH, CHAT, **{"x-tidegate-max-wait-seconds": "soon"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-tidegate-max-wait-seconds")


async def test_a_removed_model_ends_what_waits_for_it(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post(PATH, CHAT))
    await await_until(lambda: len(gateway.services.calls) == 1)

    async def is_waiting() -> bool:
        return (await gateway.services.queue.depth(MODEL, "0123456789")).waiting == 1

    await await_until(is_waiting)
    await gateway.registry.delete_model(MODEL, "The model was removed by its file.")
    response = await call
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "The model was removed by its file."
    gone = await gateway.post(PATH, CHAT)
    assert gone.status_code == 404


async def test_a_model_that_takes_nothing_says_why(gateway: Gateway) -> None:
    await gateway.put_model(accepts=False, reason="WeightsMissing", message="No file model.safetensors.")
    refused = await gateway.post(PATH, CHAT)
    assert refused.status_code == 503
    assert "No file model.safetensors." in refused.json()["error"]["message"]


async def test_segments_that_went_missing_are_read_from_the_log(gateway: Gateway) -> None:
    calls: Any = gateway.services.calls
    deliver = calls.deliver
    dropped: list[Segment] = []

    def lossy(segments: list[Segment]) -> None:
        dropped.extend(segment for segment in segments if segment.seq in (0, 2, 3))
        deliver([segment for segment in segments if segment.seq not in (0, 2, 3)])

    # The store hands every batch to this gateway's `deliver`; here half of them get lost on the way.
    await gateway.services.queue.start(lossy, calls.lost)
    call = asyncio.create_task(gateway.post(PATH, STREAM))
    await gateway.replica.answer("a", "b", "c", "d", "e")
    contents = re.findall(r'"content":"(.)"', (await call).text)
    assert "".join(contents) == "abcde"
    assert len(dropped) == 3


async def test_after_a_reconnect_the_logs_are_read(gateway: Gateway) -> None:
    calls: Any = gateway.services.calls
    heard: list[Segment] = []
    await gateway.services.queue.start(lambda segments: heard.extend(segments), calls.lost)
    call = asyncio.create_task(gateway.post(PATH, CHAT))
    await gateway.replica.answer("lost ", "but ", "found")
    await await_until(lambda: len(heard) == 3)
    assert not call.done()
    calls.lost()
    assert (await call).json()["choices"][0]["message"]["content"] == "lost but found"


async def test_a_stop_tells_open_streams_and_cancels_their_requests(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post(PATH, STREAM))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "begun")
    await await_until(lambda: b"first_token" in gateway.services.metrics.exposition())
    gateway.server.should_exit = True
    text = (await call).text
    assert "begun" in text
    assert "The gateway is stopping" in text
    assert "[DONE]" not in text
    await await_until(lambda: claim.request.id in gateway.replica.cancelled)


async def test_an_answer_that_ends_within_the_grace_is_whole(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post(PATH, CHAT))
    [claim] = await gateway.replica.next()
    gateway.server.should_exit = True
    await gateway.replica.say(claim, "late", "stop")
    assert (await call).json()["choices"][0]["message"]["content"] == "late"


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_a_bug_shows_nothing_of_the_inside(
    gateway: Gateway, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(gateway.services.queue, "submit", broken)
    response = await gateway.post(PATH, body)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["code"] == "generation_failed"
    assert len(gateway.services.calls) == 0
