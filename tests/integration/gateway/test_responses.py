"""The Responses API with OpenAI's client, on two gateways: stored, streamed, in the background, resumed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.engine_requests import sampling_of
from tests.integration.gateway.rig import MODEL, PROMPT_TOKENS, Gateway, open_gateway
from tests.waiting import await_until
from tidegate.messages.work import CallDelta, ChatPrompt, Claim, Generate, Tokens

# What Open Responses asks of every response (its openapi.json, `ResponseResource.required`).
REQUIRED = """
id object created_at completed_at status incomplete_details model previous_response_id instructions output
error
tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty top_logprobs
temperature reasoning user usage max_output_tokens max_tool_calls store background service_tier metadata
safety_identifier prompt_cache_key
"""
WHOLE = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    "strict": False,
}
CALLED = (
    Tokens(calls=[CallDelta(0, "call_1", "get_weather", "")]),
    Tokens(calls=[CallDelta(0, "", "", '{"place":"Rome"}')]),
)


def client_of(gateway: Gateway, key: str = "") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{gateway.address}/v1",
        api_key=key or gateway.key,
        max_retries=0,
        _strict_response_validation=True,
    )


@pytest.fixture
def client(gateway: Gateway) -> openai.AsyncOpenAI:
    return client_of(gateway)


@pytest.fixture
async def other(redis_url: str, key_prefix: str, gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a second gateway on the same queue, of the same tenant."""
    async with open_gateway(redis_url, key_prefix) as other:
        yield client_of(other)


def messages_of(claim: Claim) -> list[dict[str, Any]]:
    work = claim.request.work
    assert isinstance(work, Generate) and isinstance(work.prompt, ChatPrompt)
    return work.prompt.messages


async def answered(gateway: Gateway, client: openai.AsyncOpenAI, text: str = "Hi", **body: Any) -> Response:
    call = asyncio.create_task(client.responses.create(model=MODEL, **({"input": "Hello"} | body)))
    await gateway.replica.answer(*text.split("|"))
    return await call


async def read(stream: Any) -> list[ResponseStreamEvent]:
    return [event async for event in stream]


async def test_a_response(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    call = asyncio.ensure_future(
        client.responses.with_raw_response.create(
            model=MODEL,
            instructions="Be brief.",
            input=[
                {"role": "developer", "content": "Be kind."},
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}],
                },
            ],
            temperature=0,
            top_p=0.5,
            max_output_tokens=9,
            metadata={"a": "b"},
            reasoning={"effort": "low"},
            text={"format": {"type": "text"}},
            include=["message.output_text.logprobs"],
            truncation="disabled",
            store=True,
        )
    )
    [claim] = await gateway.replica.answer("Hi", " there")
    raw = await call
    answer = raw.parse()
    assert answer.output_text == "Hi there"
    assert (answer.status, answer.object, answer.model) == ("completed", "response", MODEL)
    assert answer.id.startswith("resp_") and answer.metadata == {"a": "b"}
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (PROMPT_TOKENS, 2)
    assert set(REQUIRED.split()) <= set(raw.http_response.json())
    assert messages_of(claim) == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hel\nlo"},
    ]
    sampling = sampling_of(claim.request)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0, 0.5, 9)
    assert sampling.top_logprobs == 0 and sampling.left_out == ("top_k", "min_p", "repetition_penalty")
    assert (await client.responses.retrieve(answer.id)).to_dict() == answer.to_dict()


