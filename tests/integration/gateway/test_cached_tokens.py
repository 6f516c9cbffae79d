"""What each protocol says of a prompt's tokens that an engine held from earlier requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.integration.gateway.rig import CHAT, MODEL, PROMPT_TOKENS, Gateway

CACHED_TOKENS = 3
USAGE = {"stream_options": {"include_usage": True}}
OPENAI = {
    "prompt_tokens": PROMPT_TOKENS,
    "completion_tokens": 2,
    "total_tokens": PROMPT_TOKENS + 2,
    "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
}
RESPONSES = {
    "input_tokens": PROMPT_TOKENS,
    "output_tokens": 2,
    "total_tokens": PROMPT_TOKENS + 2,
    "input_tokens_details": {"cached_tokens": CACHED_TOKENS, "cache_write_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0},
}
ANTHROPIC = {
    "input_tokens": PROMPT_TOKENS - CACHED_TOKENS,
    "output_tokens": 2,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": CACHED_TOKENS,
}
DOORS = [
    ("/v1/chat/completions", CHAT, OPENAI),
    ("/v1/completions", {"model": MODEL, "prompt": "Hello"}, OPENAI),
    ("/v1/responses", {"model": MODEL, "input": "Hello"}, RESPONSES),
    ("/v1/messages", CHAT | {"max_tokens": 32}, ANTHROPIC),
]


@pytest.mark.parametrize(("path", "body", "expected"), DOORS)
async def test_a_whole_answer(
    gateway: Gateway, path: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert json.loads(await answered(gateway, path, body))["usage"] == expected


@pytest.mark.parametrize(("path", "body", "expected"), DOORS)
async def test_a_stream(gateway: Gateway, path: str, body: dict[str, Any], expected: dict[str, Any]) -> None:
    options = USAGE if expected is OPENAI else {}
    text = await answered(gateway, path, body | options | {"stream": True})
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    found = [event.get("usage") or event.get("response", {}).get("usage") for event in events]
    assert [usage for usage in found if usage] == [expected]


async def test_running_usage_says_it_at_the_end(gateway: Gateway) -> None:
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    text = await answered(gateway, "/v1/chat/completions", CHAT | options | {"stream": True})
    found = [json.loads(line[6:])["usage"] for line in text.splitlines() if line.startswith("data: {")]
    assert found[-1] == OPENAI
    assert not any("prompt_tokens_details" in usage for usage in found[:-1])


async def test_what_one_choice_computed_was_not_cached(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post("/v1/chat/completions", CHAT | {"n": 2}))
    first, second = await gateway.replica.next(2)
    await gateway.replica.say(first, "a", "stop", cached_tokens=CACHED_TOKENS)
    await gateway.replica.say(second, "b", "stop", cached_tokens=PROMPT_TOKENS)
    assert (await call).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": CACHED_TOKENS}


async def answered(gateway: Gateway, path: str, body: dict[str, Any]) -> str:
    call = asyncio.create_task(gateway.post(path, body))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "Hi")
    await gateway.replica.say(claim, " you", "stop", cached_tokens=CACHED_TOKENS)
    response = await call
    assert response.status_code == 200, response.text
    return response.text
