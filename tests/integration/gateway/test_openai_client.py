"""The official client against the gateway: sync and async, plain and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.engine_requests import sampling_of
from tests.integration.gateway.rig import MODEL, PROMPT_TOKENS, REVISION, Gateway
from tidegate.messages.work import (
    ChatPrompt,
    Detokenize,
    Finish,
    Segment,
    TextPrompt,
    Tokenize,
    TokenLogprob,
    TokenPrompt,
    Tokens,
)


@pytest.fixture
def client(gateway: Gateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.address}/v1", api_key=gateway.key, max_retries=0)


async def test_a_chat_answer(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    call = asyncio.create_task(
        client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
                },
            ],
            temperature=0,
            top_p=0.5,
            seed=5,
            stop=["END", "STOP"],
            presence_penalty=1,
            frequency_penalty=-1,
            max_completion_tokens=9,
        )
    )
    [claim] = await gateway.replica.answer("Hi", " there", "!")
    answer = await call

    assert answer.choices[0].message.content == "Hi there!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-") and len(answer.id) == len("chatcmpl-") + 22
    assert answer.system_fingerprint == REVISION
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, 3)
    assert answer.usage.total_tokens == PROMPT_TOKENS + 3
    request = claim.request
    assert request.work.prompt == ChatPrompt(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hel\nlo"}]
    )
    assert request.tenant == "acme"
    assert request.id == f"{answer.id}.0"
    sampling = sampling_of(request)
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.max_tokens) == (0, 0.5, 5, 9)
    assert (sampling.stop, sampling.presence_penalty, sampling.frequency_penalty) == (("END", "STOP"), 1, -1)
    assert sampling.top_logprobs is None


async def test_a_chat_stream(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    call = asyncio.create_task(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "Grüße")
    stream = await call
    first = await anext(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert (await anext(stream)).choices[0].delta.content == "Grüße"
    await gateway.replica.say(claim, " 🌊\u2028")
    assert (await anext(stream)).choices[0].delta.content == " 🌊\u2028"
    await gateway.replica.say(claim, "", "length")
    wordless, last, with_usage = [chunk async for chunk in stream]
    assert wordless.choices[0].delta.content == ""
    assert last.choices[0].finish_reason == "length"
    assert last.choices[0].delta.content is None
    assert last.usage is None
    assert with_usage.choices == []
    assert with_usage.usage is not None and with_usage.usage.completion_tokens == 3
    assert with_usage.object == "chat.completion.chunk"


async def test_the_sync_client(gateway: Gateway) -> None:
    def ask(stream: bool) -> str:
        with openai.OpenAI(base_url=f"{gateway.address}/v1", api_key=gateway.key, max_retries=0) as client:
            if not stream:
                plain = client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "Hello"}]
                )
                assert isinstance(plain, ChatCompletion)
                return plain.choices[0].message.content or ""
            chunks = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}], stream=True
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    for stream in (False, True):
        call = asyncio.create_task(asyncio.to_thread(ask, stream))
        await gateway.replica.answer("one ", "two ", "three")
        assert await call == "one two three"


async def test_several_choices_have_seeds_of_their_own(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    call = asyncio.create_task(
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], n=3, seed=2**63 - 2
        )
    )
    claims = await gateway.replica.next(3)
    for claim in reversed(claims):
        await gateway.replica.say(claim, f"answer {claim.request.id[-1]}", "stop")
    answer = await call
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["answer 0", "answer 1", "answer 2"]
    assert [sampling_of(claim.request).seed for claim in claims] == [2**63 - 2, 2**63 - 1, 0]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, 3)


async def test_chat_logprobs(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    token = TokenLogprob(5, "é", -0.5, "é".encode(), [(5, "é", -0.5, "é".encode()), (6, "e", -1.5, b"e")])
    for stream in (False, True):
        call = asyncio.create_task(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Hello"}],
                logprobs=True,
                top_logprobs=2,
                stream=stream,
            )
        )
        [claim] = await gateway.replica.next()
        await gateway.replica.say(claim, "é", "stop", logprobs=[token])
        answer = await call
        if isinstance(answer, ChatCompletion):
            logprobs = answer.choices[0].logprobs
            content = logprobs.content if logprobs else None
        else:
            found = [chunk.choices[0].logprobs async for chunk in answer]
            content = next(item.content for item in found if item is not None)
        assert sampling_of(claim.request).top_logprobs == 2
        assert content is not None and len(content) == 1
        assert (content[0].token, content[0].logprob, content[0].bytes) == ("é", -0.5, [0xC3, 0xA9])
        assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("é", -0.5), ("e", -1.5)]


async def test_completions_with_several_prompts(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    call = asyncio.create_task(client.completions.create(model=MODEL, prompt=["a", "b"], n=2, seed=10))
    claims = await gateway.replica.next(4)
    for claim in claims:
        await gateway.replica.say(claim, f"text {claim.request.id[-1]}", "length")
    answer = await call
    assert [choice.text for choice in answer.choices] == ["text 0", "text 1", "text 2", "text 3"]
    assert [claim.request.work.prompt for claim in claims] == [TextPrompt("a")] * 2 + [TextPrompt("b")] * 2
    assert [sampling_of(claim.request).seed for claim in claims] == [10, 11, 10, 11]
    assert {sampling_of(claim.request).max_tokens for claim in claims} == {16}
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2 * PROMPT_TOKENS, 4)


async def test_completions_of_token_ids(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    call = asyncio.create_task(client.completions.create(model=MODEL, prompt=[[1, 2], [3]]))
    claims = await gateway.replica.answer("x", count=2)
    await call
    assert [claim.request.work.prompt for claim in claims] == [TokenPrompt([1, 2]), TokenPrompt([3])]


async def test_a_completions_stream_with_echo_and_logprobs(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    call = asyncio.create_task(
        client.completions.create(
            model=MODEL, prompt="Once", echo=True, logprobs=1, max_tokens=0, stream=True
        )
    )
    [claim] = await gateway.replica.next()
    prompt = [
        TokenLogprob(1, "On", None, b"On"),
        TokenLogprob(2, "ce", -0.25, b"ce", [(2, "ce", -0.25, b"ce")]),
    ]
    await gateway.replica.say(claim, "Once", "length", logprobs=prompt)
    [chunk] = [chunk async for chunk in await call]
    assert sampling_of(claim.request).echo and sampling_of(claim.request).max_tokens == 0
    assert chunk.choices[0].text == "Once"
    assert chunk.choices[0].finish_reason == "length"
    logprobs = chunk.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["On", "ce"]
    assert logprobs.token_logprobs == [None, -0.25]
    assert logprobs.top_logprobs == [None, {"ce": -0.25}]
    assert logprobs.text_offset == [0, 2]


async def test_models(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    model = await client.models.retrieve(MODEL)
    assert (model.object, model.owned_by, model.created) == ("model", "tidegate", 1_700_000_000)
    more = model.model_extra or {}
    assert (more["root"], more["max_model_len"]) == (MODEL, more["tidegate"]["context_length"] or None)
    with pytest.raises(openai.NotFoundError, match=f"Models that exist: {MODEL}"):
        await client.models.retrieve("nope")


async def test_errors_become_the_clients_exceptions(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    async def ask(**fields: object) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **fields}
        await client.chat.completions.create(**body)  # type: ignore[call-overload]

    with pytest.raises(openai.BadRequestError) as refused:
        await ask(modalities=["audio"])
    assert refused.value.param == "modalities"
    with pytest.raises(openai.NotFoundError) as missing:
        await ask(model="nope")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as wrong:
        await client.with_options(api_key="tg-wrong").models.list()
    assert wrong.value.code == "invalid_api_key"
    # LiteLLM tells a wrong key from a wrong field by these words of OpenAI's.
    assert "Incorrect API key provided" in wrong.value.message


@pytest.mark.parametrize("model", [MODEL, "gpt-4o"])
async def test_azures_client_finds_a_model_as_its_deployment(gateway: Gateway, model: str) -> None:
    """Its path names the model, and its header is `api-key`."""
    azure = openai.AsyncAzureOpenAI(
        azure_endpoint=gateway.address,
        azure_deployment=MODEL,
        api_key=gateway.key,
        api_version="2024-10-21",
        max_retries=0,
    )
    chat = asyncio.create_task(
        azure.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}])
    )
    await gateway.replica.answer("Hi")
    assert (await chat).choices[0].message.content == "Hi"
    text = asyncio.create_task(azure.completions.create(model=model, prompt="x"))
    await gateway.replica.answer("Ho")
    assert (await text).choices[0].text == "Ho"


async def test_azures_later_paths_and_a_body_without_a_model(gateway: Gateway) -> None:
    later = openai.AsyncOpenAI(base_url=f"{gateway.address}/openai/v1/", api_key=gateway.key, max_retries=0)
    assert [model.id async for model in later.models.list()] == [MODEL]
    path = f"/openai/deployments/{MODEL}/chat/completions?api-version=2024-10-21"
    call = asyncio.create_task(gateway.post(path, {"messages": [{"role": "user", "content": "x"}]}))
    await gateway.replica.answer("Hi")
    assert (await call).json()["model"] == MODEL
    missing = await gateway.post("/openai/deployments/none/completions", {"prompt": "x"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    embeddings = await gateway.post(f"/openai/deployments/{MODEL}/embeddings", {"input": "x"})
    assert (embeddings.status_code, embeddings.json()["error"]["code"]) == (400, "wrong_task")


# Bodies as vLLM's benchmark (0.33, backends openai and openai-chat) and guidellm (0.8) send them.
BENCHMARKS = [
    (
        "/v1/completions",
        {
            "prompt": "1 0 m0 Finish",
            "repetition_penalty": 1.0,
            "max_tokens": 3,
            "logprobs": None,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "1 0 m0 Finish"}]}],
            "max_completion_tokens": 3,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": "1 0 m0 Finish",
            "max_tokens": 3,
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "1 0 m0 Finish"}]}],
            "max_completion_tokens": 3,
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
]


@pytest.mark.parametrize(("path", "body"), BENCHMARKS)
async def test_a_benchmarks_stream_reads_as_it_reads_it(
    gateway: Gateway, path: str, body: dict[str, Any]
) -> None:
    """Messages end in an empty line and begin with `data: `; a chunk with choices is a token or an end, one
    without holds the usage. Each token is timed, one without text (an end token that is ignored) as well."""
    call = asyncio.create_task(gateway.post(path, {"model": MODEL, "stream": True} | body))
    await gateway.replica.answer("Hi", "", "!", finish="length")
    response = await call
    *messages, done, rest = response.text.split("\n\n")
    assert (response.status_code, done, rest) == (200, "data: [DONE]", "")
    texts, usage = [], None
    for message in messages:
        chunk = json.loads(message.removeprefix("data: "))
        if choices := chunk["choices"]:
            token = choices[0].get("delta", choices[0])
            texts += [token[name] for name in ("text", "content") if name in token and "role" not in token]
        usage = chunk["usage"] or usage
    assert texts == ["Hi", "", "!"]
    assert usage is not None
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT_TOKENS, 3)


async def test_tokenize_as_vllms_benchmark_asks(gateway: Gateway) -> None:
    """It sends a body like this to line its prompts up with the server's tokenizer."""
    asked = {"model": MODEL, "prompt": "hi", "add_special_tokens": False}
    call = asyncio.create_task(gateway.post("/tokenize", asked))
    [claim] = await gateway.replica.next()
    assert claim.request.work == Tokenize(TextPrompt("hi", add_special_tokens=False))
    output = Tokens(prompt_ids=[5, 6])
    await gateway.replica.queue.emit([(claim.attempt, Segment(claim.request.id, 0, Finish("stop"), output))])
    answer = (await call).json()
    assert (answer["tokens"], answer["count"], answer["token_strs"]) == ([5, 6], 2, None)

    call = asyncio.create_task(gateway.post("/detokenize", {"tokens": [5, 6]}))
    [claim] = await gateway.replica.next()
    assert claim.request.work == Detokenize(TokenPrompt([5, 6]))
    output = Tokens(text="hi")
    await gateway.replica.queue.emit([(claim.attempt, Segment(claim.request.id, 0, Finish("stop"), output))])
    assert (await call).json() == {"prompt": "hi"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("/tokenize", {"prompt": "x"}, "prompt"),
        ("/detokenize", {"tokens": [5]}, "tokens"),
    ],
)
async def test_a_prompt_that_a_replica_refuses_is_named_as_it_was_sent(
    gateway: Gateway, path: str, body: dict[str, Any], param: str
) -> None:
    call = asyncio.create_task(gateway.post(path, body))
    [claim] = await gateway.replica.next()
    await gateway.replica.say(claim, "", "error", code="InvalidPrompt", message="No.")
    response = await call
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_tokenize_needs_a_key(gateway: Gateway) -> None:
    for path in ("/tokenize", "/detokenize"):
        async with httpx.AsyncClient() as bare:
            response = await bare.post(gateway.address + path, json={"prompt": "x"})
        assert response.status_code == 401