async def test_json_by_a_schema(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked: Any = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    call = asyncio.create_task(client.responses.create(model=MODEL, input="Hello", text={"format": asked}))
    [claim] = await gateway.replica.answer('{"a":1}')
    answer = await call
    assert "integer" in sampling_of(claim.request).grammar
    assert answer.text is not None and answer.text.to_dict()["format"] == asked | {"description": None}
    found = await client.responses.retrieve(answer.id)
    assert found.output_text == '{"a":1}'


async def test_a_stream_has_openais_events_and_can_be_read_again(
    gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI
) -> None:
    opening = asyncio.create_task(client.responses.create(model=MODEL, input="Hello", stream=True))
    await gateway.replica.answer("One", " two")
    events = await read(await opening)
    assert [event.type for event in events] == WHOLE
    assert [event.sequence_number for event in events] == list(range(len(WHOLE)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "One two"
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == "One two"
    again = await read(await other.responses.retrieve(last.response.id, stream=True, starting_after=4))
    assert [event.to_dict() for event in again[:-1]] == [event.to_dict() for event in events[5:-1]]
    assert again[-1].type == "response.completed"


async def test_what_is_cut_by_length_is_incomplete(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    opening = asyncio.create_task(client.responses.create(model=MODEL, input="Hello", stream=True))
    await gateway.replica.answer("One", finish="length")
    last = (await read(await opening))[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert (await client.responses.retrieve(last.response.id)).status == "incomplete"


async def test_a_conversation_goes_on_at_another_gateway(
    gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI
) -> None:
    first = await answered(gateway, client, "Hi| Ann", input="I am Ann.", instructions="Be brief.")
    second = await answered(gateway, other, "Ann", input="Who am I?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    call = asyncio.create_task(
        client.responses.create(
            model=MODEL, input="Sure?", previous_response_id=second.id, instructions="Shout."
        )
    )
    [claim] = await gateway.replica.answer("YES")
    await call
    assert messages_of(claim) == [
        {"role": "system", "content": "Shout."},
        {"role": "user", "content": "I am Ann."},
        {"role": "assistant", "content": "Hi Ann"},
        {"role": "user", "content": "Who am I?"},
        {"role": "assistant", "content": "Ann"},
        {"role": "user", "content": "Sure?"},
    ]


async def test_the_output_may_be_sent_back(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    first = await answered(gateway, client, "Hi")
    back: list[Any] = [{"type": "reasoning", "id": "rs_1", "summary": []}]
    back += [item.to_dict() for item in first.output]
    call = asyncio.create_task(
        client.responses.create(model=MODEL, input=[*back, {"role": "user", "content": "Go on"}])
    )
    [claim] = await gateway.replica.answer("on")
    await call
    assert messages_of(claim)[0] == {"role": "assistant", "content": "Hi"}


async def test_a_call_of_a_tool_and_its_output(
    gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI
) -> None:
    tools: list[Any] = [WEATHER]
    asked = asyncio.create_task(
        client.responses.create(model=MODEL, input="Rome?", tools=tools, tool_choice="required")
    )
    [claim] = await gateway.replica.next()
    work = claim.request.work
    assert isinstance(work, Generate) and isinstance(work.prompt, ChatPrompt)
    assert work.prompt.tool_choice == "required"
    assert work.prompt.tools[0]["function"]["name"] == "get_weather"
    await gateway.replica.emit(claim, Tokens([1], reasoning="Hm."), *CALLED, finish="stop")
    answer = await asked
    assert [item.type for item in answer.output] == ["reasoning", "function_call"]
    call = answer.output[1]
    assert call.type == "function_call"
    assert (call.call_id, call.name, call.arguments, call.status) == (
        "call_1",
        "get_weather",
        '{"place":"Rome"}',
        "completed",
    )
    assert answer.tools[0].to_dict() == WEATHER and answer.tool_choice == "required"
    output = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    seen = [
        {"role": "user", "content": "Rome?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"place": "Rome"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny", "name": "get_weather"},
    ]
    sent_back = [{"role": "user", "content": "Rome?"}, *(item.to_dict() for item in answer.output), output]
    for body in ({"input": [output], "previous_response_id": answer.id}, {"input": sent_back}):
        going_on = asyncio.create_task(other.responses.create(model=MODEL, tools=tools, **body))
        [claim] = await gateway.replica.answer("Sunny.")
        assert (await going_on).output_text == "Sunny."
        assert messages_of(claim) == seen
    items = await client.responses.input_items.list((await going_on).id, order="asc")
    assert [item.type for item in items.data] == [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
    ]


async def test_the_events_of_reasoning_text_and_calls(
    gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI
) -> None:
    tools: list[Any] = [WEATHER]
    opening = asyncio.create_task(
        client.responses.create(model=MODEL, input="Rome?", tools=tools, stream=True)
    )
    [claim] = await gateway.replica.next()
    second = Tokens(calls=[CallDelta(1, "call_2", "get_weather", "{}")])
    said = (Tokens([1], reasoning="Hm."), Tokens([2], "I"), Tokens([3], " look."), *CALLED, second)
    await gateway.replica.emit(claim, *said, finish="stop")
    events = await read(await opening)
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    last = events[-1]
    assert last.type == "response.completed"
    done = [event.item.to_dict() for event in events if event.type == "response.output_item.done"]
    assert done == [item.to_dict() for item in last.response.output]
    assert [item["id"] for item in done] == [
        event.item.id for event in events if event.type == "response.output_item.added"
    ]
    for cut in (5, 12, 17):
        rest = await read(await other.responses.retrieve(last.response.id, stream=True, starting_after=cut))
        assert [event.to_dict() for event in rest[:-1]] == [event.to_dict() for event in events[cut + 1 : -1]]


async def test_one_in_the_background_needs_no_gateway(
    redis_url: str, key_prefix: str, gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    async with open_gateway(redis_url, key_prefix) as dying:
        begun = await client_of(dying).responses.create(model=MODEL, input="Hello", background=True)
        assert (begun.status, begun.background, begun.output) == ("queued", True, [])
        assert (await client.responses.retrieve(begun.id)).status == "queued"
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "One")
    found = await client.responses.retrieve(begun.id)
    assert (found.status, found.output_text, found.usage) == ("in_progress", "One", None)
    await gateway.replica.say(claim, " two", "stop")
    found = await client.responses.retrieve(begun.id)
    assert (found.status, found.output_text) == ("completed", "One two")
    assert found.usage is not None and found.usage.total_tokens == PROMPT_TOKENS + 2


async def test_a_background_stream_begins_at_once_and_is_resumed_anywhere(
    gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI
) -> None:
    stream = await client.responses.create(model=MODEL, input="Hello", background=True, stream=True)
    got = [await anext(stream) for _ in range(3)]
    assert [event.type for event in got] == ["response.created", "response.queued", "response.in_progress"]
    assert got[0].type == "response.created" and got[0].response.status == "queued"
    response_id = got[0].response.id
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "One")
    got += [await anext(stream) for _ in range(3)]
    await stream.close()
    await await_until(lambda: not len(gateway.services.calls))
    await gateway.replica.say(claim, " two")
    after = got[-1].sequence_number
    rest = await other.responses.retrieve(response_id, stream=True, starting_after=after)
    got.append(await anext(rest))
    await gateway.replica.say(claim, " three", "stop")
    got += await read(rest)
    assert [event.sequence_number for event in got] == list(range(len(got)))
    assert "".join(e.delta for e in got if e.type == "response.output_text.delta") == "One two three"
    assert got[-1].type == "response.completed"


async def test_cancelled(gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model=MODEL, input="Hello", background=True, stream=True)
    first = await anext(stream)
    assert first.type == "response.created"
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "One")
    cancelled = await other.responses.cancel(first.response.id)
    assert (cancelled.status, cancelled.output_text, cancelled.error) == ("cancelled", "One", None)
    await await_until(lambda: claim.request.id in gateway.replica.cancelled)
    last = (await read(stream))[-1]
    assert last.type == "response.failed" and last.response.status == "cancelled"
    assert (await client.responses.cancel(first.response.id)).status == "cancelled"
    foreground = await answered(gateway, client)
    with pytest.raises(openai.BadRequestError, match="only a response in the background"):
        await client.responses.cancel(foreground.id)


async def test_deleted(gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI) -> None:
    begun = await client.responses.create(model=MODEL, input="Hello", background=True)
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "One")
    await other.responses.delete(begun.id)
    await await_until(lambda: claim.request.id in gateway.replica.cancelled)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(begun.id)


async def test_input_items(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    given: list[Any] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "c"}]},
    ]
    answer = await answered(gateway, client, input=given)
    newest = await client.responses.input_items.list(answer.id, limit=2)
    texts = [item.to_dict()["content"][0]["text"] for item in newest.data]  # type: ignore[index]
    assert texts == ["c", "b"] and newest.has_more
    everything = [item async for item in client.responses.input_items.list(answer.id, limit=1, order="asc")]
    assert [item.to_dict()["role"] for item in everything] == ["user", "assistant", "user"]


