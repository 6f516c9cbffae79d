"""Chooses the next token of every row of a batch.

A row passes the steps of `logit_steps.STEPS` that its request needs, in that order, and then the choice:

    logits -> AllowedTokens -> BadWords -> MinTokens -> LogitBias -> RepetitionPenalty -> Penalties
        -> ModelRules -> Grammar -> Temperature -> probabilities -> MinP -> TopK -> TopP
        -> inverse CDF at uniform(seed, position)

The cumulative distribution runs over the vocabulary in id order, so tiny differences in the logits (another
batch, another replica) move its borders by as little and almost never change the token. A row that needs no
step is greedy: a batch of those takes the greatest logits and one transfer to the host.

What a row gets is a function of its own logits and tokens, whatever runs beside it. Rows are worked on in
parts, of like rows and on CPU as many as stay in the cache; where `min_p`, `top_k` or `top_p` filter, only of
tokens that they may keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tidegate.engines.noise import uniforms
from tidegate.engines.transformers import logit_steps
from tidegate.engines.transformers.logit_steps import Left, MinP, Row, Temperature, TopK, TopP
from tidegate.engines.transformers.logprobs import LogprobOf, entries, logprobs_of
from tidegate.engines.transformers.row_values import (
    BLOCK,
    PILOT,
    Transfer,
    are_finite,
    column,
    greatest,
    in_blocks,
    in_parts,
    laid_left,
    pilots,
    places_of,
    rows_of,
    sent,
)

# What rounding may take: of the sum of all probabilities, of a logit.
ROUNDING, MARGIN = 1e-4, 1e-3
WORTH_NARROWING = 8192  # tokens: of fewer `top_p` judges all


@dataclass(frozen=True, slots=True)
class Chosen:
    """Holds the next token of each row, on the device and on the host, whether its logits were finite, and
    whether its grammar and the other steps left a token to choose."""

    tokens: Tensor  # [rows], int64
    ids: list[int]
    finite: list[int]
    open: list[int]
    logprobs: dict[int, LogprobOf]  # by row


class Choice:
    """What a step has chosen, where the host may not have seen it yet."""

    def __init__(self, logits: Tensor, rows: Sequence[Row], unseen: int = 0) -> None:
        """Choose from `logits` [rows, vocabulary], any float type. `unseen`: how many tokens were chosen for
        each row that are not among its `generated` yet; no step of it may depend on them (`FREE`)."""
        parts = [*in_parts(range(len(rows)), logits, key=lambda index: kind(rows[index]))]
        if len(parts) == 1:
            best, tokens = best_and_chosen(logits, rows, unseen)
        else:
            tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
            best = torch.empty(len(rows), dtype=logits.dtype, device=logits.device)
            for part in parts:
                at, some = places_of(part, logits), [rows[index] for index in part]
                best[at], tokens[at] = best_and_chosen(rows_of(logits, part), some, unseen)
        told = [tokens, are_finite(best)]
        self._asked = [index for index, row in enumerate(rows) if row.sampling.top_logprobs is not None]
        self._counts = [rows[index].sampling.top_logprobs or 0 for index in self._asked]
        if self._asked:
            of_asked, their_tokens = rows_of(logits, self._asked), tokens[places_of(self._asked, logits)]
            told += logprobs_of(of_asked, their_tokens, max(self._counts))
        self._may_be_closed = False
        if bound := [index for index, row in enumerate(rows) if Left in row.steps]:
            self._may_be_closed = True
            is_open = torch.ones(len(rows), dtype=torch.bool, device=logits.device)
            is_open[bound] = torch.stack([_left(rows[index]).is_open for index in bound])
            told.append(is_open)
        self.tokens = tokens  # [rows], int64, on the device
        self._transfer = Transfer(told)

    def read(self) -> Chosen:
        """Wait for it, and return it."""
        ids, finite, *found = self._transfer.lists()
        logprobs: dict[int, LogprobOf] = {}
        if self._asked:
            logprobs = dict(zip(self._asked, entries(found[:3], self._counts), strict=True))
        is_open = found[-1] if self._may_be_closed else [1] * len(ids)
        return Chosen(self.tokens, ids, finite, is_open, logprobs)


def best_and_chosen(logits: Tensor, rows: Sequence[Row], unseen: int) -> tuple[Tensor, Tensor]:
    """Return the greatest logit and the chosen token of each row; the rows are of one kind."""
    if kind(rows[0]) == GREEDY:
        return greatest(logits)
    values = logits.to(torch.float32, copy=True)
    return values.amax(dim=-1).to(logits.dtype), pick(values, rows, unseen)


def choose(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """Choose from `logits` [rows, vocabulary], any float type. One transfer to the host."""
    return Choice(logits, rows).read()


# Kinds of rows. Those of one kind are worked on together.
GREEDY, STEPPED, NARROWED_BEHIND, NARROWED_BEFORE = range(4)


def kind(row: Row) -> int:
    """Narrowed: of its tokens only those are worked on that its filters may keep, from before or behind
    `Temperature`."""
    steps = row.steps
    if not steps:
        return GREEDY
    if MinP in steps or TopK in steps:
        return NARROWED_BEFORE
    return NARROWED_BEHIND if TopP in steps else STEPPED


def _left(row: Row) -> Left:
    step = row.steps[Left]
    assert isinstance(step, Left)
    return step


def pick(values: Tensor, rows: Sequence[Row], unseen: int = 0) -> Tensor:
    """Choose token ids [rows] from fp32 logits [rows, vocabulary], which may be overwritten. The rows are of
    one kind."""
    ids: Tensor | None = None
    how = kind(rows[0])
    if values.is_cuda or (how == NARROWED_BEHIND and values.shape[-1] < WORTH_NARROWING):
        how = STEPPED  # on a device the number of what is left would have to be waited for
    for step in logit_steps.STEPS:
        if step is Temperature and how == NARROWED_BEFORE:
            values, ids = narrowed(values, least_logit(values, rows), -torch.inf)
        needed = {index: row.steps[step] for index, row in enumerate(rows) if step in row.steps}
        if len(needed) == len(rows):
            values = step.apply(values, list(needed.values()))
        elif needed:
            some = sent(torch.tensor(list(needed)), values.device)
            changed = step.apply(values.index_select(0, some), list(needed.values()))
            values.index_copy_(0, some, changed)
        if step is Temperature and how == NARROWED_BEHIND:
            values, ids = nucleus(values, rows)
    if how >= NARROWED_BEHIND:
        places = draw_filtered(values, rows, unseen)
        return places if ids is None else ids.gather(-1, places.unsqueeze(-1)).squeeze(-1)
    drawn = [index for index, row in enumerate(rows) if Temperature in row.steps]
    if len(drawn) == len(rows):
        return draw(values, rows, unseen)
    tokens = greatest(values)[1]
    if drawn:
        at = sent(torch.tensor(drawn), values.device)
        tokens[at] = draw(values.index_select(0, at), [rows[index] for index in drawn], unseen)
    return tokens


def narrowed(values: Tensor, least: Tensor, beyond: float) -> tuple[Tensor, Tensor | None]:
    """Leave out what of `values` [rows, vocabulary] is below `least` [rows, 1]: returns the others
    [rows, tokens], in id order and with `beyond` behind them, and their ids; None: all are there."""
    numbers = values.numpy()
    kept = numbers >= least.numpy()
    if 4 * np.count_nonzero(kept) > kept.size:
        return values, None
    some, places, is_taken = laid_left(numbers, kept, beyond)
    ids = np.zeros(some.shape, np.int64)
    ids[is_taken] = places % numbers.shape[-1]
    return torch.from_numpy(some), torch.from_numpy(ids)


def nucleus(probabilities: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
    """Narrow to tokens of which some `top_p` may keep. What the unlikely ones have together, every
    `PILOT`-th token tells well enough to guess the least that is kept; where that was too much, the bound
    that always holds is taken."""
    shares = column([row.sampling.top_p for row in rows], probabilities)
    some, count = pilots(probabilities, PILOT, ((1 - shares) / 2).numpy())
    if count.mean() < 0.7 * some.shape[-1]:  # too many stay (`narrowed`)
        return probabilities, None
    at = np.minimum(count, some.shape[-1] - 1)
    values, ids = narrowed(probabilities, torch.from_numpy(np.take_along_axis(some, at, axis=-1)), 0.0)
    if ids is None or (values.sum(dim=-1, keepdim=True) > shares + ROUNDING).all():
        return values, ids
    return narrowed(probabilities, least_probability(probabilities, rows), 0.0)


def least_logit(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return a logit [rows, 1] for each row that no token is below which its `min_p` and `top_k` keep: both
    judge tokens beside each other, so the sum of all is nothing to them.

    Of `top_k` it is the `top_k`-th of what is greatest in each block, as so many tokens are no smaller.
    """
    peaks = in_blocks(logits, -torch.inf).amax(dim=-1)
    margins = [
        row.sampling.temperature * math.log(row.sampling.min_p) - MARGIN if MinP in row.steps else -math.inf
        for row in rows
    ]
    least = peaks.amax(dim=-1, keepdim=True) + column(margins, logits)
    counts = [row.sampling.top_k or logits.shape[-1] for row in rows]
    most = max((count for count in counts if count <= peaks.shape[-1]), default=0)
    if most:
        ordered = peaks.topk(most, dim=-1).values
        last = ordered.gather(-1, torch.tensor([[min(count, most) - 1] for count in counts]))
        is_bound = torch.tensor([[count <= most] for count in counts])
        least = torch.where(is_bound, torch.maximum(least, last), least)
    return least


