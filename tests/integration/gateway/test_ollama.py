"""Ollama's endpoints over a real gateway and queue."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.integration.gateway.rig import MODEL, PROMPT_TOKENS, REVISION, Gateway, open_gateway
from tidegate.messages.work import (
    CallDelta,
    ChatPrompt,
    Embed,
    Finish,
    Generate,
    Segment,
    TextPrompt,
    Tokenize,
    Tokens,
)

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
WHOLE = {"stream": False}
CALL = {"function": {"name": "f", "arguments": {}}}
UNENFORCEABLE = {"type": "object", "properties": {"city": {"not": {"const": "Ulm"}}}}


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.iter_lines()]


async def asked(
    gateway: Gateway, path: str, body: dict[str, Any], *words: str, **end: Any
) -> tuple[Any, httpx.Response]:
    """The work that a call became, and its answer."""
    call = asyncio.create_task(gateway.post(path, body))
    [claim] = await gateway.replica.next()
    for word in words[:-1]:
        await gateway.replica.say(claim, word)
    await gateway.replica.say(claim, words[-1], **({"finish": "stop"} | end))
    return claim.request.work, await call


async def test_a_chat_is_a_stream_of_lines(gateway: Gateway) -> None:
    work, response = await asked(gateway, "/api/chat", CHAT, "Good", "", " day\u2028")
    assert isinstance(work, Generate)
    assert work.prompt == ChatPrompt([{"role": "user", "content": "Hello"}])
    assert work.sampling.max_tokens is None
    *parts, last = lines(response)
    assert [part["message"] for part in parts] == [
        {"role": "assistant", "content": "Good"},
        {"role": "assistant", "content": " day\u2028"},
    ]
    assert all(part["model"] == MODEL and not part["done"] for part in parts)
    assert (last["done"], last["done_reason"], last["message"]["content"]) == (True, "stop", "")
    assert (last["prompt_eval_count"], last["eval_count"]) == (PROMPT_TOKENS, 3)
    assert last["total_duration"] >= last["eval_duration"] > 0


async def test_a_whole_chat(gateway: Gateway) -> None:
    named = CHAT | WHOLE | {"model": f"{MODEL}:latest"}
    _, response = await asked(gateway, "/api/chat", named, "Good", " day", finish="length")
    answer = response.json()
    assert answer["message"] == {"role": "assistant", "content": "Good day"}
    assert (answer["model"], answer["done"], answer["done_reason"]) == (MODEL, True, "length")


async def test_what_is_asked_reaches_the_model(gateway: Gateway) -> None:
    body = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi", "images": None},
            {"role": "assistant", "content": "Good", "thinking": "hm", "tool_calls": []},
        ],
        "options": {
            "num_predict": 9,
            "temperature": 0.5,
            "top_k": 3,
            "seed": 7,
            "stop": ["END"],
            "repeat_penalty": 1.1,
            "num_ctx": 4096,
            "typical_p": 1.0,
            "mirostat": 0,
        },
        "think": "high",
        "keep_alive": "5m",
        "tools": [],
        "format": "",
    }
    work, _ = await asked(gateway, "/api/chat", CHAT | WHOLE | body, "x")
    assert work.prompt == ChatPrompt(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Good", "reasoning_content": "hm"},
        ],
        add_generation_prompt=False,
        continue_final_message=True,
        template_args={"enable_thinking": True, "reasoning_effort": "high"},
    )
    sampling = work.sampling
    assert (sampling.max_tokens, sampling.clips_limit) == (9, True)
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, 7)
    assert (sampling.stop, sampling.repetition_penalty) == (("END",), 1.1)
    assert sampling.left_out == ("top_p", "min_p")


@pytest.mark.parametrize(
    ("form", "part"), [("json", '{"type":"object"'), ({"properties": {"a": {}}}, '"a"'), ("", None)]
)
async def test_a_format_reaches_the_model(gateway: Gateway, form: Any, part: str | None) -> None:
    work, _ = await asked(gateway, "/api/chat", CHAT | {"format": form}, "x")
    grammar = work.sampling.grammar
    assert grammar == "" if part is None else part in grammar


FUNCTION = {
    "name": "weather",
    "description": "Of a city",
    "parameters": {"type": "object", "properties": {"city": {}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]


async def test_tools_calls_and_results_reach_the_model(gateway: Gateway) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call, call | {"id": "mine"}, call | {"id": "mine"}],
        },
        {"role": "tool", "content": "Rain.", "tool_name": "weather"},
        {"role": "tool", "content": "Sun.", "tool_call_id": "mine"},
        {"role": "tool", "content": "Snow.", "tool_call_id": "mine"},
    ]
    work, _ = await asked(
        gateway, "/api/chat", CHAT | {"messages": messages, "tools": [{"function": FUNCTION}]}, "x"
    )
    assert (work.prompt.tools, work.prompt.tool_choice) == (TOOLS, "auto")
    made = work.prompt.messages
    assert [each["id"] for each in made[1]["tool_calls"]] == ["call00000", "mine", "call00001"]
    assert made[1]["tool_calls"][0]["function"] == call["function"]
    assert [(each["tool_call_id"], each["name"]) for each in made[2:]] == [
        ("call00000", "weather"),
        ("mine", "weather"),
        ("call00001", "weather"),
    ]


async def test_a_result_with_an_id_is_that_of_its_call_or_of_one_sent_without(gateway: Gateway) -> None:
    call = {"function": {"name": "weather", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [call, call | {"id": "mine"}]},
        {"role": "tool", "content": "Sun.", "tool_call_id": "mine"},
        {"role": "tool", "content": "Rain.", "tool_call_id": "dropped"},
    ]
    work, _ = await asked(gateway, "/api/chat", CHAT | {"messages": messages, "tools": TOOLS}, "x")
    assert [each["tool_call_id"] for each in work.prompt.messages[2:]] == ["mine", "call00000"]


@pytest.mark.parametrize("think", [None, False])
@pytest.mark.parametrize("stream", [False, True])
async def test_calls_and_thoughts_of_an_answer(gateway: Gateway, stream: bool, think: bool | None) -> None:
    body = CHAT | {"tools": TOOLS, "stream": stream, "think": think}
    call = asyncio.create_task(gateway.post("/api/chat", body))
    [claim] = await gateway.replica.next()
    parts = [
        Tokens([1], reasoning="hm"),
        Tokens([2], "Let me see.", calls=[CallDelta(0, "c1", "weather", "")]),
        Tokens(
            [3], calls=[CallDelta(0, "", "", '{"city":"Ulm\u2028"}'), CallDelta(1, "c2", "weather", "{}")]
        ),
    ]
    for seq, part in enumerate(parts):
        end = Finish("stop", "", "", PROMPT_TOKENS, 3) if seq == 2 else None
        segment = Segment(claim.request.id, seq, end, part, PROMPT_TOKENS)
        await gateway.replica.queue.emit([(claim.attempt, segment)])
    messages = [part["message"] for part in (lines(await call) if stream else [(await call).json()])]
    assert "".join(message["content"] for message in messages) == "Let me see."
    assert "".join(message.get("thinking", "") for message in messages) == ("" if think is False else "hm")
    assert [made for message in messages for made in message.get("tool_calls", ())] == [
        {"id": "c1", "function": {"index": 0, "name": "weather", "arguments": {"city": "Ulm\u2028"}}},
        {"id": "c2", "function": {"index": 1, "name": "weather", "arguments": {}}},
    ]


async def test_lines_have_no_ids(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post("/api/chat", CHAT, **{"x-tidegate-event-ids": "1"}))
    await gateway.replica.answer("Good", " day")
    assert len(lines(await call)) == 3


async def test_generate(gateway: Gateway) -> None:
    body = {"model": MODEL, "prompt": "Once", "system": "Be kind."}
    work, response = await asked(gateway, "/api/generate", body, "Good", " day")
    assert work.prompt == ChatPrompt(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Once"}]
    )
    assert [part["response"] for part in lines(response)] == ["Good", " day", ""]
    raw = {"model": MODEL, "prompt": "Once", "raw": True} | WHOLE
    work, response = await asked(gateway, "/api/generate", raw, "Good", " day")
    assert work.prompt == TextPrompt("Once")
    assert response.json()["response"] == "Good day"


@pytest.mark.parametrize(("path", "part"), [("/api/chat", "message"), ("/api/generate", "response")])
async def test_a_call_that_asks_nothing_loads_the_model(gateway: Gateway, path: str, part: str) -> None:
    call = asyncio.create_task(gateway.post(path, {"model": MODEL, "keep_alive": -1}))
    [claim] = await gateway.replica.next()
    assert isinstance(claim.request.work, Tokenize)
    segment = Segment(claim.request.id, 0, Finish("stop"), Tokens())
    await gateway.replica.queue.emit([(claim.attempt, segment)])
    answer = (await call).json()
    assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert part in answer


async def test_a_line_of_nothing_keeps_a_stream_alive(redis_url: str, key_prefix: str) -> None:
    """Comments, which other streams have, are no JSON."""
    async with (
        open_gateway(redis_url, key_prefix, hold_status_seconds=0.05, heartbeat_seconds=0.05) as gateway,
        gateway.http.stream("POST", "/api/chat", json=CHAT) as response,
    ):
        first, text, last = None, "", None
        async for line in response.aiter_lines():
            last = json.loads(line)
            if first is None:
                first = last
                [claim] = await gateway.replica.next()
                await gateway.replica.say(claim, "Good", "stop")
            text += last["message"]["content"]
        assert first is not None
        assert first["message"]["content"] == ""
        assert last is not None
        assert (text, last["done"]) == ("Good", True)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/api/chat", CHAT | {"format": "yaml"}, "format"),
        ("/api/chat", CHAT | {"format": {"type": "nope"}}, "format"),
        (
            "/api/chat",
            CHAT | {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
        ),
        (
            "/api/chat",
            {"model": MODEL, "messages": [{"role": "tool", "content": "x", "tool_name": "f"}]},
            "messages[0].tool_name",
        ),
        ("/api/chat", CHAT | {"options": {"mirostat": 1}}, "options.mirostat"),
        ("/api/chat", CHAT | {"options": {"nope": 1}}, "options.nope"),
        ("/api/chat", CHAT | {"options": {"num_predict": 0}}, "options.num_predict"),
        (
            "/api/chat",
            {"model": MODEL, "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
            "messages[0].images",
        ),
        ("/api/generate", {"model": MODEL, "prompt": "x", "suffix": "y"}, "suffix"),
        ("/api/generate", {"model": MODEL, "prompt": "x", "template": "y"}, "template"),
        ("/api/show", {"model": ""}, "model"),
        ("/api/show", {"system": ""}, "model"),
        (
            "/api/chat",
            CHAT | {"messages": [{"role": "assistant", "tool_calls": [CALL] * 65}] * 2},
            "messages[1].tool_calls",
        ),
        (
            "/api/chat",
            CHAT | {"tools": [{"function": {"name": "f", "strict": True, "parameters": UNENFORCEABLE}}]},
            "tools[0].function.parameters",
        ),
    ],
)
async def test_refusals_have_ollamas_form(
    gateway: Gateway, path: str, body: dict[str, Any], field: str
) -> None:
    response = await gateway.post(path, body)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert response.json()["error"].startswith(f"{field}: ")


async def test_keys_models_and_paths(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.address) as http:
        for method, path in (("GET", "/api/tags"), ("GET", "/api/ps"), ("POST", "/api/show")):
            refused = await http.request(method, path, json={"model": MODEL})
            assert (refused.status_code, list(refused.json())) == (401, ["error"])
    missing = await gateway.post("/api/chat", CHAT | {"model": "nope:latest"})
    assert missing.status_code == 404
    assert "'nope'" in missing.json()["error"]
    assert (await gateway.post("/api/pull", {})).json()["error"].startswith("There is no POST /api/pull")


async def test_a_failure_inside_a_stream(gateway: Gateway) -> None:
    last = lines(await gateway.failed_inside("/api/chat", CHAT))[-1]
    assert list(last) == ["error"]
    assert "inside" not in last["error"]


@pytest.mark.parametrize(("truncate", "kept"), [(None, -1), (False, None)])
async def test_embeddings(gateway: Gateway, truncate: bool | None, kept: int | None) -> None:
    await gateway.put_model(task="embed")
    body = {"model": f"{MODEL}:latest", "input": ["a", "b"], "truncate": truncate, "dimensions": 2}
    call = asyncio.create_task(gateway.post("/api/embed", body | {"keep_alive": 0, "options": {}}))
    [claim] = await gateway.replica.next()
    work = claim.request.work
    assert isinstance(work, Embed)
    assert (work.prompt.items, work.truncate, work.dimensions) == (
        [TextPrompt("a"), TextPrompt("b")],
        kept,
        2,
    )
    await gateway.replica.judge(claim)
    answer = (await call).json()
    assert answer["embeddings"] == [[0.0, 1.0], [1.0, 1.0]]
    assert (answer["model"], answer["prompt_eval_count"]) == (MODEL, PROMPT_TOKENS)
    assert (await gateway.post("/api/show", {"model": MODEL})).json()["capabilities"] == ["embedding"]
    wrong = await gateway.post("/api/chat", CHAT)
    assert (wrong.status_code, list(wrong.json())) == (400, ["error"])


async def test_models_are_listed_and_shown(gateway: Gateway) -> None:
    await gateway.put_model(context_length=64, weights_bytes=5, quantization="gptq-int4")
    await gateway.put_model(name="asleep", replicas_ready=0)
    tags = (await gateway.http.get("/api/tags")).json()["models"]
    assert [(tag["name"], tag["digest"]) for tag in tags] == [("asleep", REVISION), (MODEL, REVISION)]
    running = (await gateway.http.get("/api/ps")).json()["models"]
    assert [(tag["name"], tag["size"], tag["context_length"]) for tag in running] == [(MODEL, 5, 64)]
    shown = (await gateway.post("/api/show", {"model": f"{MODEL}:latest"})).json()
    assert shown["details"]["quantization_level"] == "gptq-int4"
    assert shown["model_info"]["simulated.context_length"] == 64
    assert shown["capabilities"] == ["completion", "tools"]
    body = {"name": MODEL, "system": "", "template": "", "options": None, "verbose": False}
    assert (await gateway.post("/api/show", body)).json() == shown
    assert (await gateway.http.get("/api/version")).json()["version"].count(".") == 2
