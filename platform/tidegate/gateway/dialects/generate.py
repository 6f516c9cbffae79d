"""The work of a call that generates text: each prompt `n` times, under one sampling."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from tidegate.gateway.constraints import Constraint
from tidegate.gateway.dialects.base import Ask
from tidegate.messages.work import Generate, Prompt, Sampling, TextPrompt, TokenPrompt

SEED_MASK = (1 << 63) - 1
MOST_STOPS = 16  # stop strings of one answer; OpenAI's API has a bound of its own
DEFAULT_OUTPUT_ESTIMATE = 256  # tokens charged at admission where the client set no limit
_CHARACTERS_PER_TOKEN = 4
_MESSAGE_OVERHEAD_TOKENS = 4  # role and separators of a chat template


class OneAnswer:
    """A call with one prompt and one answer, as every protocol but OpenAI's has them."""

    n = 1
    prompt_field = "messages"

    def __init__(
        self,
        model: str,
        prompt: Prompt,
        sampling: Sampling,
        *,
        seed: int | None,
        is_streamed: bool,
        constraint: Constraint | None = None,
        schemas: Sequence[Constraint] = (),
    ) -> None:
        self.model = model
        self.constraint = constraint
        self.schemas = schemas
        self.is_streamed = is_streamed
        self.user = ""
        self._prompt = prompt
        self._sampling = sampling
        self._seed = seed

    def follow(self, grammar: str) -> None:
        self._sampling = replace(self._sampling, grammar=grammar)

    def asks(self, random_seed: int) -> list[Ask]:
        # The prompt may be large, and the call lives as long as its answer.
        prompt, self._prompt = self._prompt, TextPrompt("")
        return generate_asks([prompt], 1, self._sampling, self._seed, random_seed)


def generate_asks(
    prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int | None, random_seed: int
) -> list[Ask]:
    """All choices of the first prompt first. Choice k of every prompt uses `seed` + k, so that a prompt has
    the same answers in any company; without a seed no two of the call share one."""
    asks = []
    for place, prompt in enumerate(prompts):
        first_seed = random_seed + place * n if seed is None else seed
        cost = estimated_tokens(prompt, sampling.max_tokens)
        for choice in range(n):
            own = replace(sampling, seed=(first_seed + choice) & SEED_MASK)
            asks.append(Ask(Generate(prompt, own), cost))
    return asks


def estimated_tokens(prompt: Prompt, max_tokens: int | None) -> int:
    """Tokens charged at admission, input and output; the replica, which can count, corrects them."""
    output = DEFAULT_OUTPUT_ESTIMATE if max_tokens is None else max_tokens
    if isinstance(prompt, TokenPrompt):
        return len(prompt.token_ids) + output
    if isinstance(prompt, TextPrompt):
        return len(prompt.text) // _CHARACTERS_PER_TOKEN + 1 + output
    characters = sum([len(message["content"]) for message in prompt.messages])
    if prompt.tools:
        characters += len(msgspec.json.encode(prompt.tools))
    return characters // _CHARACTERS_PER_TOKEN + _MESSAGE_OVERHEAD_TOKENS * len(prompt.messages) + output
