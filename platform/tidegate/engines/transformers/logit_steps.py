"""The steps that the logits of a row pass before its next token is chosen (`sampling`).

A new parameter is a field of `Sampling` and a step. Steps before `Temperature` see logits, steps after it
probabilities, which need not sum to 1. One that filters is in `sampling.kind` and in a bound of what it keeps
(`sampling.least_logit`, `least_probability`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from tidegate.engines.transformers.generation_rules import Rules
from tidegate.engines.transformers.grammars import Matcher, allowed_tokens
from tidegate.engines.transformers.row_values import (
    column,
    joined,
    keep_share,
    named_places,
    renormalized,
    sent,
    zeroed_below,
)
from tidegate.messages.work import Sampling

LEAST_PENALTY = 1e-9  # by which a logit is divided: one of 0 or a smaller one would make it infinite
GREEDY_BELOW = 1e-5  # a smaller temperature divides by almost nothing and picks the likeliest anyway


class Row(Protocol):
    """A request as steps see it. `generated` grows; `steps` are its `needed_steps`."""

    @property
    def sampling(self) -> Sampling: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def end_ids(self) -> Collection[int]: ...
    @property
    def bad_words(self) -> Sequence[Sequence[int]]: ...
    @property
    def rules(self) -> Rules | None: ...
    @property
    def matcher(self) -> Matcher | None: ...
    @property
    def generated(self) -> Sequence[int]: ...
    @property
    def steps(self) -> Mapping[type[LogitStep], LogitStep]: ...


class LogitStep(ABC):
    """One instance serves one row. Its state follows from the row's tokens, as another replica makes it anew.
    It must not keep the row: a cycle stays in memory until the collector runs."""

    def __init__(self, row: Row) -> None:
        self.sampling = row.sampling
        self.generated = row.generated

    @staticmethod
    @abstractmethod
    def is_needed(row: Row) -> bool: ...

    @classmethod
    @abstractmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        """Change `values` [rows, vocabulary], fp32, one row per instance; in place or not."""


class AllowedTokens(LogitStep):
    """Rules out all tokens but the named ones."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._ids = array("q", row.sampling.allowed_token_ids)

    @staticmethod
    def is_needed(row: Row) -> bool:
        return bool(row.sampling.allowed_token_ids)

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        flat, places = named_places(values, [step._ids for step in steps])
        kept = flat[places]
        values.fill_(-torch.inf)
        flat[places] = kept
        return values


class BadWords(LogitStep):
    """Rules out the token that would complete a word."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._alone = [word[0] for word in row.bad_words if len(word) == 1]
        self._words = [tuple(word) for word in row.bad_words if len(word) > 1]
        self._longest = max(map(len, self._words), default=1) - 1  # tokens before a last one

    @staticmethod
    def is_needed(row: Row) -> bool:
        return bool(row.sampling.bad_words)

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        vocabulary = values.shape[-1]
        flat, places = named_places(values, [step._completing(vocabulary) for step in steps])
        flat[places] = -torch.inf
        return values

    def _completing(self, vocabulary: int) -> array[int]:
        before = tuple(self.generated[-self._longest :]) if self._words else ()
        found = [word[-1] for word in self._words if before[1 - len(word) :] == word[:-1]]
        return array("q", [token for token in (*self._alone, *found) if token < vocabulary])


class MinTokens(LogitStep):
    """Rules out the tokens that end the answer until it has `min_tokens`."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._end_ids = sorted(row.end_ids)

    @staticmethod
    def is_needed(row: Row) -> bool:
        return row.sampling.min_tokens > 0

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        vocabulary = values.shape[-1]
        flat, places = named_places(values, [step._too_early(vocabulary) for step in steps])
        flat[places] = -torch.inf
        return values

    def _too_early(self, vocabulary: int) -> array[int]:
        is_early = len(self.generated) < self.sampling.min_tokens
        return array("q", [token for token in self._end_ids if token < vocabulary] if is_early else [])


class LogitBias(LogitStep):
    """Adds a number to the logits of named tokens."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._ids = array("q", [token for token, _ in row.sampling.logit_bias])
        self._biases = array("f", [bias for _, bias in row.sampling.logit_bias])

    @staticmethod
    def is_needed(row: Row) -> bool:
        return bool(row.sampling.logit_bias)

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        flat, places = named_places(values, [step._ids for step in steps])
        flat[places] += joined([step._biases for step in steps], values)
        return values


class RepetitionPenalty(LogitStep):
    """Divides the positive logits of tokens of prompt and answer, and multiplies the negative ones
    (Keskar et al., arXiv 1909.05858)."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._seen = set(row.prompt)
        self._ids = array("q", self._seen)
        self._counted = 0  # tokens of `generated`

    @staticmethod
    def is_needed(row: Row) -> bool:
        return row.sampling.repetition_penalty != 1

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        ids = [step._up_to_date() for step in steps]
        flat, places = named_places(values, ids)
        each = [step.sampling.repetition_penalty for step in steps]
        bounded = np.clip(each, LEAST_PENALTY, 1 / LEAST_PENALTY).astype(np.float32)
        penalties = np.repeat(bounded, [len(tokens) for tokens in ids])
        penalty, found = sent(torch.from_numpy(penalties), values.device), flat[places]
        flat[places] = torch.where(found > 0, found / penalty, found * penalty)
        return values

    def _up_to_date(self) -> array[int]:
        for token in self.generated[self._counted :]:
            if token not in self._seen:
                self._seen.add(token)
                self._ids.append(token)
        self._counted = len(self.generated)
        return self._ids


