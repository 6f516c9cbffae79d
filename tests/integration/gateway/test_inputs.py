"""The endpoints of tasks that generate nothing: embeddings, rerank, score, classify, moderations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.integration.gateway.rig import MODEL, PROMPT_TOKENS, Gateway
from tidegate.gateway.dialects.inputs import INPUTS_A_REQUEST, MOST_INPUTS
from tidegate.messages.work import Embed, PairPrompt, Score, TextPrompt, TokenPrompt


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.address}/v1", api_key=gateway.key, max_retries=0
    ) as client:
        yield client


async def judged(gateway: Gateway, path: str, body: dict[str, Any], task: str) -> Any:
    """The answer to a call that a replica takes up."""
    await gateway.put_model(task=task)
    answering = asyncio.create_task(gateway.replica.answer_everything())
    response = await gateway.post(path, {"model": MODEL, **body})
    answering.cancel()
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("form", ["float", "base64", None])
async def test_embeddings_come_in_the_order_of_the_inputs(
    gateway: Gateway, client: openai.AsyncOpenAI, form: Any
) -> None:
    await gateway.put_model(task="embed")
    count = 2 * INPUTS_A_REQUEST + 3
    texts = [f"text {n}" for n in range(count)]
    asked: dict[str, Any] = {} if form is None else {"encoding_format": form}  # the client's own is base64
    call = asyncio.create_task(
        client.embeddings.create(
            model=MODEL, input=[f"text {n}" for n in range(count)], dimensions=2, **asked
        )
    )
    claims = await gateway.replica.next(3)
    for claim in reversed(claims):
        await gateway.replica.judge(claim)
    answer = await call
    if form != "base64":
        assert [each.embedding for each in answer.data] == [[float(n), 1.0] for n in range(count)]
    assert [each.index for each in answer.data] == list(range(count))
    assert answer.model == MODEL
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3 * PROMPT_TOKENS, 3 * PROMPT_TOKENS)
    works = [claim.request.work for claim in claims]
    assert all(isinstance(work, Embed) and work.dimensions == 2 for work in works)
    found = [item for work in works if isinstance(work, Embed) for item in work.prompt.items]
    assert found == [TextPrompt(text) for text in texts]


@pytest.mark.parametrize(
    ("given", "items"),
    [
        ("a", [TextPrompt("a")]),
        ([1, 2, 3], [TokenPrompt([1, 2, 3])]),
        ([[1, 2], [3]], [TokenPrompt([1, 2]), TokenPrompt([3])]),
    ],
)
async def test_inputs_of_every_form(gateway: Gateway, given: Any, items: list[Any]) -> None:
    await gateway.put_model(task="embed")
    body = {"model": MODEL, "input": given, "truncate_prompt_tokens": -1}
    call = asyncio.create_task(gateway.post("/v1/embeddings", body))
    [claim] = await gateway.replica.next()
    assert isinstance(claim.request.work, Embed)
    assert (claim.request.work.prompt.items, claim.request.work.truncate) == (items, -1)
    await gateway.replica.judge(claim)
    assert len((await call).json()["data"]) == len(items)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a"] * (MOST_INPUTS + 1)}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({}, "input"),
    ],
)
async def test_a_wrong_field_is_named(gateway: Gateway, body: dict[str, Any], param: str) -> None:
    await gateway.put_model(task="embed")
    response = await gateway.post("/v1/embeddings", {"model": MODEL, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("task", "path", "body", "right"),
    [
        ("embed", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "/v1/embeddings"),
        ("embed", "/v1/rerank", {"query": "a", "documents": ["b"]}, "/v1/embeddings"),
        ("score", "/v1/completions", {"prompt": "a"}, "/v1/rerank"),
        ("classify", "/v1/embeddings", {"input": "a"}, "/v1/classify"),
        ("generate", "/v1/embeddings", {"input": "a"}, "/v1/chat/completions"),
        ("text-generation", "/v1/moderations", {"input": "a"}, "/v1/chat/completions"),
    ],
)
async def test_a_wrong_endpoint_names_the_right_one(
    gateway: Gateway, task: str, path: str, body: dict[str, Any], right: str
) -> None:
    await gateway.put_model(task=task)
    response = await gateway.post(path, {"model": MODEL, **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "model", "wrong_task")
    assert right in error["message"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
async def test_a_ranking_begins_with_the_most_relevant(gateway: Gateway, path: str) -> None:
    body = {"query": "q", "documents": ["a", {"text": "b"}, "c"], "top_n": 2}
    answer = await judged(gateway, path, body, "score")
    assert answer["results"] == [
        {"index": 2, "relevance_score": 2.0, "document": {"text": "c"}},
        {"index": 1, "relevance_score": 1.0, "document": {"text": "b"}},
    ]
    bare = await judged(gateway, path, {**body, "return_documents": False}, "score")
    assert bare["results"][0] == {"index": 2, "relevance_score": 2.0}


@pytest.mark.parametrize(
    ("body", "pairs"),
    [
        ({"text_1": "q", "text_2": ["a", "b"]}, [("q", "a"), ("q", "b")]),
        ({"queries": ["q", "r"], "documents": ["a", "b"]}, [("q", "a"), ("r", "b")]),
        ({"data_1": "q", "data_2": "a"}, [("q", "a")]),
    ],
)
async def test_scores_come_in_order(gateway: Gateway, body: Any, pairs: list[tuple[str, str]]) -> None:
    await gateway.put_model(task="score")
    call = asyncio.create_task(gateway.post("/v1/score", {"model": MODEL, **body}))
    [claim] = await gateway.replica.next()
    assert isinstance(claim.request.work, Score)
    assert claim.request.work.prompt.items == [PairPrompt(*pair) for pair in pairs]
    await gateway.replica.judge(claim)
    data = (await call).json()["data"]
    assert data == [{"index": n, "object": "score", "score": float(n)} for n in range(len(pairs))]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": "q"}, "text_1"),
        ({}, "text_1"),
        ({"text_1": "q", "documents": "a"}, "text_1"),
        ({"queries": ["q", "r"], "documents": ["a"]}, "documents"),
        ({"text_1": ["q", ""], "text_2": ["a", "b"]}, "text_1[1]"),
    ],
)
async def test_sides_that_do_not_fit_are_refused(gateway: Gateway, body: Any, param: str) -> None:
    await gateway.put_model(task="score")
    response = await gateway.post("/v1/score", {"model": MODEL, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_classes_have_their_shares(gateway: Gateway) -> None:
    answer = await judged(gateway, "/v1/classify", {"input": ["a", "b"]}, "classify")
    assert answer["data"] == [
        {"index": 0, "label": "ok", "probs": [0.0, 0.25], "num_classes": 2},
        {"index": 1, "label": "bad", "probs": [1.0, 0.25], "num_classes": 2},
    ]


async def test_moderations_flag_what_holds_and_is_not_harmless(gateway: Gateway) -> None:
    body = {"input": ["a", {"type": "text", "text": "b"}], "threshold": 0.25}
    answer = await judged(gateway, "/v1/moderations", body, "classify")
    assert [each["flagged"] for each in answer["results"]] == [False, True]
    assert answer["results"][1]["categories"] == {"bad": True, "ok": True}
    assert answer["results"][1]["category_scores"] == {"bad": 1.0, "ok": 0.25}
