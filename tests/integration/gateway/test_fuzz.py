"""Requests made from the OpenAPI document: whatever comes, the answer is one that the document names."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth

from tests.fuzzing import unfit_checks
from tests.in_thread import in_thread
from tests.integration.gateway.rig import MODEL, open_gateway
from tests.redis_server import RedisServer
from tidegate.gateway.dialects.embeddings import EMBEDDINGS
from tidegate.gateway.dialects.judging import JUDGING

EXAMPLES = 15  # per operation; a longer run is `schemathesis run http://.../openapi.json`
# The models are called by their tasks.
TASKS = {
    "EmbeddingBody": "embed",
    "OllamaEmbedBody": "embed",
    "RerankBody": "score",
    "ScoreBody": "score",
    "ClassifyBody": "classify",
    "ModerationBody": "classify",
}
ALL = list(HealthCheck)  # generating from a large schema is slow and filters much


@asynccontextmanager
async def serving_gateway(redis_url: str) -> AsyncIterator[tuple[str, str]]:
    """The address and a key of a gateway with a replica that answers everything."""
    async with open_gateway(redis_url, "fuzz-" + secrets.token_hex(4)) as gateway:
        replicas = [gateway.replica]
        for task in set(TASKS.values()):
            await gateway.put_model(name=task, task=task)
            replicas.append(await gateway.open_replica(model=task))
        answering = [asyncio.create_task(replica.answer_everything()) for replica in replicas]
        yield gateway.address, gateway.key
        for each in answering:
            each.cancel()


@pytest.fixture(scope="module")
def served(redis_server: RedisServer) -> Iterator[tuple[str, str]]:
    with in_thread(serving_gateway(redis_server.url)) as served:
        yield served


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{response_id}"),
    ("DELETE", "/v1/responses/{response_id}"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    ("GET", "/v1/responses/{response_id}/input_items"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    *(("POST", dialect.path) for dialect in (EMBEDDINGS, *JUDGING)),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
    ("POST", "/"),
    ("GET", "/info"),
    ("POST", "/api/chat"),
    ("POST", "/api/generate"),
    ("POST", "/api/embed"),
    ("POST", "/api/show"),
    ("GET", "/api/tags"),
    ("GET", "/api/ps"),
    ("GET", "/api/version"),
    ("GET", "/v1/requests/{call_id}/events"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/livez"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/metrics/engines"),
    ("GET", "/"),
]
# Operations that take no input have nothing to get wrong.
CASES = [(method, path, GenerationMode.POSITIVE) for method, path in OPERATIONS] + [
    (method, path, GenerationMode.NEGATIVE) for method, path in OPERATIONS if method == "POST" or "{" in path
]


def served_document(address: str) -> dict[str, Any]:
    """The document, with a model of the endpoint's task in place of any name, and of what only a compiler can
    tell, schemas and grammars, some that are right."""
    document: dict[str, Any] = httpx.get(f"{address}/openapi.json").json()
    bodies = document["components"]["schemas"]
    for body in (
        "ChatBody",
        "CompletionBody",
        "MessagesBody",
        "CountBody",
        "ResponsesBody",
        "OllamaChatBody",
        "OllamaGenerateBody",
    ):
        bodies[body]["properties"]["model"] = {"const": MODEL}
    for body, task in TASKS.items():
        bodies[body]["properties"]["model"] = {"const": task}
    for body in ("TokenizeBody", "DetokenizeBody", "TgiBody", "TgiStreamBody", "TgiEitherBody"):
        bodies[body]["properties"]["model"] = {"const": MODEL}
    schemas = {"enum": [None, {}, {"type": "object", "properties": {"a": {"type": "integer"}}}]}
    right = {"regex": "[ab]+", "grammar": 'start: "a"', "whitespace_pattern": "[ ]?"}
    bodies["JsonSchema"]["properties"]["schema"] = bodies["StructuredOutputs"]["properties"]["json"] = schemas
    bodies["ResponseFormat"]["properties"]["value"] = schemas
    for struct, field in (("JsonGrammar", "value"), ("NamedSchema", "schema"), ("JsonOutput", "schema")):
        bodies[struct]["properties"][field] = {"enum": schemas["enum"][1:]}
    bodies["RegexGrammar"]["properties"]["value"] = {"enum": [right["regex"]]}
    for body in ("OllamaChatBody", "OllamaGenerateBody"):
        bodies[body]["properties"]["format"] = {"enum": ["", "json", *schemas["enum"]]}
    for body in ("MessagesBody", "CountBody"):
        bodies[body]["properties"]["output_format"] = {"type": "null"}
    for name, value in right.items():
        bodies["StructuredOutputs"]["properties"][name] = {"enum": [None, value]}
    # One of them is right in a body, which the document leaves out.
    for body, one in (("ChatBody", "response_format"), ("CompletionBody", "structured_outputs")):
        for name in bodies[body]["properties"]:
            if name != one and name.startswith(("response_format", "structured_outputs", "guided_")):
                bodies[body]["properties"][name] = {"type": "null"}
    return document


def test_the_list_of_operations_is_complete(served: tuple[str, str]) -> None:
    paths = served_document(served[0])["paths"]
    assert {(method.upper(), path) for path in paths for method in paths[path]} == set(OPERATIONS)


@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")  # schemathesis does
@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_every_answer_is_a_documented_one(
    served: tuple[str, str], method: str, path: str, mode: GenerationMode
) -> None:
    address, key = served
    operation = schemathesis.openapi.from_dict(served_document(address))[path][method]
    statuses: list[int] = []

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=ALL
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        response = case.call_and_validate(
            base_url=address,
            headers={"authorization": f"Bearer {key}"},
            # It repeats the call "without" the key, but with these headers; test_http covers keys.
            excluded_checks=[ignored_auth, *unfit_checks(case)],
        )
        statuses.append(response.status_code)

    fuzz()
    assert statuses
    assert max(statuses) < 500
