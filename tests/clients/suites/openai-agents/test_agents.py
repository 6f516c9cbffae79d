"""openai-agents' loop on its chat completions and its Responses model, as its documentation builds agents."""

from __future__ import annotations

import os
from typing import Any

import pydantic
import pytest
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent

URL, KEY, MODEL = (os.environ[f"CLIENTS_{name}"] for name in ("URL", "KEY", "MODEL"))
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
PARIS = "What is the weather in Paris?"
SETTINGS = ModelSettings(temperature=0, max_tokens=96)
set_tracing_disabled(True)


class Person(pydantic.BaseModel):
    name: str
    age: int
    city: str


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chat", "responses"])
def model(request: pytest.FixtureRequest) -> Model:
    made: Model = request.param(MODEL, openai_client=AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY))
    return made


def agent(model: Model, asked: list[str] | None = None, **more: Any) -> Agent[None]:
    cities = asked if asked is not None else []

    @function_tool
    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        cities.append(city)
        return "18 degrees, sunny"

    @function_tool
    def get_time(place: str) -> str:
        """Get the time of a place."""
        return "12:30"

    tools = [] if asked is None else [get_weather, get_time]
    return Agent(
        name="Guide",
        instructions="You are helpful.",
        model=model,
        model_settings=SETTINGS,
        tools=tools,
        **more,
    )


async def test_chat(model: Model) -> None:
    result = await Runner.run(agent(model), "Count from 1 to 10.")

    assert ANSWER in result.final_output
    assert result.context_wrapper.usage.output_tokens > 10


async def test_chat_with_a_session(model: Model) -> None:
    session = SQLiteSession("one")
    await Runner.run(agent(model), "Count from 1 to 10.", session=session)
    result = await Runner.run(agent(model), "What is 347 + 285?", session=session)

    assert "632" in result.final_output
    assert len(await session.get_items()) == 4


async def test_streaming(model: Model) -> None:
    result = Runner.run_streamed(agent(model), "Count from 1 to 10.")
    deltas = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
    ]

    assert len(deltas) > 1
    assert ANSWER in "".join(deltas)
    assert "".join(deltas) == result.final_output


async def test_tools(model: Model) -> None:
    asked: list[str] = []
    result = await Runner.run(agent(model, asked), PARIS)

    assert asked == ["Paris"]
    assert "18 degrees, sunny" in result.final_output
    assert len(result.raw_responses) == 2


async def test_tools_the_other_one(model: Model) -> None:
    result = await Runner.run(agent(model, []), "What is the time in Oslo?")

    assert "12:30" in result.final_output


async def test_tools_streamed(model: Model) -> None:
    asked: list[str] = []
    result = Runner.run_streamed(agent(model, asked), PARIS)
    kinds = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]

    assert kinds == ["tool_called", "tool_output", "message_output_created"]
    assert asked == ["Paris"]
    assert "18 degrees, sunny" in result.final_output


async def test_structured_output(model: Model) -> None:
    result = await Runner.run(agent(model, output_type=Person), "Anna is 31 years old and lives in Rome.")

    assert result.final_output == Person(name="Anna", age=31, city="Rome")
