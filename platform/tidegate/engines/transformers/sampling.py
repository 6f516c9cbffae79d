"""Chooses the next token of every row of a batch.

A pipeline of small steps, each over just the rows that ask for it:

    penalties -> temperature -> top_p -> inverse CDF at uniform(seed, position)

The cumulative distribution runs over the vocabulary in id order, so tiny differences in the logits (another
batch, another replica) move its borders by as little and almost never change the token. A batch of plain
greedy rows takes one `max` and one transfer to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidegate.engines.noise import uniform
from tidegate.messages.work import Sampling

GREEDY_BELOW = 1e-5  # a smaller temperature divides by almost nothing and picks the likeliest anyway


class Chooser:
    """How one request wants its tokens chosen, and what it has chosen so far."""

    __slots__ = (
        "counts",
        "frequency",
        "is_plain",
        "penalty",
        "position",
        "presence",
        "sampling",
        "seed",
        "temperature",
    )

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = sampling.seed
        self.temperature = sampling.temperature if sampling.temperature >= GREEDY_BELOW else 0.0
        self.presence = sampling.presence_penalty
        self.frequency = sampling.frequency_penalty
        self.position = 0  # index of the next generated token
        self.counts: dict[int, int] = {}  # of generated tokens, kept only where a penalty needs them
        self.penalty: Tensor | None = None  # [vocabulary], what is taken off the logits
        self.is_plain = not (
            self.temperature or self.presence or self.frequency or sampling.top_logprobs is not None
        )

    def accept(self, token: int, vocabulary: int, device: torch.device) -> None:
        """Count a generated token (also one from the log of an earlier attempt)."""
        self.position += 1
        if not self.presence and not self.frequency:
            return
        if self.penalty is None:
            self.penalty = torch.zeros(vocabulary, dtype=torch.float32, device=device)
        # Computed anew instead of added up: the same however many attempts it took.
        self.counts[token] = self.counts.get(token, 0) + 1
        self.penalty[token] = self.presence + self.frequency * self.counts[token]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token of each row, on the device and on the host, and whether its logits were finite."""

    tokens: Tensor  # [rows], int64
    ids: list[int]
    finite: list[int]
    logprobs: dict[int, tuple[float, list[tuple[int, float]]]]  # row -> (chosen, [(id, logprob), ...])


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> Chosen:
    """Choose from `logits` [rows, vocabulary], any float type. One transfer to the host, where no row asks
    for log probabilities."""
    best, tokens = logits.max(dim=-1)
    special = [row for row, chooser in enumerate(choosers) if not chooser.is_plain]
    logprobs: dict[int, tuple[float, list[tuple[int, float]]]] = {}
    if special:
        picked = pick(logits[special].float(), [choosers[row] for row in special])
        tokens[special] = picked
        asked = [row for row in special if choosers[row].sampling.top_logprobs is not None]
        if asked:
            counts = [choosers[row].sampling.top_logprobs or 0 for row in asked]
            logprobs = dict(zip(asked, token_logprobs(logits[asked], tokens[asked], counts), strict=True))
    ids, finite = torch.stack((tokens, torch.isfinite(best).to(tokens.dtype))).tolist()
    return Chosen(tokens, ids, finite, logprobs)


def pick(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Token ids [rows] from fp32 `logits` [rows, vocabulary], which may be overwritten."""
    for row, chooser in enumerate(choosers):
        if chooser.penalty is not None:
            logits[row] -= chooser.penalty
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, chooser in enumerate(choosers) if chooser.temperature]
    if drawn:
        tokens[drawn] = draw(logits[drawn], [choosers[row] for row in drawn])
    return tokens


def draw(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Sample each row of fp32 `logits` at its temperature, top_p, seed and position."""
    device = logits.device
    temperatures = torch.tensor([[chooser.temperature] for chooser in choosers], device=device)
    probabilities = torch.softmax(logits / temperatures, dim=-1)
    if any(chooser.sampling.top_p < 1 for chooser in choosers):
        top_p = torch.tensor([[chooser.sampling.top_p] for chooser in choosers], device=device)
        probabilities = keep_nucleus(probabilities, top_p)
    cumulative = probabilities.double().cumsum(dim=-1)
    noise = torch.tensor(
        [[uniform(chooser.seed, chooser.position)] for chooser in choosers],
        dtype=torch.float64,
        device=device,
    )
    # `right`: the first id whose sum is greater, so an id of probability 0 is never drawn.
    drawn = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True).squeeze(-1)
    return drawn.clamp_(max=logits.shape[-1] - 1)


def keep_nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the likeliest tokens that together reach `top_p` [rows, 1]; at least one stays.
    A row with top_p 1 is left as it is."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    dropped = (before >= top_p) & (top_p < 1)
    dropped[:, 0] = False
    return probabilities.masked_fill(torch.zeros_like(dropped).scatter_(-1, ids, dropped), 0.0)


def token_logprobs(
    logits: Tensor, tokens: Tensor, counts: Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Log probability of `tokens` [rows] under the raw `logits` [rows, vocabulary], and of the `counts[row]`
    likeliest tokens, before temperature, top_p and penalties."""
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
