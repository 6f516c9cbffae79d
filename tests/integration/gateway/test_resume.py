"""Streams that go on where their client was, on any gateway: every token once."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.integration.gateway.rig import CHAT, MODEL, Gateway, open_gateway
from tests.waiting import await_until
from tidegate.messages.queue import QueueLimits
from tidegate.store.connection import Connection

CHAT_PATH, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IDS = {"x-tidegate-event-ids": "1"}
WORDS = ["One", " two", " three", " four", " five", " six"]


@pytest.fixture
async def other(redis_url: str, key_prefix: str, gateway: Gateway) -> AsyncIterator[Gateway]:
    """A second gateway on the same queue; its key is of the same tenant."""
    async with open_gateway(redis_url, key_prefix) as other:
        yield other


class Client:
    """Reads a stream until it ends or the client leaves."""

    def __init__(self, gateway: Gateway, path: str, body: dict[str, Any], **headers: str) -> None:
        self.events: list[str] = []
        self._request = gateway.http.stream("POST", path, json=body | {"stream": True}, headers=headers)
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with self._request as response:
            assert response.status_code == 200, await response.aread()
            text = ""
            async for piece in response.aiter_text():
                *events, text = (text + piece).split("\n\n")
                self.events += [event for event in events if not event.startswith(":")]

    async def until(self, text: str) -> list[str]:
        """The events so far, once one has this in it."""
        await await_until(lambda: any(text in event for event in self.events))
        return self.events

    async def leave(self) -> list[str]:
        self._reading.cancel()
        await asyncio.wait({self._reading})
        return self.events

    async def end(self) -> list[str]:
        await self._reading
        return self.events


def whole(text: str) -> list[str]:
    return [event for event in text.split("\n\n") if event and not event.startswith(":")]


def last_id(event: str) -> str:
    return event.partition("\n")[0].removeprefix("id: ")


async def resumed(gateway: Gateway, last: str) -> list[str]:
    call_id = last.partition("/")[0]
    response = await gateway.http.get(f"/v1/requests/{call_id}/events", headers={"last-event-id": last})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return whole(response.text)


BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT_PATH, CHAT | {"stream_options": {"include_usage": True}}),
    (CHAT_PATH, CHAT | {"echo": True, "return_token_ids": True}),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "logprobs": 2, "stream_options": {"include_usage": True}}),
    ("/v1/messages", CHAT | {"max_tokens": 9}),
    ("/", {"inputs": "x"}),
    ("/v1/responses", {"model": MODEL, "input": "x", "store": False}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_a_client_that_left_goes_on_at_another_gateway_with_every_event_once(
    gateway: Gateway, other: Gateway, path: str, body: dict[str, Any]
) -> None:
    client = Client(gateway, path, body, **IDS)
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, WORDS[0])
    await gateway.replica.say(claim, WORDS[1])
    await client.until(WORDS[1])
    got = await client.leave()
    await await_until(lambda: not len(gateway.services.calls))
    await gateway.replica.say(claim, WORDS[2])
    rest = asyncio.create_task(resumed(other, last_id(got[-1])))
    await await_until(lambda: len(other.services.calls))
    for word in WORDS[3:-1]:
        await gateway.replica.say(claim, word)
    await gateway.replica.say(claim, WORDS[-1], "stop")
    call_id = last_id(got[0]).partition("/")[0]
    again = await resumed(gateway, f"{call_id}/0")
    assert _timeless(got + await rest) == _timeless(again)
    if path in (CHAT_PATH, COMPLETIONS):
        assert again.pop() == "data: [DONE]"
    assert [last_id(event) for event in again] == [f"{call_id}/{k + 1}" for k in range(len(again))]
    assert not gateway.replica.cancelled


def _timeless(events: list[str]) -> list[str]:
    """What is read later has the queue's time of the end, and not the gateway's."""
    return [re.sub(r'"completed_at":\d+', '"completed_at":0', event) for event in events]


async def test_several_choices_are_counted_each_by_itself(gateway: Gateway, other: Gateway) -> None:
    body = {"model": MODEL, "prompt": "x", "n": 2, "stream_options": {"include_usage": True}}
    client = Client(gateway, COMPLETIONS, body, **IDS)
    claims = await gateway.replica.next(2)
    for word in "abc":
        await gateway.replica.say(claims[1], word)
    await client.until('c"')
    await gateway.replica.say(claims[0], "x")
    await client.until('"x"')
    got = await client.leave()
    call_id = last_id(got[0]).partition("/")[0]
    assert [last_id(event) for event in got] == [f"{call_id}/{c}" for c in ("0,1", "0,2", "0,3", "1,3")]
    for claim in claims:
        await gateway.replica.say(claim, "end", "stop")
    rest = await resumed(other, last_id(got[-1]))
    chunks = [json.loads(event.partition("data: ")[2]) for event in rest[:-1]]
    assert [(c["index"], c["text"]) for chunk in chunks for c in chunk["choices"]] == [(0, "end"), (1, "end")]
    assert last_id(rest[0]) == f"{call_id}/2,3" and last_id(rest[2]) == f"{call_id}/2,5"
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    for event in rest[:-1]:
        assert await resumed(gateway, last_id(event)) == rest[rest.index(event) + 1 :]


async def test_two_readers_of_one_call_at_one_gateway_hear_all_of_it(gateway: Gateway) -> None:
    client = Client(gateway, CHAT_PATH, CHAT, **IDS)
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "a")
    call_id = last_id((await client.until("a"))[0]).partition("/")[0]
    reader = asyncio.create_task(resumed(gateway, f"{call_id}/0"))
    await await_until(lambda: len(gateway.services.calls) == 2)
    await gateway.replica.say(claim, "b", "stop")
    assert await reader == await client.end()


async def test_a_failure_is_told_to_who_resumes(gateway: Gateway, other: Gateway) -> None:
    client = Client(gateway, CHAT_PATH, CHAT, **IDS)
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "a")
    await client.until('"a"')
    last = last_id((await client.leave())[-1])
    await gateway.replica.say(claim, "b")
    await gateway.replica.say(claim, "", "error", code="EngineError", message="broken")
    rest = await resumed(other, last)
    assert '"content":"b"' in rest[-2]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "generation_failed"


async def test_only_the_tenant_of_a_call_can_resume_it(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post(CHAT_PATH, CHAT | {"stream": True}, **IDS))
    await gateway.replica.answer("a", "b")
    events = whole((await call).text)
    call_id = last_id(events[0]).partition("/")[0]
    _, secret = await gateway.keys.create("other", tenant="rival")
    await await_until(lambda: gateway.services.keys.find(secret))
    path = f"/v1/requests/{call_id}/events"
    refused = await gateway.http.get(path, headers={"authorization": f"Bearer {secret}"})
    unknown = await gateway.http.get("/v1/requests/chatcmpl-nothing/events")
    for response in (refused, unknown):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "call_not_found"
    assert whole((await gateway.http.get(path, params={"starting_after": "1"})).text) == events[1:]


@pytest.mark.parametrize(
    ("headers", "query", "param"),
    [
        ({"last-event-id": "chatcmpl-other/3"}, {}, "last-event-id"),
        ({"last-event-id": "{id}/x"}, {}, "last-event-id"),
        ({"last-event-id": "{id}/1,2"}, {}, "last-event-id"),
        ({}, {"starting_after": "-1"}, "starting_after"),
    ],
)
async def test_an_id_that_is_none_is_refused_by_name(
    gateway: Gateway, headers: dict[str, str], query: dict[str, str], param: str
) -> None:
    call = asyncio.create_task(gateway.post(CHAT_PATH, CHAT | {"stream": True}, **IDS))
    await gateway.replica.answer("a")
    call_id = last_id(whole((await call).text)[0]).partition("/")[0]
    response = await gateway.http.get(
        f"/v1/requests/{call_id}/events",
        headers={name: value.format(id=call_id) for name, value in headers.items()},
        params=query,
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_stream_without_ids_ends_with_its_client_and_is_not_kept(gateway: Gateway) -> None:
    client = Client(gateway, CHAT_PATH, CHAT)
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "a")
    await client.until('"a"')
    call_id = json.loads((await client.leave())[0].removeprefix("data: "))["id"]
    await await_until(lambda: claim.request.id in gateway.replica.cancelled)
    assert (await gateway.http.get(f"/v1/requests/{call_id}/events")).status_code == 404


async def test_what_is_kept_is_bounded_in_bytes(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, tenant_kept_bytes=2000) as gateway:
        body = CHAT | {"stream": True, "user": "u" * 1000}
        call = asyncio.create_task(gateway.post(CHAT_PATH, body, **IDS))
        await gateway.replica.answer("a")
        assert (await call).status_code == 200
        refused = await gateway.post(CHAT_PATH, body, **IDS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_much_kept")
        assert refused.headers["retry-after"]
        call = asyncio.create_task(gateway.post(CHAT_PATH, body))
        await gateway.replica.answer("a")
        assert (await call).status_code == 200


async def test_a_refused_call_is_not_kept(gateway: Gateway, connection: Connection, key_prefix: str) -> None:
    await gateway.put_model(limits=QueueLimits(max_requests=2))
    body = {"model": MODEL, "prompt": "x", "n": 2, "stream": True}
    waiting = asyncio.create_task(gateway.post(COMPLETIONS, {"model": MODEL, "prompt": "x"}))
    [claim] = await gateway.replica.next()
    assert (await gateway.post(COMPLETIONS, body, **IDS)).status_code == 429
    assert (await gateway.post(COMPLETIONS, body | {"n": 3}, **IDS)).status_code == 413
    await gateway.replica.say(claim, "a", "stop")
    await waiting
    assert await connection.call("KEYS", f"{key_prefix}:call:*") == []
    assert await connection.call("HGETALL", f"{key_prefix}:kept_bytes") == {}
