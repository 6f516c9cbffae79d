"""Answers whose form the client prescribes: what reaches the replica, and what is refused before."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from llguidance import LLMatcher

from tests.engine_requests import sampling_of
from tests.integration.gateway.rig import CHAT, MODEL, Gateway

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
COMPLETION = {"model": MODEL, "prompt": "Hello"}


def of_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **more}}
    }


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ({"response_format": {"type": "json_object"}}, '{"type":"object"'),
        (of_schema(PERSON, strict=True), '"age"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, '{"type":"object"'),
        ({"structured_outputs": {"json": PERSON}}, '"age"'),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, '"null"'),
        ({"structured_outputs": {"regex": "[ab]+"}}, "[ab]+"),
        ({"structured_outputs": {"choice": ["yes", 'say "no"']}}, 'say \\"no\\"'),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b" root'}}, '"b"'),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}}, '{"type":"object"'),
        ({"guided_json": PERSON, "guided_decoding_backend": "xgrammar"}, '"age"'),
        ({"guided_regex": "[ab]+"}, "[ab]+"),
        ({"guided_choice": ["yes", "no"]}, '"yes" | "no"'),
        ({"guided_grammar": 'start: "a"'}, '"a"'),
    ],
)
async def test_each_way_to_say_a_form_reaches_the_replica(
    gateway: Gateway, form: dict[str, Any], part: str
) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        call = asyncio.create_task(gateway.post(path, body | form))
        [claim] = await gateway.replica.answer("x")
        answer = await call
        grammar = sampling_of(claim.request).grammar
        assert answer.status_code == 200
        assert "x-tidegate-warning" not in answer.headers
        assert part in grammar.replace('": ', '":')
        assert LLMatcher.validate_grammar(grammar) == ""


@pytest.mark.parametrize(
    ("form", "param", "words"),
    [
        (
            of_schema({"properties": {"a": {"items": {"uniqueItems": True}}}}),
            "response_format.json_schema.schema",
            "/properties/a/items/uniqueItems",
        ),
        (
            of_schema({"$ref": "#/$defs/A", "$defs": {"A": {"not": {}}}}),
            "response_format.json_schema.schema",
            "/$defs/A/not",
        ),
        (
            of_schema({"properties": {"a/b": {"type": "foo"}}}),
            "response_format.json_schema.schema",
            "/properties/a~1b/type",
        ),
        (
            of_schema({"anyOf": [{}, {"colour": 1}]}, strict=True),
            "response_format.json_schema.schema",
            "/anyOf/1: the keyword 'colour'",
        ),
        (of_schema({"$ref": "https://example.com/a"}), "response_format.json_schema.schema", "example.com"),
        (of_schema(False), "response_format.json_schema.schema", "no value is valid"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "name and a schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look"),
        ({"guided_regex": "("}, "guided_regex", "regex"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar", "nowhere"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": {"enum": ["x" * 200_000]}}, "guided_json", "at most 131072"),
        ({"guided_choice": []}, "guided_choice", "length"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex"),
        (
            {"structured_outputs": {"regex": "a", "json_object": True}},
            "structured_outputs.json_object",
            "structured_outputs.regex",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "send one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "grammar"),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
            "response_format",
        ),
    ],
)
async def test_what_cannot_be_followed_is_refused_before_it_waits(
    gateway: Gateway, form: dict[str, Any], param: str, words: str
) -> None:
    answer = await gateway.post("/v1/chat/completions", CHAT | form)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


async def test_keywords_that_have_no_effect_are_named_in_a_header(gateway: Gateway) -> None:
    form = of_schema({"type": "object", "colour": 1, "properties": {"a": {"nullable": True}}})
    for is_streamed in (False, True):
        call = asyncio.create_task(
            gateway.post("/v1/chat/completions", CHAT | form | {"stream": is_streamed})
        )
        await gateway.replica.answer("x")
        warning = (await call).headers["x-tidegate-warning"]
        assert "/properties/a: the keyword 'nullable'" in warning and "/: the keyword 'colour'" in warning


async def test_a_schema_that_takes_too_long_is_refused(gateway: Gateway) -> None:
    patterns = [{"type": "string", "pattern": f"(.*a.{{{width}}}){{3}}"} for width in range(20)]
    refused = await gateway.post("/v1/chat/completions", CHAT | of_schema({"allOf": patterns}))
    assert refused.status_code == 400
    assert "CPU time" in refused.json()["error"]["message"]
    call = asyncio.create_task(gateway.post("/v1/chat/completions", CHAT | of_schema(PERSON)))
    await gateway.replica.answer("x")
    assert (await call).status_code == 200


async def test_a_call_without_a_form_waits_for_no_check(gateway: Gateway) -> None:
    async with gateway.services.grammars._turn:
        waits = asyncio.create_task(gateway.post("/v1/chat/completions", CHAT | of_schema(PERSON)))
        plain = asyncio.create_task(gateway.post("/v1/chat/completions", CHAT))
        await gateway.replica.answer("x")
        assert (await plain).status_code == 200
    await gateway.replica.answer("x")
    assert (await waits).status_code == 200


async def test_a_number_of_any_size_in_a_schema(gateway: Gateway) -> None:
    form = of_schema({"type": "integer", "maximum": 10**30})
    call = asyncio.create_task(gateway.post("/v1/chat/completions", CHAT | form))
    [claim] = await gateway.replica.answer("1")
    assert (await call).status_code == 200
    assert "1e30" in sampling_of(claim.request).grammar


async def test_what_the_replica_cannot_follow_names_the_field(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post("/v1/chat/completions", CHAT | {"guided_regex": "a"}))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "", "error", code="GrammarFailed", message="no token is left")
    error = (await call).json()["error"]
    assert (error["param"], error["code"], error["message"]) == (
        "guided_regex",
        "grammar_failed",
        "no token is left",
    )


async def test_the_official_clients_parse_helper(gateway: Gateway) -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    client = openai.AsyncOpenAI(base_url=f"{gateway.address}/v1", api_key=gateway.key, max_retries=0)
    call = asyncio.create_task(
        client.chat.completions.parse(
            model=MODEL, messages=[{"role": "user", "content": "Who?"}], response_format=Person
        )
    )
    await gateway.replica.answer('{"name":"Ada",', '"age":36}')
    assert (await call).choices[0].message.parsed == Person(name="Ada", age=36)