def least_probability(probabilities: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return a probability [rows, 1] for each row that no token is below which its `top_p` keeps: all that
    are below 1 / vocabulary of what need not be reached are together less than that."""
    vocabulary = probabilities.shape[-1]
    spare = [max(0.0, 1 - row.sampling.top_p - ROUNDING) / vocabulary for row in rows]
    return column(spare, probabilities)


def draw(probabilities: Tensor, rows: Sequence[Row], unseen: int = 0) -> Tensor:
    """Choose by the noise of each row's seed and position: a block, and a token of it."""
    blocks = in_blocks(probabilities, 0.0)
    sums = blocks.sum(dim=-1).double()
    ends = sums.cumsum(dim=-1)
    aim = noise_of(rows, ends, unseen) * ends[:, -1:]
    # `right`: the first one whose sum is greater, so an id of probability 0 is never drawn.
    block = torch.searchsorted(ends, aim, right=True).clamp_(max=ends.shape[-1] - 1)
    size = sums.gather(-1, block)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    # A share of the block, as its sum in float32 is not quite that of its tokens.
    share = (aim - ends.gather(-1, block) + size) / size
    place = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    last = (inside < inside[:, -1:]).sum(dim=-1, keepdim=True)  # of the block that is not of probability 0
    return (block * BLOCK + torch.minimum(place, last)).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def draw_filtered(probabilities: Tensor, rows: Sequence[Row], unseen: int = 0) -> Tensor:
    """As `draw`, but token by token: then it is nothing to the sums which tokens of probability 0 are left
    out. Returns places in `probabilities`."""
    ends = probabilities.cumsum(dim=-1, dtype=torch.double)
    place = torch.searchsorted(ends, noise_of(rows, ends, unseen) * ends[:, -1:], right=True)
    if place.max() == ends.shape[-1]:  # rounding brought it beyond the last one that is not 0
        place = torch.minimum(place, (ends < ends[:, -1:]).sum(dim=-1, keepdim=True))
    return place.squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def noise_of(rows: Sequence[Row], like: Tensor, unseen: int = 0) -> Tensor:
    seeds = [row.sampling.seed for row in rows]
    return column(uniforms(seeds, [len(row.generated) + unseen for row in rows]), like)
