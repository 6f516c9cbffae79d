"""Chooses the next token of every row of a batch.

A row passes the steps of `STEPS` that its request needs, in that order, and then the choice:

    logits -> AllowedTokens -> BadWords -> MinTokens -> LogitBias -> RepetitionPenalty -> Penalties
        -> ModelRules -> Grammar -> Temperature -> probabilities -> MinP -> TopK -> TopP
        -> inverse CDF at uniform(seed, position)

The cumulative distribution runs over the vocabulary in id order, so tiny differences in the logits (another
batch, another replica) move its borders by as little and almost never change the token. A row that needs no
step is greedy: a batch of those takes one `max` and one transfer to the host.

A new parameter is a field of `Sampling` and a step. Steps before `Temperature` see logits, steps after it
probabilities, which need not sum to 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from tidegate.engines.noise import uniform
from tidegate.engines.transformers.generation_rules import Rules
from tidegate.engines.transformers.grammars import Matcher, allowed_tokens
from tidegate.messages.work import Sampling

# Of float32 logits that are worked on at once: log probabilities of them, or their values sorted, take a few
# times as much.
LOGITS_BYTES = 64 << 20
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
        self._ids = list(row.sampling.allowed_token_ids)

    @staticmethod
    def is_needed(row: Row) -> bool:
        return bool(row.sampling.allowed_token_ids)

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        for row, step in zip(values, steps, strict=True):
            kept = row[step._ids]
            row.fill_(-torch.inf)
            row[step._ids] = kept
        return values


class BadWords(LogitStep):
    """Rules out the token that would complete a word."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._words = [list(word) for word in row.bad_words]

    @staticmethod
    def is_needed(row: Row) -> bool:
        return bool(row.sampling.bad_words)

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        for row, step in zip(values, steps, strict=True):
            for *before, last in step._words:
                is_begun = list(step.generated[len(step.generated) - len(before) :]) == before
                if is_begun and last < len(row):
                    row[last] = -torch.inf
        return values


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
        for row, step in zip(values, steps, strict=True):
            if len(step.generated) < step.sampling.min_tokens:
                row[[token for token in step._end_ids if token < len(row)]] = -torch.inf
        return values


class LogitBias(LogitStep):
    """Adds a number to the logits of named tokens."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._ids = [token for token, _ in row.sampling.logit_bias]
        self._biases = [bias for _, bias in row.sampling.logit_bias]

    @staticmethod
    def is_needed(row: Row) -> bool:
        return bool(row.sampling.logit_bias)

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        for row, step in zip(values, steps, strict=True):
            row[step._ids] += torch.tensor(step._biases, dtype=row.dtype, device=row.device)
        return values


class RepetitionPenalty(LogitStep):
    """Divides the positive logits of tokens of prompt and answer, and multiplies the negative ones
    (Keskar et al., arXiv 1909.05858)."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._seen = set(row.prompt)
        self._counted = 0  # tokens of `generated`

    @staticmethod
    def is_needed(row: Row) -> bool:
        return row.sampling.repetition_penalty != 1

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        for row, step in zip(values, steps, strict=True):
            step._seen.update(step.generated[step._counted :])
            step._counted = len(step.generated)
            ids = torch.tensor(list(step._seen), dtype=torch.long, device=row.device)
            penalty, found = step.sampling.repetition_penalty, row[ids]
            row[ids] = torch.where(found > 0, found / penalty, found * penalty)
        return values


