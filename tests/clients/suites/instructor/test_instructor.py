"""instructor as its documentation uses it: a model's answer as a pydantic object, by tools and by JSON."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import instructor
import openai
import pydantic
import pytest

URL, KEY, MODEL = (os.environ[f"CLIENTS_{name}"] for name in ("URL", "KEY", "MODEL"))
SENTENCE: list[Any] = [{"role": "user", "content": "Anna is 31 years old and lives in Rome."}]
PARIS: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
ANNA = {"name": "Anna", "age": 31, "city": "Rome"}
ASKED: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 96, "max_retries": 0}


class Weather(pydantic.BaseModel):
    """Get the weather of a city."""

    city: str


class Person(pydantic.BaseModel):
    """A person."""

    name: str
    age: int
    city: str


# What the demo model can: a call to what the question is about, and data out of a sentence.
ASKED_BY_MODE: dict[str, tuple[type[pydantic.BaseModel], list[Any], dict[str, Any]]] = {
    "TOOLS": (Weather, PARIS, {"city": "Paris"}),
    "TOOLS_STRICT": (Weather, PARIS, {"city": "Paris"}),
    "JSON": (Person, SENTENCE, ANNA),
    "JSON_SCHEMA": (Person, SENTENCE, ANNA),
}


def client(mode: str) -> instructor.Instructor:
    made = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
    return instructor.from_openai(made, mode=instructor.Mode[mode])


@pytest.mark.parametrize("mode", ASKED_BY_MODE)
def test_create(mode: str) -> None:
    kind, messages, answer = ASKED_BY_MODE[mode]
    found = client(mode).create(response_model=kind, messages=messages, **ASKED)

    assert isinstance(found, kind)
    assert found.model_dump() == answer


@pytest.mark.parametrize("mode", ASKED_BY_MODE)
def test_create_with_completion(mode: str) -> None:
    kind, messages, answer = ASKED_BY_MODE[mode]
    found, completion = client(mode).create_with_completion(response_model=kind, messages=messages, **ASKED)

    assert found.model_dump() == answer
    assert completion.usage.completion_tokens > 3


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_streaming_partial(mode: str) -> None:
    kind, messages, answer = ASKED_BY_MODE[mode]
    parts = list(client(mode).create_partial(response_model=kind, messages=messages, **ASKED))

    assert len(parts) > 1
    assert parts[-1].model_dump() == answer


@pytest.mark.parametrize("mode", ASKED_BY_MODE)
async def test_create_async(mode: str) -> None:
    kind, messages, answer = ASKED_BY_MODE[mode]
    made = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY)
    patched = instructor.from_openai(made, mode=instructor.Mode[mode])
    found = await patched.create(response_model=kind, messages=messages, **ASKED)

    assert found.model_dump() == answer


def test_tools_in_parallel() -> None:
    class get_weather(pydantic.BaseModel):  # noqa: N801 - the class is the tool
        """Get the weather of a city."""

        city: str

    class get_time(pydantic.BaseModel):  # noqa: N801
        """Get the time of a place."""

        place: str

    calls = client("PARALLEL_TOOLS").create(
        response_model=Iterable[get_weather | get_time], messages=PARIS, **ASKED
    )

    (call,) = calls
    assert isinstance(call, get_weather)
    assert call.city == "Paris"


def test_create_asks_again_what_does_not_validate() -> None:
    tries = []

    class Checked(Weather):
        """Get the weather of a city."""

        @pydantic.field_validator("city")
        @classmethod
        def _is_refused_once(cls, city: str) -> str:
            tries.append(city)
            if len(tries) == 1:
                raise ValueError("say it again")
            return city

    found = client("TOOLS").create(response_model=Checked, messages=PARIS, **{**ASKED, "max_retries": 1})

    assert len(tries) == 2
    assert found.city


def test_create_from_provider() -> None:
    made = instructor.from_provider(f"openai/{MODEL}", base_url=f"{URL}/v1", api_key=KEY)

    assert made.create(response_model=Weather, messages=PARIS, temperature=0, max_tokens=64).city == "Paris"
