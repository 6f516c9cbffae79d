"""pydantic-ai's agents on `OpenAIChatModel` and `OpenAIResponsesModel`, as its documentation builds them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pydantic
import pytest
from pydantic_ai import Agent, NativeOutput, PromptedOutput, RunContext, ToolOutput
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, KEY, MODEL = (os.environ[f"CLIENTS_{name}"] for name in ("URL", "KEY", "MODEL"))
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
SENTENCE = "Anna is 31 years old and lives in Rome."
SETTINGS: Any = {"temperature": 0, "max_tokens": 96}


class Person(pydantic.BaseModel):
    """A person."""

    name: str
    age: int
    city: str


ANNA = Person(name="Anna", age=31, city="Rome")


class Weather(pydantic.BaseModel):
    """Get the weather of a city."""

    city: str


@dataclass
class Asked:
    cities: list[str]


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat", "responses"])
def model(request: pytest.FixtureRequest) -> Model:
    made: Model = request.param(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
    return made


def agent_with_tools(model: Model) -> Agent[Asked, str]:
    agent = Agent(model, deps_type=Asked, model_settings=SETTINGS)

    @agent.tool
    def get_weather(ctx: RunContext[Asked], city: str) -> str:
        """Get the weather of a city."""
        ctx.deps.cities.append(city)
        return "18 degrees, sunny"

    @agent.tool_plain
    def get_time(place: str) -> str:
        """Get the time of a place."""
        return "12:30"

    return agent


async def test_chat(model: Model) -> None:
    result = await Agent(model, model_settings=SETTINGS).run("Count from 1 to 10.")

    assert ANSWER in result.output
    assert result.usage.output_tokens > 10


async def test_chat_goes_on(model: Model) -> None:
    agent = Agent(model, model_settings=SETTINGS)
    first = await agent.run("Count from 1 to 10.")
    second = await agent.run("What is 347 + 285?", message_history=first.all_messages())

    assert "632" in second.output


async def test_streaming(model: Model) -> None:
    async with Agent(model, model_settings=SETTINGS).run_stream("Count from 1 to 10.") as result:
        parts = [part async for part in result.stream_text(delta=True, debounce_by=None)]

    assert len(parts) > 1
    assert ANSWER in "".join(parts)


async def test_tools(model: Model) -> None:
    asked = Asked([])
    result = await agent_with_tools(model).run("What is the weather in Paris?", deps=asked)

    assert asked.cities == ["Paris"]
    assert "18 degrees, sunny" in result.output
    assert (result.usage.requests, result.usage.tool_calls) == (2, 1)


async def test_tools_the_other_one(model: Model) -> None:
    result = await agent_with_tools(model).run("What is the time in Oslo?", deps=Asked([]))

    assert "12:30" in result.output


async def test_tools_streamed(model: Model) -> None:
    asked = Asked([])
    async with agent_with_tools(model).run_stream("What is the weather in Paris?", deps=asked) as result:
        text = "".join([part async for part in result.stream_text(delta=True)])

    assert asked.cities == ["Paris"]
    assert "18 degrees, sunny" in text


async def test_structured_output_by_a_tool(model: Model) -> None:
    agent = Agent(model, output_type=ToolOutput(Weather), model_settings=SETTINGS)
    result = await agent.run("What is the weather in Paris?")

    assert result.output == Weather(city="Paris")


@pytest.mark.parametrize("kind", [NativeOutput, PromptedOutput])
async def test_structured_output(model: Model, kind: Any) -> None:
    agent = Agent(model, output_type=kind(Person), model_settings=SETTINGS)
    result = await agent.run(SENTENCE)

    assert result.output == ANNA


async def test_structured_output_streamed(model: Model) -> None:
    agent = Agent(model, output_type=NativeOutput(Person), model_settings=SETTINGS)
    async with agent.run_stream(SENTENCE) as result:
        found = [output async for output in result.stream_output(debounce_by=None)]

    assert len(found) > 1
    assert found[-1] == ANNA
