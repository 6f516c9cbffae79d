"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import says
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.inputs import (
    Dimensions,
    InputBody,
    InputCall,
    InputDialect,
    InputField,
    InputUsage,
    input_list,
    input_usage,
    results,
)
from tidegate.gateway.dialects.openai import Flag, encode
from tidegate.messages.work import Embed, Segment

VECTOR: dict[str, Any] = {"type": "array", "items": {"type": "number"}}


class EmbeddingBody(InputBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/embeddings`."""

    input: InputField
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        says("float, or base64: little-endian numbers of 32 bits; left out: float"),
    ] = None
    dimensions: Dimensions = None
    # vLLM's.
    add_special_tokens: Flag = None
    # text-embeddings-inference's.
    prompt_name: Annotated[
        Annotated[str, Meta(max_length=256)] | None,
        says("the name of one of the checkpoint's prompts, which comes before each text"),
    ] = None


class Embedding(msgspec.Struct):
    """`embedding` as `encoding_format` says."""

    object: Literal["embedding"]
    index: int
    embedding: Annotated[msgspec.Raw, Meta(extra_json_schema={"anyOf": [VECTOR, {"type": "string"}]})]


class EmbeddingList(msgspec.Struct):
    id: str
    object: Literal["list"]
    created: int
    data: list[Embedding]
    model: str
    usage: InputUsage


class EmbeddingCall(InputCall):
    def __init__(self, body: EmbeddingBody) -> None:
        items = input_list(body.input, add_special_tokens=body.add_special_tokens is not False)
        work = partial(
            Embed,
            dimensions=body.dimensions,
            truncate=body.truncate_prompt_tokens,
            prompt_name=body.prompt_name or "",
        )
        super().__init__(body.model, body.user, items, work)
        self._is_base64 = body.encoding_format == "base64"

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        data = [
            Embedding("embedding", index, text_of(vector) if self._is_base64 else numbers_of(vector))
            for index, vector in enumerate(vectors(choices))
        ]
        return encode(EmbeddingList(head.call_id, "list", head.created, data, head.model, input_usage(usage)))


def vectors(choices: Sequence[Sequence[Segment]]) -> Iterator[bytes]:
    for result in results(choices):
        size = 4 * result.dimensions
        for start in range(0, len(result.values), size):
            yield result.values[start : start + size]


def text_of(vector: bytes) -> msgspec.Raw:
    return msgspec.Raw(encode(base64.b64encode(vector).decode()))


def numbers_of(vector: bytes) -> msgspec.Raw:
    """Write one vector. All of a call at once would hold the GIL, and so the event loop, until the last."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return msgspec.Raw(encode(numbers.tolist()))


EMBEDDINGS = InputDialect(
    "/v1/embeddings",
    "create_embedding",
    "embed",
    "embd-",
    "Make vectors of texts",
    EmbeddingBody,
    EmbeddingList,
    "A vector for each input, in their order",
    EmbeddingCall,
)
