"""The short form of `make test-clients`: the official client, the gateway and the demo model in one piece."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.integration.gateway.rig import open_gateway
from tests.integration.serving.rig import MODEL, REVISION, ReplicaChild
from tidegate.demo import model_path

pytestmark = pytest.mark.serial

ANSWER_SECONDS = 120.0  # the first one waits for the model
TOOL = "get_weather"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Lisbon", "Porto"]}},
    "required": ["city"],
    "additionalProperties": False,
}
ASKED: list[Any] = [{"role": "user", "content": "How is the weather in Lisbon?"}]


class Order(BaseModel):
    item: Literal["boat", "net"]
    count: int


async def test_the_official_client_gets_each_kind_of_answer_from_the_demo_model(
    redis_url: str, key_prefix: str
) -> None:
    engine = {"name": "transformers", "path": str(model_path("tide-demo")), "max_slots": 4}
    engine |= {"args": {"threads": 1}}
    replica = ReplicaChild(redis_url, key_prefix, engine=engine)
    try:
        async with open_gateway(redis_url, key_prefix) as gateway:
            await gateway.put_model(name=MODEL, revisions={REVISION: 100})
            async with openai.AsyncOpenAI(
                base_url=f"{gateway.address}/v1", api_key=gateway.key, max_retries=0, timeout=ANSWER_SECONDS
            ) as client:
                await same_text_streamed_or_not(client)
                await a_tool_is_called_and_answered(client)
                await a_class_is_filled(client)
                await responses_do_the_same(client)
    finally:
        replica.close()


async def same_text_streamed_or_not(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 16}
    answer = await client.chat.completions.create(**asked)
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16
    stream = await client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == answer.choices[0].message.content != ""
    usage = chunks[-1].usage
    assert usage is not None
    # The second of two may find the prompt held.
    assert usage.model_copy(update={"prompt_tokens_details": None}) == answer.usage.model_copy(
        update={"prompt_tokens_details": None}
    )
    completion = await client.completions.create(model=MODEL, prompt="The tide", max_tokens=4, temperature=0)
    assert completion.choices[0].text
    assert MODEL in [model.id async for model in client.models.list()]


async def a_tool_is_called_and_answered(client: openai.AsyncOpenAI) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": TOOL, "parameters": PARAMETERS}}]
    asked: dict[str, Any] = {"model": MODEL, "tools": tools, "temperature": 0, "max_tokens": 64}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False}
    async with client.chat.completions.stream(**asked, messages=ASKED) as stream:
        choice = (await stream.get_final_completion()).choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    assert call.function.name == TOOL
    assert json.loads(call.function.arguments)["city"] in PARAMETERS["properties"]["city"]["enum"]  # type: ignore[index]
    history = [
        *ASKED,
        {"role": "assistant", "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})]},
        {"role": "tool", "tool_call_id": call.id, "content": "It rains."},
    ]
    last = await client.chat.completions.create(**(asked | {"tool_choice": "none"}), messages=history)
    assert last.choices[0].message.content


async def a_class_is_filled(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Order two boats."}],
        response_format=Order,
        temperature=0,
        max_tokens=64,
    )
    assert isinstance(answer.choices[0].message.parsed, Order)


async def responses_do_the_same(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": ASKED, "temperature": 0, "max_output_tokens": 64}
    parsed = await client.responses.parse(**asked, text_format=Order)
    assert isinstance(parsed.output_parsed, Order)
    tools: list[Any] = [{"type": "function", "name": TOOL, "parameters": PARAMETERS, "strict": True}]
    async with client.responses.stream(**asked, tools=tools, tool_choice="required") as stream:
        events = [event.type async for event in stream]
        answer = await stream.get_final_response()
    assert events[0] == "response.created"
    assert events[-1] in ("response.completed", "response.incomplete")
    assert answer.output[0].type == "function_call"
    assert answer.output[0].name == TOOL
