"""Anthropic's Messages, over a real gateway and queue."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.integration.gateway.rig import MODEL, PROMPT_TOKENS, Gateway
from tidegate.messages.work import CallDelta, ChatPrompt, Claim, Finish, Generate, Segment, Tokenize, Tokens

PATH = "/v1/messages"
BODY: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 32,
    "messages": [{"role": "user", "content": "Hello"}],
}
FORM = {"type": "json_schema", "schema": {}}
TOOLS = [{"name": "weather", "description": "Of a city", "input_schema": {"properties": {"city": {}}}}]
SHOWN = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {}}},
    },
}
DEEP = json.loads('{"a":' * 70 + "1" + "}" * 70)
CALL = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Ulm"}}


def events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in response.text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert event["type"] == name.removeprefix("event: ")
            found.append((event["type"], event))
    return found


UNENFORCEABLE = {"type": "object", "properties": {"city": {"not": {"const": "Ulm"}}}}


async def asked(
    gateway: Gateway, body: dict[str, Any], *words: str, **end: Any
) -> tuple[Any, httpx.Response]:
    """The work that a call became, and its answer."""
    call = asyncio.create_task(gateway.post(PATH, BODY | body))
    [claim] = await gateway.replica.next()
    for word in words[:-1]:
        await gateway.replica.say(claim, word)
    await gateway.replica.say(claim, words[-1], **({"finish": "stop"} | end))
    return claim.request.work, await call


async def test_a_whole_answer(gateway: Gateway) -> None:
    work, response = await asked(gateway, {}, "Good", " day")
    message = response.json()
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "Good day", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": PROMPT_TOKENS,
            "output_tokens": 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        },
    }
    assert isinstance(work, Generate)
    assert (work.sampling.max_tokens, work.sampling.clips_limit) == (32, True)
    assert "temperature" in work.sampling.left_out


async def test_what_an_agent_sends_reaches_the_model(gateway: Gateway) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    body = {
        "system": [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be brief."} | cached],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"} | cached]},
            {"role": "user", "content": "there"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "Good", "citations": None},
                ],
            },
        ],
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "stop_sequences": ["END"],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "u"},
        "context_management": {"edits": []},
        "service_tier": "auto",
        "tools": [],
    }
    work, _ = await asked(gateway, body, "x")
    assert work.prompt == ChatPrompt(
        [
            {"role": "system", "content": "Be kind.\nBe brief."},
            {"role": "user", "content": "Hi\nthere"},
            {"role": "assistant", "content": "Good", "reasoning_content": "hm"},
        ],
        add_generation_prompt=False,
        continue_final_message=True,
        template_args={"enable_thinking": True},
    )
    sampling = work.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.stop) == (0.5, 5, 0.9, ("END",))


async def test_a_stream(gateway: Gateway) -> None:
    _, response = await asked(gateway, {"stream": True}, "Good", "", " day\u2028")
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response)
    assert [name for name, _ in found] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    begun = found[0][1]["message"]
    assert (begun["content"], begun["stop_reason"], begun["usage"]["input_tokens"]) == (
        [],
        None,
        PROMPT_TOKENS,
    )
    assert [event["delta"]["text"] for name, event in found if name == "content_block_delta"] == [
        "Good",
        " day\u2028",
    ]
    assert found[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2][1]["usage"]["output_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({"finish": "length"}, ("max_tokens", None)),
        ({"stopped_by": "END"}, ("stop_sequence", "END")),
        ({"stopped_by": "<|a stop of the model's format|>"}, ("end_turn", None)),
    ],
)
async def test_reasons_to_stop(
    gateway: Gateway, stream: bool, end: dict[str, Any], expected: tuple[str, str | None]
) -> None:
    _, response = await asked(gateway, {"stream": stream, "stop_sequences": ["END"]}, "x", **end)
    shown = events(response)[-2][1]["delta"] if stream else response.json()
    assert (shown["stop_reason"], shown["stop_sequence"]) == expected


async def test_an_answer_without_text(gateway: Gateway) -> None:
    _, response = await asked(gateway, {}, "")
    assert response.json()["content"] == []
    _, response = await asked(gateway, {"stream": True}, "")
    assert [name for name, _ in events(response)] == [
        "message_start",
        "ping",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("older", [False, True])
async def test_a_schema_reaches_the_model(gateway: Gateway, older: bool) -> None:
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    body = {"output_format": form} if older else {"output_config": {"format": form, "effort": "low"}}
    work, _ = await asked(gateway, body, "{}")
    assert '"a"' in work.sampling.grammar
    assert work.prompt.template_args == ({} if older else {"reasoning_effort": "low"})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ([SHOWN], "auto", True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ([SHOWN], "auto", False)),
        ({"type": "any"}, ([SHOWN], "required", True)),
        ({"type": "tool", "name": "weather"}, ([SHOWN], "weather", False)),
        ({"type": "none"}, ([], "", True)),
    ],
)
async def test_tools_reach_the_model(gateway: Gateway, choice: Any, expected: Any) -> None:
    tools = [TOOLS[0] | {"type": "custom", "cache_control": {"type": "ephemeral"}}]
    work, _ = await asked(gateway, {"tools": tools, "tool_choice": choice}, "x")
    prompt = work.prompt
    assert (prompt.tools, prompt.tool_choice, prompt.parallel_tool_calls) == expected


async def test_calls_and_results_are_history(gateway: Gateway) -> None:
    result = {"type": "tool_result", "tool_use_id": "c1"}
    body = {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, CALL]},
            {"role": "assistant", "content": [CALL | {"id": "c2"}]},
            {
                "role": "user",
                "content": [
                    result | {"content": [{"type": "text", "text": "Rain."}], "is_error": False},
                    result | {"tool_use_id": "c2"},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
    }
    work, _ = await asked(gateway, body, "x")
    function = {"name": "weather", "arguments": {"city": "Ulm"}}
    assert work.prompt.messages == [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": name, "type": "function", "function": function} for name in ("c1", "c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "Rain."},
        {"role": "tool", "tool_call_id": "c2", "name": "weather", "content": ""},
        {"role": "user", "content": "Well?"},
    ]
    assert work.prompt.add_generation_prompt


PARTS = [
    Tokens([1], reasoning="hm"),
    Tokens([2], "Let me"),
    Tokens([3], " see.", calls=[CallDelta(0, "c1", "weather", "")]),
    Tokens([4], calls=[CallDelta(0, "", "", '{"city":')]),
    Tokens([5], calls=[CallDelta(0, "", "", '"Ulm"}'), CallDelta(1, "c2", "weather", "{}")]),
]


async def called(gateway: Gateway, body: dict[str, Any]) -> httpx.Response:
    call = asyncio.create_task(gateway.post(PATH, BODY | {"tools": TOOLS} | body))
    [claim] = await gateway.replica.next()
    for seq, part in enumerate(PARTS):
        end = Finish("stop", "", "", PROMPT_TOKENS, len(PARTS)) if seq == len(PARTS) - 1 else None
        segment = Segment(claim.request.id, seq, end, part, PROMPT_TOKENS)
        await gateway.replica.queue.emit([(claim.attempt, segment)])
    return await call


@pytest.mark.parametrize("thinks", [False, True])
async def test_a_whole_answer_with_calls(gateway: Gateway, thinks: bool) -> None:
    message = (await called(gateway, {"thinking": {"type": "adaptive"}} if thinks else {})).json()
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    assert message["content"] == [
        *([thought] if thinks else []),
        {"type": "text", "text": "Let me see.", "citations": None},
        CALL,
        CALL | {"id": "c2", "input": {}},
    ]
    assert message["stop_reason"] == "tool_use"


async def test_a_stream_with_calls(gateway: Gateway) -> None:
    found = events(await called(gateway, {"thinking": {"type": "enabled"}, "stream": True}))
    blocks: list[dict[str, Any]] = []
    pieces: dict[int, str] = {}
    for name, event in found:
        if name == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
        elif name == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            kind, piece = [value for key, value in event["delta"].items()]
            assert (
                kind
                == {"text": "text", "thinking": "thinking", "tool_use": "input_json"}[blocks[-1]["type"]]
                + "_delta"
            )
            pieces[event["index"]] = pieces.get(event["index"], "") + piece
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    assert list(pieces.values()) == ["hm", "Let me see.", '{"city":"Ulm"}', "{}"]
    assert blocks[2] == CALL | {"input": {}}
    stops = [event["index"] for name, event in found if name == "content_block_stop"]
    assert stops == [0, 1, 2, 3]
    assert found[-2][1]["delta"]["stop_reason"] == "tool_use"


async def test_tokens_are_counted(gateway: Gateway) -> None:
    body = {name: BODY[name] for name in ("model", "messages")}
    call = asyncio.create_task(gateway.post(f"{PATH}/count_tokens?beta=true", body | {"system": "Be kind."}))
    [claim] = await gateway.replica.next()
    assert isinstance(claim.request.work, Tokenize)
    assert isinstance(claim.request.work.prompt, ChatPrompt)
    assert len(claim.request.work.prompt.messages) == 2
    await _emit_prompt(gateway, claim, [4, 5, 6])
    assert (await call).json() == {"input_tokens": 3}


async def _emit_prompt(gateway: Gateway, claim: Claim, prompt_ids: list[int]) -> None:
    segment = Segment(claim.request.id, 0, Finish("stop"), Tokens(prompt_ids=prompt_ids))
    await gateway.replica.queue.emit([(claim.attempt, segment)])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "tools[0].input_schema.type: "),
        (
            {"tools": [{"name": "f", "strict": True, "input_schema": UNENFORCEABLE}]},
            "tools[0].input_schema: ",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type: "),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice.name: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "messages[0].content[0].tool_use_id: ",
        ),
        (
            {"messages": [{"role": "assistant", "content": [CALL | {"input": DEEP}]}]},
            "messages[0].content[0].input: ",
        ),
        (
            {"messages": [{"role": "assistant", "content": [CALL]}]},
            "messages[0].content: ",
        ),
        ({"mcp_servers": [{}]}, "mcp_servers: "),
        ({"nope": 1}, "nope: unknown field"),
        ({"output_config": {"format": FORM}, "output_format": FORM}, "output_format: "),
        ({"output_format": FORM | {"schema": {"type": "nope"}}}, "output_format.schema: "),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
    ],
)
async def test_refusals_have_anthropics_form(gateway: Gateway, body: dict[str, Any], says: str) -> None:
    response = await gateway.post(PATH, BODY | body)
    assert response.status_code == 400
    refused = response.json()
    assert (refused["type"], refused["error"]["type"]) == ("error", "invalid_request_error")
    assert says in refused["error"]["message"]
    assert set(refused["error"]) == {"type", "message"}


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
async def test_a_thread_is_refused_so_that_the_client_goes_on_without(
    gateway: Gateway, thread: dict[str, Any]
) -> None:
    response = await gateway.post(PATH, BODY | {"thread": thread})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["message"].startswith("thread: ")
    assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


async def test_keys_models_and_methods(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.address) as http:
        nobody = await http.post(PATH, json=BODY)
        assert (nobody.status_code, nobody.json()["error"]["type"]) == (401, "authentication_error")
        known = {"x-api-key": gateway.key, "anthropic-version": "2023-06-01", "anthropic-beta": "x"}
        other = await http.post(PATH, json=BODY | {"model": "nope"}, headers=known)
        assert (other.status_code, other.json()["error"]["type"]) == (404, "not_found_error")
        wrong = await http.get(PATH, headers=known)
        assert (wrong.status_code, wrong.json()["type"]) == (405, "error")


async def test_a_failure_inside_a_stream(gateway: Gateway) -> None:
    found = events(await gateway.failed_inside(PATH, BODY | {"stream": True}))
    assert found[-1][0] == "error"
    assert found[-1][1]["error"]["type"] == "api_error"
    assert "inside" not in found[-1][1]["error"]["message"]


async def test_a_base_url_that_has_v1_already_is_told(gateway: Gateway) -> None:
    refused = await gateway.post("/v1/v1/messages", BODY)
    assert refused.status_code == 404
    assert "leave it out of the client's base URL" in refused.text
