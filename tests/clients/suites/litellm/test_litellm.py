"""LiteLLM's client, as its documentation points it at OpenAI's, Anthropic's and Ollama's protocols."""

from __future__ import annotations

import json
import os
from typing import Any

import litellm
import pydantic
import pytest

URL, KEY, MODEL, EMBED = (os.environ[f"CLIENTS_{name}"] for name in ("URL", "KEY", "MODEL", "EMBED_MODEL"))
COUNT = [{"role": "user", "content": "Count from 1 to 10."}]
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
PARIS: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
OPENAI = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY}
DOORS = {
    "openai": OPENAI,
    "hosted_vllm": OPENAI | {"model": f"hosted_vllm/{MODEL}"},
    "anthropic": {"model": f"anthropic/{MODEL}", "api_base": URL, "api_key": KEY},
    "ollama_chat": {"model": f"ollama_chat/{MODEL}", "api_base": URL, "api_key": KEY},
}
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 128, "num_retries": 0}


class Person(pydantic.BaseModel):
    name: str
    age: int
    city: str


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> dict[str, str]:
    return DOORS[request.param]


def test_chat(door: dict[str, str]) -> None:
    answer = litellm.completion(messages=COUNT, **door, **ASKED)

    assert ANSWER in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 10


async def test_chat_async(door: dict[str, str]) -> None:
    answer = await litellm.acompletion(messages=COUNT, **door, **ASKED)

    assert ANSWER in answer.choices[0].message.content


def test_stream(door: dict[str, str]) -> None:
    chunks = list(litellm.completion(messages=COUNT, stream=True, **door, **ASKED))

    assert len(chunks) > 1
    assert ANSWER in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_tools(door: dict[str, str]) -> None:
    messages = list(PARIS)
    answer = litellm.completion(messages=messages, tools=[WEATHER], **door, **ASKED)

    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}

    result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "18 degrees, sunny"}
    answer = litellm.completion(
        messages=[*messages, answer.choices[0].message, result], tools=[WEATHER], **door, **ASKED
    )
    assert "18 degrees, sunny" in answer.choices[0].message.content


def test_tools_streamed(door: dict[str, str]) -> None:
    chunks = list(litellm.completion(messages=PARIS, tools=[WEATHER], stream=True, **door, **ASKED))
    built = litellm.stream_chunk_builder(chunks, messages=PARIS)

    (call,) = built.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})


def test_structured_output(door: dict[str, str]) -> None:
    answer = litellm.completion(
        messages=[{"role": "user", "content": "Anna is 31 years old and lives in Rome."}],
        response_format=Person,
        **door,
        **ASKED,
    )

    found = Person.model_validate_json(answer.choices[0].message.content)
    assert found == Person(name="Anna", age=31, city="Rome")


def test_text_completion() -> None:
    prompt = "<|im_start|>user\nCount from 1 to 10.<|im_end|>\n<|im_start|>assistant\n"
    asked = OPENAI | {"model": f"text-completion-openai/{MODEL}"}
    answer = litellm.text_completion(prompt=prompt, **asked, **ASKED)

    assert ANSWER in answer.choices[0].text


def test_responses() -> None:
    answer = litellm.responses(input="Count from 1 to 10.", temperature=0, max_output_tokens=64, **OPENAI)

    assert ANSWER in answer.output[0].content[0].text


def test_embedding() -> None:
    asked = OPENAI | {"model": f"openai/{EMBED}"}
    answer = litellm.embedding(input=["The sky is blue", "The heavens are azure"], **asked)

    sky, heavens = (entry["embedding"] for entry in answer.data)
    assert len(sky) == 384
    assert sum(x * y for x, y in zip(sky, heavens, strict=True)) > 0.4


def test_errors() -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=COUNT, **{**OPENAI, "api_key": "wrong"}, **ASKED)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=COUNT, **{**OPENAI, "model": "openai/no-such"}, **ASKED)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 2000}], **OPENAI, **ASKED)
