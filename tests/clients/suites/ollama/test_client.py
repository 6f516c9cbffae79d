"""ollama's client as its README and examples use it."""

from __future__ import annotations

import json
import os
from typing import Any

import ollama
import pydantic
import pytest
from ollama import AsyncClient, Client

URL, MODEL, EMBED = (os.environ[f"CLIENTS_{name}"] for name in ("URL", "MODEL", "EMBED_MODEL"))
HEADERS = {"Authorization": f"Bearer {os.environ['CLIENTS_KEY']}"}
COUNT = [{"role": "user", "content": "Count from 1 to 10."}]
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
GREEDY = {"temperature": 0}
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]
SENTENCE = "Anna is 31 years old and lives in Rome."


def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The name of the city
    """
    return f"18 degrees in {city}, sunny"


class Person(pydantic.BaseModel):
    name: str
    age: int
    city: str


ANNA = Person(name="Anna", age=31, city="Rome")


@pytest.fixture
def client() -> Client:
    return Client(host=URL, headers=HEADERS, timeout=60)


def test_models_list(client: Client) -> None:
    found = {model.model: model for model in client.list().models}

    assert f"{MODEL}:latest" in found or MODEL in found
    model = found.get(f"{MODEL}:latest") or found[MODEL]
    assert model.size > 1_000_000
    assert model.details.family


def test_models_show(client: Client) -> None:
    told = client.show(MODEL)

    assert {"completion", "tools"} <= set(told.capabilities)
    assert told.modelinfo[f"{told.modelinfo['general.architecture']}.context_length"] == 1024


def test_models_show_of_an_embedder(client: Client) -> None:
    assert client.show(EMBED).capabilities == ["embedding"]


def test_models_running(client: Client) -> None:
    assert any(model.model in (MODEL, f"{MODEL}:latest") for model in client.ps().models)


def test_chat(client: Client) -> None:
    answer = client.chat(model=MODEL, messages=COUNT, options=GREEDY)

    assert answer.message.role == "assistant"
    assert ANSWER in answer.message.content
    assert answer["message"]["content"] == answer.message.content
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.eval_count > 10
    assert answer.prompt_eval_count > 5
    assert answer.total_duration > 0


async def test_chat_async() -> None:
    answer = await AsyncClient(host=URL, headers=HEADERS).chat(MODEL, messages=COUNT, options=GREEDY)

    assert ANSWER in answer.message.content


def test_chat_stream(client: Client) -> None:
    parts = list(client.chat(model=MODEL, messages=COUNT, options=GREEDY, stream=True))

    assert len(parts) > 1
    assert ANSWER in "".join(part.message.content for part in parts)
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].done_reason == "stop"


async def test_chat_stream_async() -> None:
    text = ""
    stream = await AsyncClient(host=URL, headers=HEADERS).chat(
        MODEL, messages=COUNT, options=GREEDY, stream=True
    )
    async for part in stream:
        text += part.message.content

    assert ANSWER in text


def test_chat_length(client: Client) -> None:
    answer = client.chat(model=MODEL, messages=COUNT, options={**GREEDY, "num_predict": 3})

    assert answer.done_reason == "length"
    assert answer.eval_count == 3


def test_generate(client: Client) -> None:
    answer = client.generate(model=MODEL, prompt="Count from 1 to 10.", options=GREEDY)

    assert ANSWER in answer.response
    assert answer.done_reason == "stop"


def test_generate_raw(client: Client) -> None:
    prompt = "<|im_start|>user\nCount from 1 to 10.<|im_end|>\n<|im_start|>assistant\n1, 2,"
    answer = client.generate(model=MODEL, prompt=prompt, raw=True, options={**GREEDY, "stop": [" 5"]})

    assert answer.response == " 3, 4,"


def test_generate_stream(client: Client) -> None:
    parts = list(client.generate(model=MODEL, prompt="Count from 1 to 10.", options=GREEDY, stream=True))

    assert ANSWER in "".join(part.response for part in parts)
    assert parts[-1].done


def test_tools(client: Client) -> None:
    messages: list[Any] = list(PARIS)
    answer = client.chat(model=MODEL, messages=messages, tools=[get_weather], options=GREEDY)

    (call,) = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})

    result = get_weather(**call.function.arguments)
    messages += [answer.message, {"role": "tool", "content": result, "tool_name": call.function.name}]
    answer = client.chat(model=MODEL, messages=messages, tools=[get_weather], options=GREEDY)
    assert "18 degrees" in answer.message.content


def test_tools_stream(client: Client) -> None:
    parts = client.chat(model=MODEL, messages=PARIS, tools=[get_weather], options=GREEDY, stream=True)
    calls = [call for part in parts for call in part.message.tool_calls or ()]

    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("get_weather", {"city": "Paris"})
    ]


def test_format_schema(client: Client) -> None:
    answer = client.chat(
        model=MODEL,
        messages=[{"role": "user", "content": SENTENCE}],
        format=Person.model_json_schema(),
        options=GREEDY,
    )

    assert Person.model_validate_json(answer.message.content) == ANNA


def test_format_json(client: Client) -> None:
    prompt = 'Make a JSON object with name "tide" and age 3.'
    answer = client.generate(model=MODEL, prompt=prompt, format="json", options=GREEDY)

    assert json.loads(answer.response) == {"name": "tide", "age": 3}


def test_embed(client: Client) -> None:
    texts = ["The sky is blue", "The heavens are azure", "Invoices are due in May"]
    answer = client.embed(model=EMBED, input=texts)

    sky, heavens, invoices = answer.embeddings
    assert len(sky) == 384
    assert dot(sky, sky) == pytest.approx(1, abs=1e-3)
    assert dot(sky, heavens) > dot(sky, invoices) + 0.2
    assert answer.prompt_eval_count > 10


def test_embed_dimensions(client: Client) -> None:
    (vector,) = client.embed(model=EMBED, input="The sky is blue", dimensions=64).embeddings

    assert len(vector) == 64
    assert dot(vector, vector) == pytest.approx(1, abs=1e-3)


def dot(a: Any, b: Any) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_errors(client: Client) -> None:
    with pytest.raises(ollama.ResponseError, match="no-such") as refused:
        client.chat(model="no-such", messages=COUNT)
    assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as refused:
        Client(host=URL).chat(model=MODEL, messages=COUNT)
    assert refused.value.status_code == 401
