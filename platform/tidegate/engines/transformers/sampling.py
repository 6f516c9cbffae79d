"""Chooses the next token of every row of a batch.

A row passes the steps of `STEPS` that its request needs, in that order, and then the choice:

    logits -> Penalties -> Temperature -> probabilities -> TopP -> inverse CDF at uniform(seed, position)

The cumulative distribution runs over the vocabulary in id order, so tiny differences in the logits (another
batch, another replica) move its borders by as little and almost never change the token. A row that needs no
step is greedy: a batch of those takes one `max` and one transfer to the host.

A new parameter is a field of `Sampling` and a step. Steps before `Temperature` see logits, steps after it
probabilities, which need not sum to 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tidegate.engines.noise import uniform
from tidegate.messages.work import Sampling

GREEDY_BELOW = 1e-5  # a smaller temperature divides by almost nothing and picks the likeliest anyway


class LogitStep(ABC):
    """One instance serves one request. It may keep state, as long as that follows from `generated`: the
    request's own list, which grows, and which on another replica begins with what was generated here."""

    def __init__(self, sampling: Sampling, generated: Sequence[int]) -> None:
        self.sampling = sampling
        self.generated = generated

    @staticmethod
    @abstractmethod
    def is_needed(sampling: Sampling) -> bool: ...

    @classmethod
    @abstractmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        """Change `values` [rows, vocabulary], fp32, one row per instance; in place or not."""


class Penalties(LogitStep):
    """Lowers the logits of tokens that were generated, by their number and because they were at all."""

    def __init__(self, sampling: Sampling, generated: Sequence[int]) -> None:
        super().__init__(sampling, generated)
        self._counts: dict[int, int] = {}
        self._counted = 0  # tokens of `generated`
        self._penalties: Tensor | None = None  # [vocabulary]

    @staticmethod
    def is_needed(sampling: Sampling) -> bool:
        return bool(sampling.presence_penalty or sampling.frequency_penalty)

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        for row, step in zip(values, steps, strict=True):
            row.sub_(step._up_to_date(row))
        return values

    def _up_to_date(self, row: Tensor) -> Tensor:
        if self._penalties is None:
            self._penalties = torch.zeros_like(row)
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        for token in self.generated[self._counted :]:
            count = self._counts[token] = self._counts.get(token, 0) + 1
            # Computed anew instead of added up: the same however many attempts it took.
            self._penalties[token] = presence + frequency * count
        self._counted = len(self.generated)
        return self._penalties


class Temperature(LogitStep):
    """Turns logits into probabilities. Rows without it take the likeliest token."""

    @staticmethod
    def is_needed(sampling: Sampling) -> bool:
        return sampling.temperature >= GREEDY_BELOW

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        temperatures = column([step.sampling.temperature for step in steps], values)
        return torch.softmax(values.div_(temperatures), dim=-1)


class TopP(LogitStep):
    """Zeroes all but the likeliest tokens that together reach `top_p`; at least one stays."""

    @staticmethod
    def is_needed(sampling: Sampling) -> bool:
        return Temperature.is_needed(sampling) and sampling.top_p < 1

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        ordered, ids = values.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        dropped = before >= column([step.sampling.top_p for step in steps], values)
        dropped[:, 0] = False
        return values.masked_fill_(torch.zeros_like(dropped).scatter_(-1, ids, dropped), 0.0)


STEPS: tuple[type[LogitStep], ...] = (Penalties, Temperature, TopP)


class Chooser:
    """Holds how one request wants its tokens chosen. `generated` is what it has generated so far: the list
    that its sequence appends to."""

    __slots__ = ("generated", "sampling", "steps")

    def __init__(self, sampling: Sampling, generated: Sequence[int]) -> None:
        self.sampling = sampling
        self.generated = generated
        self.steps = {step: step(sampling, generated) for step in STEPS if step.is_needed(sampling)}


@dataclass(frozen=True, slots=True)
class Chosen:
    """Holds the next token of each row, on the device and on the host, and whether its logits were finite."""

    tokens: Tensor  # [rows], int64
    ids: list[int]
    finite: list[int]
    logprobs: dict[int, tuple[float, list[tuple[int, float]]]]  # row -> (chosen, [(id, logprob), ...])


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> Chosen:
    """Choose from `logits` [rows, vocabulary], any float type. One transfer to the host, where no row asks
    for log probabilities."""
    best, tokens = logits.max(dim=-1)
    if rows := [row for row, chooser in enumerate(choosers) if chooser.steps]:
        tokens[rows] = pick(logits[rows].float(), [choosers[row] for row in rows])
    logprobs: dict[int, tuple[float, list[tuple[int, float]]]] = {}
    if asked := {
        row: count
        for row, chooser in enumerate(choosers)
        if (count := chooser.sampling.top_logprobs) is not None
    }:
        rows = list(asked)
        values = token_logprobs(logits[rows], tokens[rows], list(asked.values()))
        logprobs = dict(zip(rows, values, strict=True))
    ids, finite = torch.stack((tokens, torch.isfinite(best).to(tokens.dtype))).tolist()
    return Chosen(tokens, ids, finite, logprobs)


def pick(values: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Choose token ids [rows] from fp32 logits [rows, vocabulary], which may be overwritten."""
    for step in STEPS:
        mine = {row: chooser.steps[step] for row, chooser in enumerate(choosers) if step in chooser.steps}
        if len(mine) == len(choosers):
            values = step.apply(values, list(mine.values()))
        elif mine:
            rows = list(mine)
            values[rows] = step.apply(values[rows], list(mine.values()))
    drawn = [row for row, chooser in enumerate(choosers) if Temperature in chooser.steps]
    if len(drawn) == len(choosers):
        return draw(values, choosers)
    tokens = values.argmax(dim=-1)
    if drawn:
        tokens[drawn] = draw(values[drawn], [choosers[row] for row in drawn])
    return tokens


def draw(probabilities: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Choose by the noise of each row's seed and position."""
    cumulative = probabilities.double().cumsum(dim=-1)
    noise = column(
        [uniform(chooser.sampling.seed, len(chooser.generated)) for chooser in choosers], cumulative
    )
    # `right`: the first id whose sum is greater, so an id of probability 0 is never drawn.
    drawn = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True).squeeze(-1)
    return drawn.clamp_(max=probabilities.shape[-1] - 1)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Make a tensor [rows, 1] of one value per row, in the type and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


def token_logprobs(
    logits: Tensor, tokens: Tensor, counts: Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return the log probability of `tokens` [rows] under the raw `logits` [rows, vocabulary], and of the
    `counts[row]` likeliest tokens, before all steps."""
    values = torch.log_softmax(logits.float(), dim=-1)
    chosen = values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
    most = min(max(counts), values.shape[-1])
    if most == 0:
        return [(value, []) for value in chosen]
    top_values, top_ids = (part.tolist() for part in values.topk(most, dim=-1))
    return [
        (chosen[row], list(zip(top_ids[row][:count], top_values[row][:count], strict=True)))
        for row, count in enumerate(counts)
    ]
