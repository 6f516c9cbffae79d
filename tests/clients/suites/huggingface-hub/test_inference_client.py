"""`InferenceClient` as huggingface_hub's guide uses it, on the address of one model."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient, TextGenerationStreamOutputToken
from huggingface_hub.errors import ValidationError

PROMPT = "<|im_start|>user\nCount from 1 to 10.<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = [{"role": "user", "content": "Count from 1 to 10."}]
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
ROOT, KEY, MODEL = (os.environ[f"CLIENTS_{name}"] for name in ("URL", "KEY", "MODEL"))
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
ANNA = {"name": "Anna", "age": 31, "city": "Rome"}
SENTENCE = "Anna is 31 years old and lives in Rome."


@pytest.fixture
def client() -> InferenceClient:
    return InferenceClient(model=f"{ROOT}/models/{MODEL}", token=KEY, timeout=60)


@pytest.fixture
def openai_client() -> InferenceClient:
    return InferenceClient(base_url=f"{ROOT}/v1", api_key=KEY, timeout=60)


def test_chat(client: InferenceClient) -> None:
    answer = client.chat_completion(MESSAGES, max_tokens=64, temperature=0)

    assert answer.choices[0].message.role == "assistant"
    assert ANSWER in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_in_openais_form(openai_client: InferenceClient) -> None:
    answer = openai_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=64, temperature=0, logprobs=True, top_logprobs=2
    )

    assert answer.model == MODEL
    assert ANSWER in answer.choices[0].message.content
    told = answer.choices[0].logprobs.content
    assert len(told) >= answer.usage.completion_tokens - 1
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in told)


def test_chat_stream(client: InferenceClient) -> None:
    text = ""
    reasons = []
    for chunk in client.chat_completion(MESSAGES, max_tokens=64, temperature=0, stream=True):
        text += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)

    assert ANSWER in text
    assert reasons[-1] == "stop"
    assert not any(reasons[:-1])


async def test_chat_stream_async() -> None:
    async with AsyncInferenceClient(model=f"{ROOT}/models/{MODEL}", token=KEY, timeout=60) as client:
        stream = await client.chat_completion(MESSAGES, max_tokens=64, temperature=0, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert len(parts) > 1
    assert ANSWER in "".join(parts)


def test_chat_tools(client: InferenceClient) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat_completion(messages, max_tokens=64, temperature=0, tools=[WEATHER])

    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}

    messages += [
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"},
    ]
    answer = client.chat_completion(messages, max_tokens=64, temperature=0, tools=[WEATHER])
    assert "18 degrees, sunny" in answer.choices[0].message.content


def test_chat_tools_stream(client: InferenceClient) -> None:
    calls = []
    for chunk in client.chat_completion(
        [{"role": "user", "content": "What is the weather in Paris?"}],
        max_tokens=64,
        temperature=0,
        tools=[WEATHER],
        tool_choice="required",
        stream=True,
    ):
        calls += chunk.choices[0].delta.tool_calls or []

    assert [call.function.name for call in calls if call.function.name] == ["get_weather"]
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "Paris"}


def test_chat_response_format(client: InferenceClient) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = client.chat_completion(
        [{"role": "user", "content": SENTENCE}], max_tokens=64, temperature=0, response_format=form
    )

    assert json.loads(answer.choices[0].message.content) == ANNA


def test_text_generation(client: InferenceClient) -> None:
    assert ANSWER in client.text_generation(PROMPT, max_new_tokens=64)


def test_text_generation_details(client: InferenceClient) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=64, details=True, decoder_input_details=True, top_n_tokens=2
    )

    assert ANSWER in answer.generated_text
    assert answer.details.finish_reason == "eos_token"
    assert answer.details.generated_tokens == len(answer.details.tokens) == len(answer.details.top_tokens)
    assert "".join(t.text for t in answer.details.tokens if not t.special) == answer.generated_text
    assert len(answer.details.prefill) > 5


def test_text_generation_stop(client: InferenceClient) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=64, details=True, stop=[" 4"], return_full_text=True
    )

    assert answer.generated_text.startswith(PROMPT)
    assert answer.generated_text.endswith("3, 4")
    assert answer.details.finish_reason == "stop_sequence"


def test_text_generation_stream(client: InferenceClient) -> None:
    parts = list(client.text_generation(PROMPT, max_new_tokens=64, stream=True))

    assert len(parts) > 1
    assert all(isinstance(part, str) for part in parts)
    assert ANSWER in "".join(parts)


def test_text_generation_stream_details(client: InferenceClient) -> None:
    parts = list(client.text_generation(PROMPT, max_new_tokens=64, stream=True, details=True))

    assert all(isinstance(part.token, TextGenerationStreamOutputToken) for part in parts)
    assert ANSWER in parts[-1].generated_text
    assert parts[-1].details.finish_reason == "eos_token"
    assert parts[-1].details.generated_tokens == len(parts)


def test_text_generation_schema(client: InferenceClient) -> None:
    prompt = f"<|im_start|>user\n{SENTENCE}<|im_end|>\n<|im_start|>assistant\n"
    text = client.text_generation(prompt, max_new_tokens=64, grammar={"type": "json", "value": PERSON})

    assert json.loads(text) == ANNA


def test_text_generation_error(client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="max_new_tokens"):
        client.text_generation(PROMPT, max_new_tokens=-1)


def test_feature_extraction() -> None:
    client = InferenceClient(model=f"{ROOT}/models/minilm", token=KEY, timeout=60)
    found = client.feature_extraction("Hi, who are you?")

    assert found.shape[-1] == 384
    assert np.isclose(np.linalg.norm(found), 1, atol=1e-3)


def test_endpoint_info() -> None:
    client = InferenceClient(model=f"{ROOT}/models/{MODEL}", token=KEY, provider="hf-inference")
    told = client.get_endpoint_info()

    assert told["model_id"] == MODEL
    assert told["max_total_tokens"] == 1024
