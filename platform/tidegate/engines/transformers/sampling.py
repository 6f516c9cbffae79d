"""Chooses the next token of every row of a batch.

A row passes the steps of `STEPS` that its request needs, in that order, and then the choice:

    logits -> AllowedTokens -> BadWords -> MinTokens -> LogitBias -> RepetitionPenalty -> Penalties
        -> ModelRules -> Grammar -> Temperature -> probabilities -> MinP -> TopK -> TopP
        -> inverse CDF at uniform(seed, position)

The cumulative distribution runs over the vocabulary in id order, so tiny differences in the logits (another
batch, another replica) move its borders by as little and almost never change the token. A row that needs no
step is greedy: a batch of those takes the greatest logits and one transfer to the host.

What a row gets is a function of its own logits and tokens, whatever runs beside it. Rows are worked on in
parts, of like rows and on CPU as many as stay in the cache; where `min_p`, `top_k` or `top_p` filter, only of
tokens that they may keep.

A new parameter is a field of `Sampling` and a step. Steps before `Temperature` see logits, steps after it
probabilities, which need not sum to 1. One that filters is in `kind` and in a bound of what it keeps
(`least_logit`, `least_probability`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from tidegate.engines.noise import uniform
from tidegate.engines.transformers.generation_rules import Rules
from tidegate.engines.transformers.grammars import Matcher, allowed_tokens
from tidegate.messages.work import Sampling

# Of float32 logits that are worked on at once: log probabilities of them, or their values sorted, take a few
# times as much.
LOGITS_BYTES = 64 << 20
CACHE_BYTES = 2 << 20  # as many on CPU where nothing has to be read twice from memory
BLOCK = 64  # tokens that are summed up, or of which the greatest is found, before all of them are
# What rounding may take: of the sum of all probabilities, of a logit.
ROUNDING, MARGIN = 1e-4, 1e-3
PILOT = 32
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
        penalties = np.repeat(np.array(each, np.float32), [len(tokens) for tokens in ids])
        penalty, found = torch.from_numpy(penalties).to(values.device), flat[places]
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
    """Rules out what does not go on in the row's grammar. Behind all other steps of its kind, so that it sees
    where they leave nothing: such a row chooses anything and is not to be `open`."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        assert row.matcher is not None
        self._matcher = row.matcher
        self.is_open: Tensor  # [], bool, of the last choice

    @staticmethod
    def is_needed(row: Row) -> bool:
        return row.matcher is not None

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        allowed = allowed_tokens([step._matcher for step in steps], values)
        values.masked_fill_(allowed.logical_not_(), -torch.inf)
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
        last = likeliest.gather(-1, torch.tensor(counts, device=values.device).unsqueeze(-1) - 1)
        return renormalized(zeroed_below(values, last))


class TopP(LogitStep):
    """Zeroes all but the likeliest tokens that together reach `top_p`; at least one stays. Of tokens that are
    equally likely those with the lower ids stay."""

    @staticmethod
    def is_needed(row: Row) -> bool:
        return Temperature.is_needed(row) and row.sampling.top_p < 1

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        ordered = descending(values)
        before = ordered.cumsum(dim=-1) - ordered
        is_within = before < column([step.sampling.top_p for step in steps], values)
        count = is_within.sum(dim=-1, keepdim=True).clamp_(min=1)
        last = ordered.gather(-1, count - 1)
        surplus = (ordered >= last).sum(dim=-1, keepdim=True) - count
        values = zeroed_below(values, last)
        if values.is_cuda or surplus.any():  # asking a device would wait for it
            tied = values == last
            values.mul_(
                (tied & (tied.cumsum(dim=-1) > tied.sum(dim=-1, keepdim=True) - surplus)).logical_not_()
            )
        return values


STEPS: tuple[type[LogitStep], ...] = (
    AllowedTokens,
    BadWords,
    MinTokens,
    LogitBias,
    RepetitionPenalty,
    Penalties,
    ModelRules,
    Grammar,
    Temperature,
    MinP,
    TopK,
    TopP,
)


# What may leave out a token that a grammar would have next.
RULING_OUT = frozenset({AllowedTokens, BadWords, LogitBias, ModelRules})


def needed_steps(row: Row) -> dict[type[LogitStep], LogitStep]:
    return {step: step(row) for step in STEPS if step.is_needed(row)}


