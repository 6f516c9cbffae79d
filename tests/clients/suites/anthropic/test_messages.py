"""anthropic's client as its README uses it: messages, streams, tools, structured answers, counted tokens."""

from __future__ import annotations

import os
from typing import Any

import anthropic
import pydantic
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_tool

URL, KEY, MODEL = (os.environ[f"CLIENTS_{name}"] for name in ("URL", "KEY", "MODEL"))
COUNT: list[Any] = [{"role": "user", "content": "Count from 1 to 10."}]
GREEDY = {"temperature": 0}  # the client itself has no such argument any more
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PARIS: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
SENTENCE = "Anna is 31 years old and lives in Rome."


class Person(pydantic.BaseModel):
    name: str
    age: int
    city: str


ANNA = Person(name="Anna", age=31, city="Rome")


@pytest.fixture
def client() -> Anthropic:
    return Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=60)


def test_models_list(client: Anthropic) -> None:
    assert MODEL in [model.id for model in client.models.list()]


def test_models_retrieve(client: Anthropic) -> None:
    model = client.models.retrieve(MODEL)

    assert model.id == MODEL


def test_chat(client: Anthropic) -> None:
    message = client.messages.create(model=MODEL, max_tokens=64, extra_body=GREEDY, messages=COUNT)

    assert message.type == "message"
    assert message.role == "assistant"
    assert message.model == MODEL
    (block,) = message.content
    assert block.type == "text"
    assert ANSWER in block.text
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 5
    assert message.usage.output_tokens > 10


def test_chat_with_a_system_prompt_and_turns(client: Anthropic) -> None:
    turns = [*COUNT, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
    turns += [{"role": "user", "content": [{"type": "text", "text": "What is 347 + 285?"}]}]
    message = client.messages.create(
        model=MODEL, max_tokens=128, extra_body=GREEDY, system="You are helpful.", messages=turns
    )

    assert "632" in message.content[0].text


def test_chat_stops_at_a_sequence(client: Anthropic) -> None:
    message = client.messages.create(
        model=MODEL, max_tokens=64, extra_body=GREEDY, messages=COUNT, stop_sequences=[", 4"]
    )

    assert message.content[0].text == "1, 2, 3"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ", 4")


def test_chat_stops_at_its_length(client: Anthropic) -> None:
    message = client.messages.create(model=MODEL, max_tokens=3, extra_body=GREEDY, messages=COUNT)

    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 3


async def test_chat_async() -> None:
    async with AsyncAnthropic(base_url=URL, api_key=KEY) as client:
        message = await client.messages.create(model=MODEL, max_tokens=64, extra_body=GREEDY, messages=COUNT)

    assert ANSWER in message.content[0].text


def test_streaming_events(client: Anthropic) -> None:
    events = list(
        client.messages.create(model=MODEL, max_tokens=64, extra_body=GREEDY, messages=COUNT, stream=True)
    )

    kinds = [event.type for event in events if event.type != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert ANSWER in "".join(event.delta.text for event in events if event.type == "content_block_delta")


def test_streaming_helper(client: Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=64, extra_body=GREEDY, messages=COUNT) as stream:
        parts = list(stream.text_stream)
        message = stream.get_final_message()

    assert len(parts) > 1
    assert "".join(parts) == message.content[0].text
    assert ANSWER in message.content[0].text
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 10


async def test_streaming_async() -> None:
    async with (
        AsyncAnthropic(base_url=URL, api_key=KEY) as client,
        client.messages.stream(model=MODEL, max_tokens=64, extra_body=GREEDY, messages=COUNT) as stream,
    ):
        text = "".join([part async for part in stream.text_stream])

    assert ANSWER in text


def test_tools(client: Anthropic) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 64, "extra_body": GREEDY, "tools": [WEATHER]}
    message = client.messages.create(**asked, messages=PARIS)

    assert message.stop_reason == "tool_use"
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("get_weather", {"city": "Paris"})

    result = {"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees, sunny"}
    turns = [*PARIS, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    message = client.messages.create(**asked, messages=turns)
    assert message.stop_reason == "end_turn"
    assert "18 degrees, sunny" in message.content[0].text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_tools_chosen(client: Anthropic, choice: Any) -> None:
    message = client.messages.create(
        model=MODEL, max_tokens=64, extra_body=GREEDY, messages=PARIS, tools=[WEATHER], tool_choice=choice
    )

    assert [block.name for block in message.content if block.type == "tool_use"] == ["get_weather"]


def test_tools_streamed(client: Anthropic) -> None:
    with client.messages.stream(
        model=MODEL, max_tokens=64, extra_body=GREEDY, messages=PARIS, tools=[WEATHER]
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()

    assert "Paris" in "".join(pieces)
    assert message.stop_reason == "tool_use"
    assert message.content[-1].input == {"city": "Paris"}


def test_tools_runner(client: Anthropic) -> None:
    asked = []

    @beta_tool
    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        asked.append(city)
        return "18 degrees, sunny"

    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=64, extra_body=GREEDY, tools=[get_weather], messages=PARIS
    )
    last = runner.until_done()

    assert asked == ["Paris"]
    assert "18 degrees, sunny" in last.content[0].text


def test_structured_output(client: Anthropic) -> None:
    message = client.messages.parse(
        model=MODEL,
        max_tokens=64,
        extra_body=GREEDY,
        messages=[{"role": "user", "content": SENTENCE}],
        output_format=Person,
    )

    assert message.parsed_output == ANNA


def test_count_tokens(client: Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=PARIS, tools=[WEATHER])
    message = client.messages.create(
        model=MODEL, max_tokens=1, extra_body=GREEDY, messages=PARIS, tools=[WEATHER]
    )

    assert counted.input_tokens == message.usage.input_tokens


def test_errors(client: Anthropic) -> None:
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model=MODEL, max_tokens=1, messages=COUNT)
    with pytest.raises(anthropic.NotFoundError, match="no-such"):
        client.messages.create(model="no-such", max_tokens=1, messages=COUNT)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model=MODEL, max_tokens=-1, messages=COUNT)