class Penalties(LogitStep):
    """Lowers the logits of tokens that were generated, by their number and because they were at all."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._counts: dict[int, int] = {}
        self._places: dict[int, int] = {}  # of a token in the two that follow
        self._ids, self._penalties = array("q"), array("f")
        self._counted = 0  # tokens of `generated`

    @staticmethod
    def is_needed(row: Row) -> bool:
        return bool(row.sampling.presence_penalty or row.sampling.frequency_penalty)

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        flat, places = named_places(values, [step._up_to_date() for step in steps])
        flat[places] -= joined([step._penalties for step in steps], values)
        return values

    def _up_to_date(self) -> array[int]:
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        for token in self.generated[self._counted :]:
            count = self._counts[token] = self._counts.get(token, 0) + 1
            if count == 1:
                self._places[token] = len(self._ids)
                self._ids.append(token)
                self._penalties.append(0.0)
            # Computed anew instead of added up: the same however many attempts it took.
            self._penalties[self._places[token]] = presence + frequency * count
        self._counted = len(self.generated)
        return self._ids


class ModelRules(LogitStep):
    """Applies what the model's generation config rules for every answer."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._prompt = list(row.prompt)
        self._rules = row.rules

    @staticmethod
    def is_needed(row: Row) -> bool:
        return row.rules is not None

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        for index, step in enumerate(steps):
            assert step._rules is not None
            ids = torch.tensor([[*step._prompt, *step.generated]], dtype=torch.long, device=values.device)
            values[index] = step._rules(ids, values[index : index + 1])[0]
        return values


class Grammar(LogitStep):
    """Rules out what does not go on in the row's grammar."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        assert row.matcher is not None
        self._matcher = row.matcher

    @staticmethod
    def is_needed(row: Row) -> bool:
        return row.matcher is not None

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        allowed = allowed_tokens([step._matcher for step in steps], values)
        return values.masked_fill_(allowed.logical_not_(), -torch.inf)


class Left(LogitStep):
    """Tells whether those before it leave any token: a row of none chooses anything and is not to be
    `open`."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.is_open: Tensor  # [], bool, of the last choice

    @staticmethod
    def is_needed(row: Row) -> bool:
        may_clash = BadWords.is_needed(row) or MinTokens.is_needed(row) or ModelRules.is_needed(row)
        return Grammar.is_needed(row) or (AllowedTokens.is_needed(row) and may_clash)

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        is_open = values.amax(dim=-1) > -torch.inf
        for step, found in zip(steps, is_open, strict=True):
            step.is_open = found
        return values.masked_fill_(is_open.logical_not().unsqueeze(-1), 0.0)


class Temperature(LogitStep):
    """Turns logits into probabilities. Rows without it take the likeliest token."""

    @staticmethod
    def is_needed(row: Row) -> bool:
        return row.sampling.temperature >= GREEDY_BELOW

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        temperatures = [step.sampling.temperature for step in steps]
        if any(temperature != 1 for temperature in temperatures):
            values.div_(column(temperatures, values))
        return torch.softmax(values, dim=-1)


class MinP(LogitStep):
    """Zeroes tokens that are less likely than `min_p` of the likeliest one."""

    @staticmethod
    def is_needed(row: Row) -> bool:
        return Temperature.is_needed(row) and row.sampling.min_p > 0

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        shares = column([step.sampling.min_p for step in steps], values)
        return renormalized(zeroed_below(values, shares * values.amax(-1, keepdim=True)))


class TopK(LogitStep):
    """Zeroes all but the `top_k` likeliest tokens; those as likely as the last of them stay."""

    @staticmethod
    def is_needed(row: Row) -> bool:
        return Temperature.is_needed(row) and row.sampling.top_k > 0

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        counts = [min(step.sampling.top_k, values.shape[-1]) for step in steps]
        likeliest = values.topk(max(counts), dim=-1).values
        last = likeliest.gather(-1, sent(torch.tensor(counts), values.device).unsqueeze(-1) - 1)
        return renormalized(zeroed_below(values, last))


class TopP(LogitStep):
    """Zeroes all but the likeliest tokens that together reach `top_p`; at least one stays. Of tokens that are
    equally likely those with the lower ids stay."""

    @staticmethod
    def is_needed(row: Row) -> bool:
        return Temperature.is_needed(row) and row.sampling.top_p < 1

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        shares = column([step.sampling.top_p for step in steps], values)
        return keep_share(values, shares)


STEPS: tuple[type[LogitStep], ...] = (
    AllowedTokens,
    BadWords,
    MinTokens,
    LogitBias,
    RepetitionPenalty,
    Penalties,
    ModelRules,
    Grammar,
    Left,
    Temperature,
    MinP,
    TopK,
    TopP,
)

# What is the same whatever tokens the row has got.
FREE: frozenset[type[LogitStep]] = frozenset({AllowedTokens, LogitBias, Temperature, MinP, TopK, TopP})

# What may leave out a token that a grammar would have next.
RULING_OUT = frozenset({AllowedTokens, BadWords, LogitBias, ModelRules})


def needed_steps(row: Row) -> dict[type[LogitStep], LogitStep]:
    return {step: step(row) for step in STEPS if step.is_needed(row)}
