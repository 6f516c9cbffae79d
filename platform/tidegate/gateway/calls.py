"""From a checked body to the requests of one call. Pure, but for the ids and seeds it is handed."""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidegate.gateway.checks import chat_messages, check_sequences, prompt_list
from tidegate.gateway.schema import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody, GenerationBody
from tidegate.messages.work import ChatPrompt, Generate, Prompt, Request, Sampling, TextPrompt, TokenPrompt

SEED_MASK = (1 << 63) - 1
DEFAULT_OUTPUT_ESTIMATE = 256  # tokens charged at admission where the client set no limit
_CHARACTERS_PER_TOKEN = 4
_MESSAGE_OVERHEAD_TOKENS = 4  # role and separators of a chat template


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a call comes from and where it goes: what its requests share besides the sampling."""

    call_id: str
    tenant: str
    revision: str
    gateway: str
    created: float  # unix seconds
    deadline: float  # unix seconds


@dataclass(frozen=True, slots=True)
class Call:
    """What the client asked for, ready to become requests."""

    kind: str  # "chat" | "completion"
    model: str
    prompts: list[Prompt]
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None  # alternatives per token; None: no logprobs
    max_tokens: int | None
    echo: bool
    stop: tuple[str, ...]
    body: GenerationBody

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.n


def chat_call(body: ChatBody) -> Call:
    """Raises `InvalidRequest`."""
    return _call(
        "chat",
        body,
        [ChatPrompt(chat_messages(body.messages))],
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        max_tokens=body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
        echo=False,
    )


def completion_call(body: CompletionBody) -> Call:
    """Raises `InvalidRequest`."""
    prompts: list[Prompt] = [
        TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(prompt)
        for prompt in prompt_list(body.prompt)
    ]
    check_sequences(len(prompts), body.n or 1)
    return _call(
        "completion",
        body,
        prompts,
        logprobs=body.logprobs,
        max_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        echo=bool(body.echo),
    )


def build_requests(call: Call, origin: Origin, random_seed: int) -> list[Request]:
    """One request per prompt and choice, in OpenAI's order: all choices of the first prompt first."""
    body = call.body
    first_seed = random_seed if body.seed is None else body.seed
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    requests = []
    for prompt_index, prompt in enumerate(call.prompts):
        cost = estimated_tokens(prompt, call.max_tokens)
        for choice in range(call.n):
            index = prompt_index * call.n + choice
            sampling = Sampling(
                seed=(first_seed + index) & SEED_MASK,
                max_tokens=call.max_tokens,
                temperature=temperature,
                top_p=top_p,
                stop=call.stop,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                top_logprobs=call.logprobs,
                echo=call.echo,
            )
            requests.append(
                Request(
                    id=f"{origin.call_id}.{index}",
                    tenant=origin.tenant,
                    model=call.model,
                    revision=origin.revision,
                    gateway=origin.gateway,
                    created=origin.created,
                    deadline=origin.deadline,
                    priority=0,
                    cost=cost,
                    work=Generate(prompt, sampling),
                )
            )
    return requests


def estimated_tokens(prompt: Prompt, max_tokens: int | None) -> int:
    """Tokens charged at admission, input and output; the replica, which can count, corrects them."""
    output = DEFAULT_OUTPUT_ESTIMATE if max_tokens is None else max_tokens
    if isinstance(prompt, TokenPrompt):
        return len(prompt.token_ids) + output
    if isinstance(prompt, TextPrompt):
        return len(prompt.text) // _CHARACTERS_PER_TOKEN + 1 + output
    characters = sum([len(message["content"]) for message in prompt.messages])
    return characters // _CHARACTERS_PER_TOKEN + _MESSAGE_OVERHEAD_TOKENS * len(prompt.messages) + output


def new_id() -> str:
    """22 characters of A-Z, a-z, 0-9, - and _: 128 random bits."""
    return base64.urlsafe_b64encode(os.urandom(16))[:22].decode()


def new_seed() -> int:
    return random.getrandbits(63)


def _call(
    kind: str,
    body: GenerationBody,
    prompts: Sequence[Any],
    *,
    logprobs: int | None,
    max_tokens: int | None,
    echo: bool,
) -> Call:
    stop = body.stop
    options = body.stream_options
    return Call(
        kind=kind,
        model=body.model,
        prompts=list(prompts),
        n=body.n or 1,
        stream=bool(body.stream),
        include_usage=bool(options is not None and options.include_usage),
        logprobs=logprobs,
        max_tokens=max_tokens,
        echo=echo,
        stop=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        body=body,
    )