class Penalties(LogitStep):
    """Lowers the logits of tokens that were generated, by their number and because they were at all."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._counts: dict[int, int] = {}
        self._counted = 0  # tokens of `generated`
        self._penalties: Tensor | None = None  # [vocabulary]

    @staticmethod
    def is_needed(row: Row) -> bool:
        return bool(row.sampling.presence_penalty or row.sampling.frequency_penalty)

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
        temperatures = column([step.sampling.temperature for step in steps], values)
        return torch.softmax(values.div_(temperatures), dim=-1)


class MinP(LogitStep):
    """Zeroes tokens that are less likely than `min_p` of the likeliest one."""

    @staticmethod
    def is_needed(row: Row) -> bool:
        return Temperature.is_needed(row) and row.sampling.min_p > 0

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        shares = column([step.sampling.min_p for step in steps], values)
        return renormalized(values.masked_fill_(values < shares * values.amax(-1, keepdim=True), 0.0))


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
        return renormalized(values.masked_fill_(values < last, 0.0))


class TopP(LogitStep):
    """Zeroes all but the likeliest tokens that together reach `top_p`; at least one stays."""

    @staticmethod
    def is_needed(row: Row) -> bool:
        return Temperature.is_needed(row) and row.sampling.top_p < 1

    @classmethod
    def apply(cls, values: Tensor, steps: Sequence[Self]) -> Tensor:
        ordered, ids = values.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        dropped = before >= column([step.sampling.top_p for step in steps], values)
        dropped[:, 0] = False
        return values.masked_fill_(torch.zeros_like(dropped).scatter_(-1, ids, dropped), 0.0)


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


@dataclass(frozen=True, slots=True)
class Chosen:
    """Holds the next token of each row, on the device and on the host, whether its logits were finite, and
    whether its grammar and the other steps left a token to choose."""

    tokens: Tensor  # [rows], int64
    ids: list[int]
    finite: list[int]
    open: list[int]
    logprobs: dict[int, tuple[float, list[tuple[int, float]]]]  # row -> (chosen, [(id, logprob), ...])


def choose(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """Choose from `logits` [rows, vocabulary], any float type. One transfer to the host, where no row asks
    for log probabilities."""
    best, tokens = logits.max(dim=-1)
    stepped = [index for index, row in enumerate(rows) if row.steps]
    size = rows_at_once(logits.shape[-1])
    for part in (stepped[start : start + size] for start in range(0, len(stepped), size)):
        tokens[part] = pick(logits[part].float(), [rows[index] for index in part])
    logprobs: dict[int, tuple[float, list[tuple[int, float]]]] = {}
    if asked := [index for index, row in enumerate(rows) if row.sampling.top_logprobs is not None]:
        counts = [rows[index].sampling.top_logprobs or 0 for index in asked]
        logprobs = dict(zip(asked, token_logprobs(logits[asked], tokens[asked], counts), strict=True))
    told = [tokens, torch.isfinite(best).to(tokens.dtype)]
    if bound := [index for index in stepped if Grammar in rows[index].steps]:
        is_open = torch.ones_like(tokens)
        is_open[bound] = torch.stack([_grammar(rows[index]).is_open for index in bound]).to(tokens.dtype)
        told.append(is_open)
    ids, finite, *left = torch.stack(told).tolist()
    return Chosen(tokens, ids, finite, left[0] if left else [1] * len(ids), logprobs)


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
        self.values: list[tuple[float, list[tuple[int, float]]]] = []
        self.ranks: list[int] = []

    def take(self, logits: Tensor) -> None:
        """Take the next logits [tokens, vocabulary]; what follows the last token is not known."""
        following = self._following[len(self.values) : len(self.values) + len(logits)]
        if following:
            known, wanted = logits[: len(following)], torch.tensor(following, device=logits.device)
            self.values += token_logprobs(known, wanted, [self._top] * len(following))
            self.ranks += ranks(known, wanted)


def pick(values: Tensor, rows: Sequence[Row]) -> Tensor:
    """Choose token ids [rows] from fp32 logits [rows, vocabulary], which may be overwritten."""
    for step in STEPS:
        needed = {index: row.steps[step] for index, row in enumerate(rows) if step in row.steps}
        if len(needed) == len(rows):
            values = step.apply(values, list(needed.values()))
        elif needed:
            some = list(needed)
            values[some] = step.apply(values[some], list(needed.values()))
    drawn = [index for index, row in enumerate(rows) if Temperature in row.steps]
    if len(drawn) == len(rows):
        return draw(values, rows)
    tokens = values.argmax(dim=-1)
    if drawn:
        tokens[drawn] = draw(values[drawn], [rows[index] for index in drawn])
    return tokens


def draw(probabilities: Tensor, rows: Sequence[Row]) -> Tensor:
    """Choose by the noise of each row's seed and position."""
    cumulative = probabilities.double().cumsum(dim=-1)
    noise = column([uniform(row.sampling.seed, len(row.generated)) for row in rows], cumulative)
    # `right`: the first id whose sum is greater, so an id of probability 0 is never drawn.
    drawn = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True).squeeze(-1)
    return drawn.clamp_(max=probabilities.shape[-1] - 1)


def renormalized(values: Tensor) -> Tensor:
    """Let each row sum to 1 again: `top_p` is a share of what earlier steps left."""
    return values.div_(values.sum(dim=-1, keepdim=True))


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Make a tensor [rows, 1] of one value per row, in the type and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


def token_logprobs(
    logits: Tensor, tokens: Tensor, counts: Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return the log probability of `tokens` [rows] under the raw `logits` [rows, vocabulary], and of the
    `counts[row]` likeliest tokens, before all steps."""
    if len(tokens) > (size := rows_at_once(logits.shape[-1])):
        parts = [slice(start, start + size) for start in range(0, len(tokens), size)]
        return [found for part in parts for found in token_logprobs(logits[part], tokens[part], counts[part])]
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


def ranks(logits: Tensor, tokens: Tensor) -> list[int]:
    """Return the place of `tokens` [rows] in `logits` [rows, vocabulary]: 1 is the likeliest."""
    found: list[int] = (logits >= logits.gather(-1, tokens.unsqueeze(-1))).sum(dim=-1).tolist()
    return found
