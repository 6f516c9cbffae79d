"""text-generation-inference's endpoints over a real gateway and queue, by huggingface_hub and plain HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, constants
from huggingface_hub.errors import OverloadedError, ValidationError

from tests.integration.gateway.rig import CHAT, MODEL, PROMPT_TOKENS, Gateway
from tidegate.messages.queue import QueueLimits
from tidegate.messages.work import Generate, Sampling, Segment, TextPrompt, TokenLogprob, Tokens

MESSAGES: Any = CHAT["messages"]
GREEDY = Sampling(seed=0, max_tokens=100, temperature=0.0, clips_limit=True, includes_stop=True)


def entry(token_id: int, text: str) -> TokenLogprob:
    return TokenLogprob(token_id, text, -0.5, text.encode(), [(9, "other", -1.5, b"other")])


async def served(gateway: Gateway, *words: str, **end: Any) -> Any:
    """Answer the next request with these words, each with its log probability; return its work."""
    [claim] = await gateway.replica.next()
    for place, word in enumerate(words):
        last = ({"finish": "stop"} | end) if place == len(words) - 1 else {}
        await gateway.replica.say(claim, word, logprobs=[entry(place + 1, word)], **last)
    return claim.request.work


@pytest.fixture(autouse=True)
def loopback_is_not_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run offline, and huggingface_hub then calls nobody."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
async def hub(gateway: Gateway) -> AsyncIterator[AsyncInferenceClient]:
    async with AsyncInferenceClient(model=f"{gateway.address}/models/{MODEL}", token=gateway.key) as client:
        yield client


async def test_the_hubs_client_continues_a_text(gateway: Gateway, hub: AsyncInferenceClient) -> None:
    answering = asyncio.create_task(served(gateway, " upon", " a", " time"))
    assert await hub.text_generation("Once") == " upon a time"
    work = await answering
    assert isinstance(work, Generate)
    assert work.prompt == TextPrompt("Once")
    assert work.sampling == Sampling(**{**_fields(GREEDY), "seed": work.sampling.seed})


def _fields(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in sampling.__struct_fields__}


async def test_parameters_reach_the_model(gateway: Gateway, hub: AsyncInferenceClient) -> None:
    answering = asyncio.create_task(served(gateway, "x"))
    text = await hub.text_generation(
        "Once",
        max_new_tokens=7,
        do_sample=True,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        seed=11,
        stop=["END"],
        truncate=5,
        return_full_text=True,
        best_of=1,
        watermark=False,
    )
    assert text == "Oncex"
    assert (await answering).sampling == Sampling(
        seed=11,
        max_tokens=7,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        stop=("END",),
        includes_stop=True,
        truncate_prompt=5,
    )


async def test_details(gateway: Gateway, hub: AsyncInferenceClient) -> None:
    answering = asyncio.create_task(served(gateway, "Good", "", finish="stop", stopped_by="END"))
    found = await hub.text_generation("Once", details=True, seed=3, top_n_tokens=1)
    await answering
    assert found.generated_text == "Good"
    details = found.details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("stop_sequence", 2, 3)
    assert [(token.id, token.text, token.logprob) for token in details.tokens] == [
        (1, "Good", -0.5),
        (2, "", -0.5),
    ]
    assert details.top_tokens is not None
    assert details.top_tokens[0] == [{"id": 9, "text": "other", "logprob": -1.5, "special": False}]


async def test_the_prompts_tokens(gateway: Gateway) -> None:
    body = {"inputs": "Once", "parameters": {"details": True, "decoder_input_details": True}}
    call = asyncio.create_task(gateway.post("/generate", body))
    [claim] = await gateway.replica.next()
    assert claim.request.work.sampling.prompt_logprobs == 0  # type: ignore[union-attr]
    first = TokenLogprob(5, "On", None, b"On")
    prompt = Tokens(prompt_logprobs=[first, entry(6, "ce")])
    await gateway.replica.queue.emit([(claim.attempt, Segment(claim.request.id, 0, None, prompt))])
    gateway.replica._seqs[claim.request.id] = 1
    await gateway.replica.say(claim, "x", "length", logprobs=[entry(1, "x")])
    details = (await call).json()["details"]
    assert details["prefill"] == [
        {"id": 5, "text": "On", "logprob": None},
        {"id": 6, "text": "ce", "logprob": -0.5},
    ]
    assert details["finish_reason"] == "length"


async def test_the_hubs_client_streams(gateway: Gateway, hub: AsyncInferenceClient) -> None:
    answering = asyncio.create_task(served(gateway, "Good", " day\u2028", "", finish="stop"))
    found = [event async for event in await hub.text_generation("Once", stream=True, details=True)]
    await answering
    assert [(event.index, event.token.text, event.token.special) for event in found] == [
        (1, "Good", False),
        (2, " day\u2028", False),
        (3, "", True),
    ]
    assert found[0].generated_text is None
    assert found[-1].generated_text == "Good day\u2028"
    assert found[-1].details is not None
    assert found[-1].details.finish_reason == "eos_token"
    assert found[-1].details.input_length == PROMPT_TOKENS


async def test_text_that_tokens_do_not_spell_is_streamed_whole(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post("/generate_stream", {"inputs": "Once"}))
    [claim] = await gateway.replica.next()
    parts = [TokenLogprob(1, "\ufffd", -0.5, b"\xc3"), TokenLogprob(2, "\ufffd", -0.5, b"\xa9")]
    await gateway.replica.say(claim, "é", logprobs=parts)
    await gateway.replica.say(claim, "", "length")
    events = [json.loads(line[5:]) for line in (await call).text.splitlines() if line.startswith("data:")]
    assert [event["token"]["text"] for event in events] == ["", "é", ""]
    assert events[-1]["generated_text"] == "é"
    assert events[-1]["details"]["finish_reason"] == "length"


@pytest.mark.parametrize("prefix", ["", f"/models/{MODEL}"])
async def test_chat_through_the_hubs_client(gateway: Gateway, prefix: str) -> None:
    """Which sends no model of ours: the path names it, or it is the only one."""
    async with AsyncInferenceClient(model=gateway.address + prefix, token=gateway.key) as client:
        answering = asyncio.create_task(gateway.replica.answer("Good", " day"))
        whole = await client.chat_completion(MESSAGES, max_tokens=5)
        await answering
        assert whole.choices[0].message.content == "Good day"
        answering = asyncio.create_task(gateway.replica.answer("Good", " day"))
        chunks = [chunk async for chunk in await client.chat_completion(MESSAGES, stream=True)]
        await answering
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Good day"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("grammar", "part"),
    [
        ({"type": "json", "value": SCHEMA}, '"a"'),
        ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, '"a"'),
        ({"type": "regex", "value": "[ab]+"}, "[ab]+"),
    ],
)
async def test_a_grammar_reaches_the_model(
    gateway: Gateway, hub: AsyncInferenceClient, grammar: Any, part: str
) -> None:
    answering = asyncio.create_task(served(gateway, "x"))
    assert await hub.text_generation("Once", grammar=grammar) == "x"
    assert part in (await answering).sampling.grammar


async def test_a_grammar_that_is_wrong_is_refused(gateway: Gateway, hub: AsyncInferenceClient) -> None:
    wrong: Any = {"type": "regex", "value": "["}
    with pytest.raises(ValidationError, match=r"parameters\.grammar\.value"):
        await hub.text_generation("Once", grammar=wrong)


async def test_a_chats_schema_through_the_hubs_client(gateway: Gateway, hub: AsyncInferenceClient) -> None:
    """Which sends it in TGI's form."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answering = asyncio.create_task(gateway.replica.answer("{}"))
    await hub.chat_completion(MESSAGES, response_format=form)
    [claim] = await answering
    assert isinstance(claim.request.work, Generate)
    assert '"a"' in claim.request.work.sampling.grammar


