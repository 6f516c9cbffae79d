"""Ollama's `POST /api/embed`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import UNREAD, RequestBody, documented, says
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.embeddings import VECTOR, numbers_of, vectors
from tidegate.gateway.dialects.inputs import (
    MOST_INPUTS,
    TEXT_FORMS,
    Dimensions,
    InputCall,
    InputDialect,
    Text,
    input_list,
)
from tidegate.gateway.dialects.ollama import LATEST, OLLAMA
from tidegate.gateway.dialects.openai import encode
from tidegate.messages.work import Embed, Segment


class OllamaEmbedBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/embed`."""

    model: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=256,
            description="the name of a model that GET /api/tags lists, with :latest or without",
        ),
    ]
    input: Annotated[
        Text | Annotated[list[Text], Meta(min_length=1, max_length=MOST_INPUTS)],
        documented(f"a text, or a list of at most {MOST_INPUTS}; none of them empty", {"anyOf": TEXT_FORMS}),
    ]
    truncate: Annotated[
        bool | None, says("false: an input that is too long is refused; left out: its first tokens are kept")
    ] = None
    dimensions: Dimensions = None
    options: Annotated[Any, UNREAD] = None
    keep_alive: Annotated[Any, UNREAD] = None


class OllamaVectors(msgspec.Struct):
    """Durations are nanoseconds, as this gateway saw them."""

    model: str
    embeddings: list[Annotated[msgspec.Raw, Meta(extra_json_schema=VECTOR)]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbedCall(InputCall):
    def __init__(self, body: OllamaEmbedBody) -> None:
        self._began = time.perf_counter_ns()
        truncate = None if body.truncate is False else -1
        work = partial(Embed, dimensions=body.dimensions, truncate=truncate)
        super().__init__(body.model.removesuffix(LATEST), None, input_list(body.input), work)

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        numbers = [numbers_of(vector) for vector in vectors(choices)]
        took = time.perf_counter_ns() - self._began
        return encode(OllamaVectors(head.model, numbers, took, 0, usage.prompt_tokens))


OLLAMA_EMBED = InputDialect(
    "/api/embed",
    "ollama_embed",
    "embed",
    "ollama-",
    "Make vectors of texts, as Ollama",
    OllamaEmbedBody,
    OllamaVectors,
    "A vector for each input, in their order",
    OllamaEmbedCall,
    OLLAMA,
)
