"""Log probabilities of tokens under the raw logits, before all steps of `sampling`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate.engines.transformers.row_values import in_parts, likeliest, to_host

LogprobOf = tuple[float, list[int], list[float]]  # a chosen token's; the likeliest tokens, and theirs


class PrefillLogprobs:
    """Collects the log probabilities of `tokens` but the first, each after those before it, and of the `top`
    likeliest in its place. The logits come in parts."""

    def __init__(self, tokens: Sequence[int], top: int) -> None:
        self._following = tokens[1:]
        self._top = top
        self.values: list[LogprobOf] = []
        self.ranks: list[int] = []

    def take(self, logits: Tensor) -> None:
        """Take the next logits [tokens, vocabulary]; what follows the last token is not known."""
        following = self._following[len(self.values) : len(self.values) + len(logits)]
        if following:
            known, wanted = logits[: len(following)], torch.tensor(following, device=logits.device)
            self.values += token_logprobs(known, wanted, [self._top] * len(following))
            self.ranks += ranks(known, wanted)


def token_logprobs(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[LogprobOf]:
    """Return the log probability of `tokens` [rows] under the raw `logits` [rows, vocabulary], and of the
    `counts[row]` likeliest tokens, before all steps."""
    return list(entries(to_host(logprobs_of(logits, tokens, max(counts))), counts))


def logprobs_of(logits: Tensor, tokens: Tensor, most: int) -> list[Tensor]:
    """Return the log probabilities of `tokens` [rows], and [rows, most] of the likeliest and their ids."""
    most = min(most, logits.shape[-1])
    found: list[tuple[Tensor, ...]] = []
    for part in in_parts(range(len(tokens)), logits):
        at = slice(part[0], part[-1] + 1)
        values = torch.log_softmax(logits[at].float(), dim=-1)
        chosen = values.gather(-1, tokens[at].unsqueeze(-1)).squeeze(-1)
        found.append((chosen, *likeliest(values, most)))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def entries(found: Sequence[Any], counts: Sequence[int]) -> Iterator[LogprobOf]:
    """Put together what `logprobs_of` found, as lists."""
    for value, top, tokens, count in zip(*found, counts, strict=True):
        yield value, tokens[:count], top[:count]


def ranks(logits: Tensor, tokens: Tensor) -> list[int]:
    """Return the place of `tokens` [rows] in `logits` [rows, vocabulary]: 1 is the likeliest."""
    found: list[int] = (logits >= logits.gather(-1, tokens.unsqueeze(-1))).sum(dim=-1).tolist()
    return found