async def test_a_failure_is_a_status_an_event_and_what_is_read_later(
    gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI
) -> None:
    call = asyncio.create_task(client.responses.create(model=MODEL, input="Hello"))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "", "error", code="ContextLengthExceeded", message="Too long.")
    with pytest.raises(openai.BadRequestError) as caught:
        await call
    assert caught.value.param == "input"
    opening = asyncio.create_task(client.responses.create(model=MODEL, input="Hello", stream=True))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "One")
    stream = await opening
    await gateway.replica.say(claim, "", "error", code="EngineError", message="secret")
    last = (await read(stream))[-1]
    assert last.type == "response.failed" and last.response.error is not None
    found = await other.responses.retrieve(last.response.id)
    assert (found.status, found.error, found.output_text) == ("failed", last.response.error, "One")
    assert "secret" not in last.response.error.message
    again = await read(await other.responses.retrieve(last.response.id, stream=True))
    assert [event.sequence_number for event in again] == list(range(len(again)))
    assert again[-1].type == "response.failed"
    with pytest.raises(openai.BadRequestError, match="nothing goes on from it"):
        await client.responses.create(model=MODEL, input="x", previous_response_id=last.response.id)


async def test_what_is_wrong_with_a_reader_is_no_event_of_the_answer(
    gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI
) -> None:
    stream = await client.responses.create(model=MODEL, input="Hello", background=True, stream=True)
    got = [await anext(stream)]
    assert got[0].type == "response.created"
    [claim] = await gateway.replica.next()
    [reader] = gateway.services.calls._kept
    reader.most_pending_bytes = 0
    await gateway.replica.say(claim, "One")
    *more, error = await read(stream)
    got += more
    assert (error.type, error.sequence_number) == ("error", got[-1].sequence_number)
    await gateway.replica.say(claim, " two", "stop")
    rest = await other.responses.retrieve(
        got[0].response.id, stream=True, starting_after=error.sequence_number
    )
    got += await read(rest)
    assert [event.sequence_number for event in got] == list(range(len(got)))
    assert got[-1].type == "response.completed" and got[-1].response.output_text == "One two"