LogprobOf = tuple[float, list[tuple[int, float]]]  # a chosen token's, [(id, logprob), ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Holds the next token of each row, on the device and on the host, whether its logits were finite, and
    whether its grammar and the other steps left a token to choose."""

    tokens: Tensor  # [rows], int64
    ids: list[int]
    finite: list[int]
    open: list[int]
    logprobs: dict[int, LogprobOf]  # by row


def choose(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """Choose from `logits` [rows, vocabulary], any float type. One transfer to the host."""
    tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    best = torch.empty(len(rows), dtype=logits.dtype, device=logits.device)
    for part in in_parts(range(len(rows)), logits, key=lambda index: kind(rows[index])):
        values = rows_of(logits, part)
        at = places_of(part, logits)
        if kind(rows[part[0]]) == GREEDY:
            best[at], tokens[at] = greatest(values)
        else:
            values = values.to(torch.float32, copy=True)
            best[at] = values.amax(dim=-1).to(best.dtype)
            tokens[at] = pick(values, [rows[index] for index in part])
    told = [tokens, torch.isfinite(best)]
    if asked := [index for index, row in enumerate(rows) if row.sampling.top_logprobs is not None]:
        most = max(rows[index].sampling.top_logprobs or 0 for index in asked)
        told += logprobs_of(rows_of(logits, asked), tokens[places_of(asked, logits)], most)
    if bound := [index for index, row in enumerate(rows) if Grammar in row.steps]:
        is_open = torch.ones(len(rows), dtype=torch.bool, device=logits.device)
        is_open[bound] = torch.stack([_grammar(rows[index]).is_open for index in bound])
        told.append(is_open)
    ids, finite, *found = to_host(told)
    logprobs: dict[int, LogprobOf] = {}
    if asked:
        counts = [rows[index].sampling.top_logprobs or 0 for index in asked]
        logprobs = dict(zip(asked, entries(found[:3], counts), strict=True))
    return Chosen(tokens, ids, finite, found[-1] if bound else [1] * len(ids), logprobs)


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


def in_parts(rows: Iterable[int], logits: Tensor, *, key: Any = None) -> Iterator[list[int]]:
    """Split rows by their `key`, and each into as many as are worked on at once."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(key(row) if key is not None else 0, []).append(row)
    size = rows_at_once(logits.shape[-1])
    if not logits.is_cuda:
        size = max(1, min(size, CACHE_BYTES // (torch.float32.itemsize * logits.shape[-1])))
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def places_of(part: Sequence[int], logits: Tensor) -> slice | Tensor:
    """Return what picks these rows, in ascending order: neighbours without a copy."""
    if part[-1] - part[0] + 1 == len(part):
        return slice(part[0], part[-1] + 1)
    return torch.tensor(part, device=logits.device)


def rows_of(logits: Tensor, part: Sequence[int]) -> Tensor:
    at = places_of(part, logits)
    return logits[at] if isinstance(at, slice) else logits.index_select(0, at)


def to_host(told: Sequence[Tensor]) -> list[Any]:
    """Return the tensors as lists; from a device in one transfer."""
    if not told[0].is_cuda:
        return [part.tolist() for part in told]
    return unpacked(packed(told).cpu(), told)


def packed(told: Sequence[Tensor]) -> Tensor:
    """Lay tensors end to end as bytes, widest types first, so that each begins at a multiple of its own."""
    ordered = sorted(told, key=lambda part: -part.element_size())
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in ordered])


def unpacked(laid: Tensor, told: Sequence[Tensor]) -> list[Any]:
    """Read what `packed` laid end to end; of `told` only types and shapes count."""
    found: dict[int, Any] = {}
    begin = 0
    for place in sorted(range(len(told)), key=lambda place: -told[place].element_size()):
        end = begin + told[place].nbytes
        found[place] = laid[begin:end].view(told[place].dtype).view(told[place].shape).tolist()
        begin = end
    return [found[place] for place in range(len(told))]


def _grammar(row: Row) -> Grammar:
    step = row.steps[Grammar]
    assert isinstance(step, Grammar)
    return step


