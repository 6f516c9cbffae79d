"""The official client and a real model that calls tools, over HTTP; the model's weights are random."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessage

from tests.checkpoints import with_tools
from tests.in_thread import in_thread
from tests.integration.gateway.rig import MODEL, REVISION, open_gateway
from tests.integration.serving.rig import open_replica
from tests.redis_server import RedisServer

QUESTION: Any = [{"role": "user", "content": "Weather?"}]
FUNCTION: Any = {
    "name": "weather",
    "description": "Of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Köln", "Ulm"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city"],
    },
}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@asynccontextmanager
async def serving(redis_url: str, checkpoint: Path) -> AsyncIterator[tuple[str, str]]:
    key_prefix = "tools-" + secrets.token_hex(4)
    engine = {
        "name": "transformers",
        "path": str(checkpoint),
        "precision": "float32",
        "max_slots": 4,
        "args": {"threads": 1},
    }
    async with (
        open_gateway(redis_url, key_prefix) as gateway,
        open_replica(
            redis_url, key_prefix, model=MODEL, revision=REVISION, engine=engine, lease_seconds=60.0
        ),
    ):
        yield gateway.address, gateway.key


@pytest.fixture(scope="module")
def client(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    checkpoint = with_tools(tmp_path_factory.mktemp("checkpoint") / "tools")
    with in_thread(serving(redis_server.url, checkpoint)) as (address, key):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def is_right(arguments: str) -> bool:
    found = json.loads(arguments)
    return found.keys() <= {"city", "days"} and found["city"] in ("Köln", "Ulm")


def test_an_agent_calls_a_tool_and_answers_with_its_result(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice=NAMED, n=2, seed=3, max_tokens=200
    )
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        [call] = choice.message.tool_calls or []
        assert call.type == "function" and call.function.name == "weather"
        assert is_right(call.function.arguments)
    assert answer.usage is not None and answer.usage.completion_tokens > 20

    message = answer.choices[0].message
    [call] = message.tool_calls or []
    history: Any = [
        *QUESTION,
        message.model_dump(exclude_unset=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
    ]
    second = client.chat.completions.create(
        model=MODEL, messages=history, tools=TOOLS, max_tokens=8, seed=3, logprobs=True
    )
    assert second.usage is not None and second.usage.prompt_tokens > answer.usage.prompt_tokens
    assert second.choices[0].message.content
    assert second.choices[0].logprobs is not None
    assert len(second.choices[0].logprobs.content or []) == second.usage.completion_tokens


def test_a_streamed_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=QUESTION,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        seed=5,
        max_tokens=200,
        stream_options={"include_usage": True},
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) > 3
    [choice] = final.choices
    [call] = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert is_right(call.function.arguments)
    assert final.usage is not None

    plain = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        seed=5,
        max_tokens=200,
    )
    [same] = plain.choices[0].message.tool_calls or []
    assert same.type == "function"
    assert same.function.arguments == call.function.arguments


def test_functions_are_called_in_their_own_shape(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        functions=[FUNCTION],
        function_call={"name": "weather"},
        max_tokens=200,
    )
    [choice] = answer.choices
    assert choice.finish_reason == "function_call"
    message: ChatCompletionMessage = choice.message
    assert message.function_call is not None and is_right(message.function_call.arguments)
    history: Any = [
        *QUESTION,
        message.model_dump(exclude_unset=True),
        {"role": "function", "name": "weather", "content": "Sunny."},
    ]
    again = client.chat.completions.create(model=MODEL, messages=history, max_tokens=4)
    assert again.choices[0].message.content


def test_a_strict_schema_that_cannot_be_enforced_is_refused_by_name(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"not": {"const": "Ulm"}}}}
    strict: Any = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[*TOOLS, strict])
    assert refused.value.param == "tools[1].function.parameters"
    assert "not" in refused.value.message
    shown_none = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[strict], tool_choice="none", max_tokens=4
    )
    assert shown_none.choices[0].message.content