async def test_its_stream_may_be_read_as_that_of_any_call(gateway: Gateway) -> None:
    body = {"model": MODEL, "input": "Hello", "background": True, "stream": True}
    call = asyncio.create_task(gateway.post("/v1/responses", body, **{"x-tidegate-event-ids": "1"}))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "One")
    await gateway.replica.say(claim, "", "error", code="EngineError", message="secret")
    events = (await call).text
    assert "event: response.failed" in events.rstrip().rpartition("\n\n")[2]
    call_id = events.partition("id: ")[2].partition("/")[0]
    assert (await gateway.http.get(f"/v1/requests/{call_id}/events")).text == events


async def test_what_is_kept_for_its_stream_is_not_stored(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    body = {"model": MODEL, "input": "Hello", "store": False, "stream": True}
    call = asyncio.create_task(gateway.post("/v1/responses", body, **{"x-tidegate-event-ids": "1"}))
    await gateway.replica.answer("One")
    events = (await call).text
    call_id = events.partition("id: ")[2].partition("/")[0]
    assert (await gateway.http.get(f"/v1/requests/{call_id}/events")).text == events
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(call_id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model=MODEL, input="x", previous_response_id=call_id)


async def test_only_the_tenant_of_a_response_finds_it(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    answer = await answered(gateway, client)
    _, secret = await gateway.keys.create("other", tenant="rival")
    await await_until(lambda: gateway.services.keys.find(secret))
    rival = client_of(gateway, secret)
    for call in (
        rival.responses.retrieve(answer.id),
        rival.responses.cancel(answer.id),
        rival.responses.delete(answer.id),
        client.responses.retrieve("resp_nothing"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await call
        assert caught.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError) as refused:
        await rival.responses.create(model=MODEL, input="x", previous_response_id=answer.id)
    assert refused.value.code == "previous_response_not_found"
    assert (await client.responses.retrieve(answer.id)).id == answer.id


async def test_without_store_nothing_is_kept(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    answer = await answered(gateway, client, store=False)
    assert answer.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(answer.id)


async def test_one_that_need_not_be_stored_is_not_where_there_is_no_room(
    redis_url: str, key_prefix: str
) -> None:
    async with open_gateway(redis_url, key_prefix, total_kept_bytes=10) as gateway:
        client = client_of(gateway)
        answer = await answered(gateway, client)
        assert answer.to_dict()["store"] is False
        for asked in ({"store": True}, {"background": True}):
            with pytest.raises(openai.RateLimitError) as caught:
                await client.responses.create(model=MODEL, input="x", **asked)  # type: ignore[call-overload]
            assert caught.value.code == "too_much_kept"


async def test_half_of_the_room_is_for_what_has_to_be_stored(redis_url: str, key_prefix: str) -> None:
    async with open_gateway(redis_url, key_prefix, total_kept_bytes=16_000) as gateway:
        client = client_of(gateway)
        text = "x" * 9_000
        assert (await answered(gateway, client, input=text)).to_dict()["store"] is False
        assert (await answered(gateway, client, input=text, store=True)).to_dict()["store"] is True


async def test_a_client_that_leaves_a_response_in_the_foreground_cancels_it(
    gateway: Gateway, client: openai.AsyncOpenAI, other: openai.AsyncOpenAI
) -> None:
    opening = asyncio.create_task(client.responses.create(model=MODEL, input="Hello", stream=True))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "One")
    stream = await opening
    first = await anext(stream)
    assert first.type == "response.created"
    await stream.close()
    await await_until(lambda: claim.request.id in gateway.replica.cancelled)
    assert (await other.responses.retrieve(first.response.id)).status == "cancelled"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "foo"}}}},
            "text.format.schema",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"tools": [WEATHER | {"parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"stop": "x"}, "stop"),
    ],
)
async def test_what_is_not_honoured_is_refused_by_name(
    gateway: Gateway, body: dict[str, Any], param: str
) -> None:
    response = await gateway.post("/v1/responses", {"model": MODEL, "input": "x"} | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
