"""What clients may send: the current OpenAI schema of chat completions and completions.

The structs are decoded by msgspec and are also the source of the OpenAPI document. Every field of OpenAI's
schema is here, in one of three groups:

- honoured: acts, and is checked here or in `checks`;
- advisory: taken and not acted on (`user`, `metadata`, `store: false`, ...);
- not honoured: refused unless null or a value that means the same as leaving it out (`NOT_HONOURED`).

A field that is in none of them is unknown and refused by name. Bounds are msgspec `Meta`, so that the
decoder enforces what the document says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_CHOICES = 128
MAX_STOP = 4
MAX_SEQUENCES = 1024  # prompts x n of one call
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
MAX_TOKENS = 1 << 24
INT64 = 1 << 63

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Advisory = Annotated[str, Meta(max_length=1024)]
MetadataKey = Annotated[str, Meta(max_length=64)]
MetadataValue = Annotated[str, Meta(max_length=512)]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """One part of a message's content. Other types than text are refused by `checks`, naming the part."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: Any = None
    audio: Any = None
    tool_calls: Any = None
    function_call: Any = None
    tool_call_id: Any = None


class GenerationBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat completions and completions share."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    user: Advisory | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=16)] | None = None
    safety_identifier: Advisory | None = None
    prompt_cache_key: Advisory | None = None
    store: Any = None
    service_tier: Any = None
    logit_bias: Any = None


class ChatBody(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionBody(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`. `prompt`: a text, texts, token ids, or lists of token ids."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None


@dataclass(frozen=True, slots=True)
class NotHonoured:
    """A field that does not act. null and `same_as_absent` pass, everything else is refused."""

    same_as_absent: tuple[Any, ...]
    remedy: str


_NO_TOOLS = "tools and functions are not supported; leave it out"
_TEXT_ONLY = "only text goes in and out; leave it out"
NOT_HONOURED: Mapping[str, NotHonoured] = {
    "audio": NotHonoured((), _TEXT_ONLY),
    "best_of": NotHonoured((1,), "choices are not ranked; use n and choose yourself"),
    "function_call": NotHonoured(("none", "auto"), _NO_TOOLS),
    "functions": NotHonoured(([],), _NO_TOOLS),
    "logit_bias": NotHonoured(({},), "token biases are not supported; leave it out"),
    "modalities": NotHonoured((["text"],), _TEXT_ONLY),
    "moderation": NotHonoured((), "moderation is not supported; leave it out"),
    "parallel_tool_calls": NotHonoured((True,), _NO_TOOLS),
    "prediction": NotHonoured((), "predicted outputs are not supported; leave it out"),
    "prompt_cache_options": NotHonoured((), "prompts are not cached; leave it out"),
    "prompt_cache_retention": NotHonoured(("in_memory",), "prompts are not cached; leave it out"),
    "reasoning_effort": NotHonoured(("none",), "reasoning is not steered; leave it out"),
    "response_format": NotHonoured(({"type": "text"},), 'only {"type": "text"} is supported; leave it out'),
    "service_tier": NotHonoured(("auto", "default"), "there is one tier; use auto or leave it out"),
    "store": NotHonoured((False,), "answers are not stored; use false or leave it out"),
    "suffix": NotHonoured(("",), "insertion is not supported; leave it out"),
    "tool_choice": NotHonoured(("none", "auto"), _NO_TOOLS),
    "tools": NotHonoured(([],), _NO_TOOLS),
    "verbosity": NotHonoured(("medium",), "verbosity is not steered; leave it out"),
    "web_search_options": NotHonoured((), "web search is not supported; leave it out"),
}

# What to send instead, by field: the remedy of a refusal and the description in the OpenAPI document.
HINTS: Mapping[str, str] = {
    "model": "the name of a model that GET /v1/models lists",
    "messages": "a list of at least one message with role and content",
    "messages.role": "one of system, developer, user, assistant",
    "messages.content": 'a text, or a list of parts {"type": "text", "text": ...}',
    "prompt": "a text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stream": "true or false",
    "stream_options": '{"include_usage": true} together with stream: true',
    "n": f"a whole number from 1 to {MAX_CHOICES}",
    "temperature": "a number from 0 (greedy) to 2; left out: 1",
    "top_p": "a number from 0 to 1; left out: 1",
    "seed": "a 64-bit whole number; choice k uses seed + k; left out: drawn at random",
    "stop": f"a non-empty text, or a list of at most {MAX_STOP} of them",
    "presence_penalty": "a number from -2 to 2; left out: 0",
    "frequency_penalty": "a number from -2 to 2; left out: 0",
    "max_tokens": "a whole number of tokens to generate at most",
    "max_completion_tokens": "tokens to generate at most, a whole number; left out: up to the context length",
    "logprobs": "chat: true or false; completions: a whole number from 0 to 5",
    "top_logprobs": "a whole number from 0 to 20, together with logprobs: true",
    "echo": "true or false",
    "user": "a text of at most 1024 characters (advisory: not acted on)",
    "metadata": "at most 16 pairs of texts (advisory: not acted on)",
    "safety_identifier": "a text of at most 1024 characters (advisory: not acted on)",
    "prompt_cache_key": "a text of at most 1024 characters (advisory: not acted on)",
}