def rows_at_once(vocabulary: int) -> int:
    """Return how many rows of logits are within `LOGITS_BYTES`; one always is."""
    return max(1, LOGITS_BYTES // (torch.float32.itemsize * vocabulary))


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


def pick(values: Tensor, rows: Sequence[Row]) -> Tensor:
    """Choose token ids [rows] from fp32 logits [rows, vocabulary], which may be overwritten. The rows are of
    one kind."""
    ids: Tensor | None = None
    how = kind(rows[0])
    for step in STEPS:
        if step is Temperature and how == NARROWED_BEFORE:
            values, ids = narrowed(values, least_logit(values, rows), -torch.inf)
        needed = {index: row.steps[step] for index, row in enumerate(rows) if step in row.steps}
        if len(needed) == len(rows):
            values = step.apply(values, list(needed.values()))
        elif needed:
            some = torch.tensor(list(needed), device=values.device)
            changed = step.apply(values.index_select(0, some), list(needed.values()))
            values.index_copy_(0, some, changed)
        if step is Temperature and how == NARROWED_BEHIND:
            values, ids = nucleus(values, rows)
    if how >= NARROWED_BEHIND:
        places = draw_filtered(values, rows)
        return places if ids is None else ids.gather(-1, places.unsqueeze(-1)).squeeze(-1)
    drawn = [index for index, row in enumerate(rows) if Temperature in row.steps]
    if len(drawn) == len(rows):
        return draw(values, rows)
    tokens = greatest(values)[1]
    if drawn:
        at = torch.tensor(drawn, device=values.device)
        tokens[at] = draw(values.index_select(0, at), [rows[index] for index in drawn])
    return tokens


def narrowed(values: Tensor, least: Tensor, beyond: float) -> tuple[Tensor, Tensor | None]:
    """Leave out what of `values` [rows, vocabulary] is below `least` [rows, 1]: returns the others
    [rows, tokens], in id order and with `beyond` behind them, and their ids; None: all are there. On a device
    nothing is left out, as the number of the others would have to be waited for."""
    if values.is_cuda:
        return values, None
    numbers = values.numpy()
    count, vocabulary = numbers.shape
    kept = numbers >= least.numpy()
    if 4 * np.count_nonzero(kept) > kept.size:
        return values, None
    flat = np.flatnonzero(kept)
    sizes = np.diff(np.searchsorted(flat, np.arange(count + 1) * vocabulary))[:, None]
    is_taken = np.arange(max(1, sizes.max())) < sizes
    some, ids = np.full(is_taken.shape, beyond, np.float32), np.zeros(is_taken.shape, np.int64)
    some[is_taken] = numbers.reshape(-1)[flat]
    ids[is_taken] = flat % vocabulary
    return torch.from_numpy(some), torch.from_numpy(ids)


def nucleus(probabilities: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
    """Narrow to tokens of which some `top_p` may keep. What the unlikely ones have together, every
    `PILOT`-th token tells well enough to guess the least that is kept; where that was too much, the bound
    that always holds is taken."""
    if probabilities.is_cuda:
        return probabilities, None
    shares = column([row.sampling.top_p for row in rows], probabilities)
    some = np.sort(probabilities.numpy()[:, ::PILOT], axis=-1)
    is_spare = some.cumsum(axis=-1) * PILOT < ((1 - shares) / 2).numpy()
    at = np.minimum(is_spare.sum(axis=-1, keepdims=True), some.shape[-1] - 1)
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


def draw(probabilities: Tensor, rows: Sequence[Row]) -> Tensor:
    """Choose by the noise of each row's seed and position: a block, and a token of it."""
    blocks = in_blocks(probabilities, 0.0)
    sums = blocks.sum(dim=-1).double()
    ends = sums.cumsum(dim=-1)
    aim = noise_of(rows, ends) * ends[:, -1:]
    # `right`: the first one whose sum is greater, so an id of probability 0 is never drawn.
    block = torch.searchsorted(ends, aim, right=True).clamp_(max=ends.shape[-1] - 1)
    size = sums.gather(-1, block)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    # A share of the block, as its sum in float32 is not quite that of its tokens.
    share = (aim - ends.gather(-1, block) + size) / size
    place = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    last = (inside < inside[:, -1:]).sum(dim=-1, keepdim=True)  # of the block that is not of probability 0
    return (block * BLOCK + torch.minimum(place, last)).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def draw_filtered(probabilities: Tensor, rows: Sequence[Row]) -> Tensor:
    """As `draw`, but token by token: then it is nothing to the sums which tokens of probability 0 are left
    out. Returns places in `probabilities`."""
    ends = probabilities.double().cumsum(dim=-1)
    place = torch.searchsorted(ends, noise_of(rows, ends) * ends[:, -1:], right=True)
    last = (ends < ends[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(place, last).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def noise_of(rows: Sequence[Row], like: Tensor) -> Tensor:
    return column([uniform(row.sampling.seed, len(row.generated)) for row in rows], like)


def in_blocks(values: Tensor, beyond: float) -> Tensor:
    """Show [rows, vocabulary] as [rows, blocks, BLOCK]; `beyond` fills up the last one."""
    if short := -values.shape[-1] % BLOCK:
        values = torch.nn.functional.pad(values, (0, short), value=beyond)
    return values.view(*values.shape[:-1], -1, BLOCK)


def greatest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the greatest of each row of [rows, vocabulary], and its place, of equal ones the first."""
    if values.is_cuda:
        best, place = values.max(dim=-1)
        return best, place
    # With its place it takes PyTorch four times as long on CPU: so only in a block.
    blocks = in_blocks(values.float(), -torch.inf)
    best, block = blocks.amax(dim=-1).max(dim=-1)
    inside = blocks.gather(1, block.view(-1, 1, 1).expand(-1, -1, BLOCK)).squeeze(1).max(dim=-1).indices
    return best.to(values.dtype), (block * BLOCK + inside).clamp_(max=values.shape[-1] - 1)


def likeliest(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the `most` greatest of each row of [rows, vocabulary], the greatest first, and their places."""
    if values.is_cuda or most * BLOCK * 4 > values.shape[-1]:
        found, places = values.topk(most, dim=-1)
        return found, places
    # They are in the blocks whose greatest are the greatest.
    blocks = in_blocks(values, -torch.inf)
    chosen = blocks.amax(dim=-1).topk(most, dim=-1).indices.sort(dim=-1).values
    some = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    found, places = some.topk(most, dim=-1)
    return found, chosen.gather(-1, places // BLOCK) * BLOCK + places % BLOCK


def descending(values: Tensor) -> Tensor:
    """Sort each row. On CPU by NumPy, which takes a twentieth of the time."""
    if values.is_cuda:
        return values.sort(dim=-1, descending=True).values
    ordered = np.negative(values.numpy())
    ordered.sort(axis=-1)
    return torch.from_numpy(np.negative(ordered, out=ordered))


def zeroed_below(values: Tensor, least: Tensor) -> Tensor:
    """Zero, in place, what of `values` [rows, tokens] is below `least` [rows, 1]."""
    if values.is_cuda:
        return values.mul_(values >= least)
    numbers = values.numpy()  # which NumPy compares in a fifth of the time
    numbers *= numbers >= least.numpy()
    return values


def renormalized(values: Tensor) -> Tensor:
    """Let each row sum to 1 again: `top_p` is a share of what earlier steps left. Summed in double: zeros
    that are left out change nothing that is seen."""
    return values.div_(values.sum(dim=-1, keepdim=True, dtype=torch.double).to(values.dtype))


def named_places(values: Tensor, ids: Sequence[array[int]]) -> tuple[Tensor, Tensor]:
    """Return `values` [rows, vocabulary] as one row, and the places in it of the ids that each row names."""
    begins = np.arange(len(ids)) * values.shape[-1]
    places = joined(ids, values)
    sizes = torch.from_numpy(np.repeat(begins, [len(named) for named in ids])).to(values.device)
    return values.view(-1), places + sizes


def joined(parts: Sequence[array[Any]], like: Tensor) -> Tensor:
    """Lay numbers end to end, on the device of `like`."""
    together = np.concatenate([np.frombuffer(part, part.typecode) for part in parts])
    return torch.from_numpy(together).to(like.device)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Make a tensor [rows, 1] of one value per row, in the type and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


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
        yield value, list(zip(tokens[:count], top[:count], strict=True))


def ranks(logits: Tensor, tokens: Tensor) -> list[int]:
    """Return the place of `tokens` [rows] in `logits` [rows, vocabulary]: 1 is the likeliest."""
    found: list[int] = (logits >= logits.gather(-1, tokens.unsqueeze(-1))).sum(dim=-1).tolist()
    return found