async def test_which_model(gateway: Gateway) -> None:
    await gateway.put_model(name="other", context_length=64)
    refused = await gateway.post("/generate", {"inputs": "Once"})
    assert (refused.status_code, refused.json()["error_type"]) == (404, "validation")
    assert "other, tide" in refused.json()["error"]
    for path, body in (("/generate", {"model": MODEL}), (f"/models/{MODEL}", {}), ("/", {"model": MODEL})):
        call = asyncio.create_task(gateway.post(path, {"inputs": "Once"} | body))
        await gateway.replica.answer("x")
        answer = (await call).json()
        assert (answer[0] if isinstance(answer, list) else answer)["generated_text"] == "x"
    for method, path in (
        ("GET", f"/models/{MODEL}"),
        ("POST", f"/models/{MODEL}/nope"),
        ("POST", "/models/a/b"),
    ):
        assert (await gateway.http.request(method, path)).status_code == 404
    info = (await gateway.http.get("/models/other/info")).json()
    assert (info["model_id"], info["max_total_tokens"]) == ("other", 64)
    assert (await gateway.http.get("/info")).json()["error_type"] == "validation"


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"best_of": 2}, "parameters.best_of"),
        ({"typical_p": 0.5}, "parameters.typical_p"),
        ({"watermark": True}, "parameters.watermark"),
        ({"adapter_id": "x"}, "parameters.adapter_id"),
        ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
        ({"nope": 1}, "parameters.nope"),
    ],
)
async def test_refusals_have_tgis_form(gateway: Gateway, parameters: dict[str, Any], field: str) -> None:
    response = await gateway.post("/generate", {"inputs": "Once", "parameters": parameters})
    assert response.status_code == 400
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error_type"] == "validation"
    assert response.json()["error"].startswith(f"{field}: ")


async def test_the_hubs_client_knows_the_errors(gateway: Gateway, hub: AsyncInferenceClient) -> None:
    with pytest.raises(ValidationError, match="typical_p"):
        await hub.text_generation("Once", typical_p=0.5)
    await gateway.put_model(limits=QueueLimits(max_requests=1))
    call = asyncio.create_task(hub.text_generation("Once"))
    [claim] = await gateway.replica.next()
    with pytest.raises(OverloadedError, match="queue"):
        await hub.text_generation("Once")
    await gateway.replica.say(claim, "Good", "stop")
    assert await call == "Good"


async def test_a_failure_inside_a_stream(gateway: Gateway) -> None:
    body = {"inputs": "Once", "stream": True}
    response = await gateway.failed_inside("/", body, logprobs=[entry(1, "Good")])
    last: Sequence[str] = response.text.strip().split("\n\n")
    assert json.loads(last[-1].removeprefix("data: "))["error_type"] == "generation"


async def test_a_call_that_names_no_model_counts_as_that_of_the_only_one(gateway: Gateway) -> None:
    call = asyncio.create_task(gateway.post("/generate", {"inputs": "Once"}))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "Good", "stop", logprobs=[entry(1, "Good")])
    assert (await call).status_code == 200
    shown = (await gateway.http.get("/metrics")).text
    assert f'tidegate_requests_total{{model="{MODEL}",outcome="ok"}} 1.0' in shown
