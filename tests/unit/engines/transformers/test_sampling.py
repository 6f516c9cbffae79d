from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.unit.engines.transformers import choices
from tidegate.engines.noise import uniform
from tidegate.engines.transformers import logit_steps, row_values
from tidegate.engines.transformers import sampling as sampling_module
from tidegate.engines.transformers.logit_steps import (
    STEPS,
    LogitStep,
    Penalties,
    Temperature,
    TopP,
    needed_steps,
)
from tidegate.engines.transformers.logprobs import PrefillLogprobs, ranks, token_logprobs
from tidegate.engines.transformers.row_values import LOGITS_BYTES, packed, rows_at_once, unpacked
from tidegate.engines.transformers.sampling import choose, least_logit, least_probability, pick
from tidegate.messages.work import Sampling

VOCABULARY = 50
PROMPT = [3, 4, 4, 9]
END_IDS = (0, 48, VOCABULARY + 7)  # the last one is beyond the embedding


class Row:
    def __init__(self, sampling: Sampling, generated: list[int], words: Sequence[Sequence[int]] = ()) -> None:
        self.sampling = sampling
        self.generated = generated
        self.prompt = PROMPT
        self.end_ids = END_IDS
        self.rules = None
        self.matcher = None
        self.bad_words = words
        self.steps = needed_steps(self)


def a_row(position: int = 0, generated: Sequence[int] = (), **sampling: Any) -> Row:
    return Row(Sampling(**{"seed": 1, **sampling}), list(generated) or [0] * position)


def some_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def test_greedy_rows_take_the_likeliest() -> None:
    logits = some_logits(4)
    chosen = choose(logits, [a_row(temperature=0.0) for _ in range(4)])
    assert chosen.ids == logits.argmax(-1).tolist() == chosen.tokens.tolist()
    assert chosen.finite == [1, 1, 1, 1]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**62), st.integers(0, 500), st.integers(1, 6), st.sampled_from([0.3, 1.0, 1.7]))
def test_a_draw_does_not_depend_on_its_neighbours(
    seed: int, position: int, rows: int, temperature: float
) -> None:
    logits = some_logits(rows, seed % 1000)
    batch = [
        a_row(position + row, seed=seed + row, temperature=temperature, top_p=0.9 if row % 2 else 1.0)
        for row in range(rows)
    ]
    together = choose(logits.clone(), batch).ids
    alone = [choose(logits[row : row + 1].clone(), [batch[row]]).ids[0] for row in range(rows)]
    assert together == alone


def test_draws_follow_the_distribution() -> None:
    """2,000 draws of a token with probability 0.7: 1,400 +- 5 standard deviations (20.5 each)."""
    logits = torch.log(torch.tensor([[0.2, 0.7, 0.1]])).expand(2000, 3)
    chosen = choose(logits.clone(), [a_row(position) for position in range(2000)])
    assert abs(chosen.ids.count(1) - 1400) < 103


def test_tiny_differences_in_logits_do_not_change_the_draws() -> None:
    logits = some_logits(500)
    rows = [a_row(position) for position in range(500)]
    nudged = logits + 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    assert choose(logits.clone(), rows).ids == choose(nudged, rows).ids


def test_nucleus_keeps_the_fewest_that_reach_top_p() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).repeat(3, 1)
    kept = TopP.apply(probabilities, [TopP(a_row(top_p=top_p)) for top_p in (0.5, 0.6, 0.0)])
    assert (kept > 0).sum(-1).tolist() == [1, 2, 1]
    assert not TopP.is_needed(a_row(top_p=1.0))


def test_a_token_outside_the_nucleus_is_never_drawn() -> None:
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.05, 0.4]])).expand(1000, 4)
    chosen = choose(logits.clone(), [a_row(position, top_p=0.8) for position in range(1000)])
    assert set(chosen.ids) == {1, 3}


def test_penalties_count_generated_tokens() -> None:
    row = a_row(generated=[3, 3, 5], temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    step = Penalties(row)
    lowered = Penalties.apply(torch.zeros(1, VOCABULARY), [step])[0]
    assert lowered[3].item() == pytest.approx(-1.0)
    assert lowered[5].item() == pytest.approx(-0.75)
    assert lowered.count_nonzero() == 2
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3], logits[0, 5], logits[0, 9] = 2.0, 1.9, 1.1
    assert choose(logits, [row]).ids == [5]


def test_one_batch_mixes_all_kinds_of_rows() -> None:
    logits = some_logits(3)
    best = int(logits[1].argmax())
    penalised = a_row(generated=[best], temperature=0.0, presence_penalty=2.0)
    logits[1, best] = logits[1].topk(2).values[1] + 1
    chosen = choose(logits.clone(), [a_row(temperature=0.0, top_logprobs=2), penalised, a_row()])
    assert chosen.ids[0] == int(logits[0].argmax())
    assert chosen.ids[1] != best
    assert list(chosen.logprobs) == [0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_recorded(dtype: str) -> None:
    recorded = json.loads(Path(__file__).with_name("recorded_choices.json").read_text())[dtype]
    every = [a_row(**sampling) for sampling in choices.SAMPLINGS]
    for step, expected in enumerate(recorded["ids"]):
        rows = choices.rows_at(step)
        logits = choices.logits_of(rows, step, getattr(torch, dtype))
        chosen = choose(logits, [every[row] for row in rows])
        assert chosen.ids == chosen.tokens.tolist() == expected
        for row, token in zip(rows, chosen.ids, strict=True):
            every[row].generated.append(token)
        if "logprobs" in recorded:
            found = [
                (row, value, list(zip(ids, theirs, strict=True)))
                for row, (value, ids, theirs) in chosen.logprobs.items()
            ]
            assert numbers(found) == pytest.approx(numbers(recorded["logprobs"][step]), abs=1e-5)


def numbers(logprobs: Sequence[Any]) -> list[float]:
    """Rows, values, and alternatives with their values, one after the other."""
    return [number for row, value, top in logprobs for number in (row, value, *chain.from_iterable(top))]


def test_a_step_rebuilt_from_the_log_equals_the_one_that_ran_along() -> None:
    row = a_row(presence_penalty=0.7, frequency_penalty=0.3)
    along = Penalties(row)
    for token in (4, 9, 4, 4, 11):
        row.generated.append(token)
        ran_along = Penalties.apply(torch.zeros(1, VOCABULARY), [along])
    rebuilt = Penalties.apply(torch.zeros(1, VOCABULARY), [Penalties(row)])
    assert torch.equal(ran_along, rebuilt)


class NeverTokenZero(LogitStep):
    """What a new parameter brings, here asked for by a stop string."""

    @staticmethod
    def is_needed(row: logit_steps.Row) -> bool:
        return row.sampling.stop == ("zero",)

    @classmethod
    def apply(cls, values: torch.Tensor, steps: Sequence[Self]) -> torch.Tensor:
        assert len(values) == len(steps)
        values[:, 0] = -torch.inf
        return values


def test_a_new_step_touches_the_rows_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_steps, "STEPS", (NeverTokenZero, *STEPS))
    logits = torch.zeros(4, VOCABULARY)
    logits[:, 0] = 100.0
    rows = [
        a_row(temperature=0.0),
        a_row(temperature=0.0, stop=("zero",)),
        a_row(stop=("zero",)),
        a_row(),
    ]
    ids = choose(logits, rows).ids
    assert [token == 0 for token in ids] == [True, False, False, True]
    assert [set(row.steps) for row in rows] == [
        set(),
        {NeverTokenZero},
        {NeverTokenZero, Temperature},
        {Temperature},
    ]


@pytest.mark.parametrize(
    ("sampling", "steps"),
    [
        ({"temperature": 0.0}, []),
        ({"temperature": 1e-6, "top_p": 0.5}, []),
        ({"temperature": 0.0, "top_logprobs": 3, "stop": ("x",), "echo": True}, []),
        ({}, [Temperature]),
        ({"top_p": 0.9}, [Temperature, TopP]),
        ({"frequency_penalty": -0.1, "top_p": 0.0}, [Penalties, Temperature, TopP]),
    ],
)
def test_a_row_takes_only_the_steps_that_it_needs(sampling: dict[str, Any], steps: list[type]) -> None:
    assert list(a_row(**sampling).steps) == steps


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = some_logits(2)
    (value, _, top), (_, *none) = token_logprobs(logits, torch.tensor([4, 5]), [3, 0])
    assert value == pytest.approx(float(torch.log_softmax(logits[0], -1)[4]))
    assert top == sorted(top, reverse=True)
    assert len(top) == 3
    assert none == [[], []]
    [(_, _, every), _] = token_logprobs(logits, torch.tensor([0, 0]), [50, 0])
    assert sum(map(math.exp, every)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(bad: float) -> None:
    logits = some_logits(2)
    logits[1, 7] = bad
    assert choose(logits, [a_row(temperature=0.0), a_row(temperature=0.0)]).finite == [1, 0]


@pytest.mark.parametrize("more", [{"temperature": 0.0}, {"temperature": 0.8}, {"top_p": 0.5}, {"top_k": 3}])
def test_a_row_that_is_left_no_token_is_told(more: dict[str, Any]) -> None:
    rows = [
        a_row(allowed_token_ids=(48, 0), min_tokens=2, **more),
        a_row(allowed_token_ids=(48, 7), min_tokens=2, **more),
        a_row(allowed_token_ids=(48, 0), **more),
        Row(Sampling(seed=1, allowed_token_ids=(5,), bad_words=("x",), **more), [], [[5]]),
        a_row(**more),
    ]
    found = choose(some_logits(len(rows)), rows)
    assert found.open == [0, 1, 1, 0, 1]
    assert found.ids[1] == 7
    assert found.ids[2] in (0, 48)


@pytest.mark.parametrize("penalty", [1e-50, 1e-300, 1e50])
def test_a_penalty_beyond_float32_leaves_numbers(penalty: float) -> None:
    row = a_row(temperature=1.0, repetition_penalty=penalty)
    assert stepped(some_logits(1), row).isfinite().all()


def stepped(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """What the steps of one row make of its logits."""
    values = logits.clone()
    for step in STEPS:
        if step in row.steps:
            values = step.apply(values, [row.steps[step]])
    return values


PROCESSORS: list[tuple[dict[str, Any], list[LogitsProcessor]]] = [
    ({"temperature": 0.0, "repetition_penalty": 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
    (
        {"temperature": 0.0, "min_tokens": 4},
        [MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, [0, 48], device="cpu")],
    ),
    ({"top_k": 5}, [TemperatureLogitsWarper(1.0), TopKLogitsWarper(5)]),
    ({"top_k": 500}, [TemperatureLogitsWarper(1.0)]),
    ({"temperature": 0.7, "min_p": 0.2}, [TemperatureLogitsWarper(0.7), MinPLogitsWarper(0.2)]),
    (
        {"temperature": 1.3, "repetition_penalty": 0.8, "min_p": 0.05, "top_k": 7, "top_p": 0.6},
        [
            RepetitionPenaltyLogitsProcessor(0.8),
            TemperatureLogitsWarper(1.3),
            MinPLogitsWarper(0.05),
            TopKLogitsWarper(7),
            TopPLogitsWarper(0.6),
        ],
    ),
]


@pytest.mark.parametrize(("sampling", "processors"), PROCESSORS)
@pytest.mark.parametrize("generated", [[], [5, 5, 6], [1, 2, 3, 4]])
def test_vllms_parameters_do_what_transformers_processors_do(
    sampling: dict[str, Any], processors: list[LogitsProcessor], generated: list[int]
) -> None:
    logits = some_logits(1, seed=11)
    seen = torch.tensor([[*PROMPT, *generated]])
    expected = logits.clone()
    for processor in processors:
        expected = processor(seen, expected)
    row = a_row(**({"temperature": 1.0} | sampling))
    row.generated.extend(generated)
    values = stepped(logits, row)
    if row.sampling.temperature > 0:
        expected = torch.softmax(expected, -1)
        assert torch.equal(values > 0, expected > 0)
        values = values / values.sum()
    torch.testing.assert_close(values, expected)


def test_logit_bias_is_added_and_minus_100_bans() -> None:
    logits = some_logits(1)
    best = int(logits.argmax())
    values = stepped(logits, a_row(temperature=0.0, logit_bias=((best, -100.0), (7, 1.5))))
    expected = logits.clone()
    expected[0, best] -= 100
    expected[0, 7] += 1.5
    torch.testing.assert_close(values, expected)
    assert choose(logits, [a_row(temperature=0.0, logit_bias=((7, 100.0),))]).ids == [7]


def test_rows_are_bounded_by_the_bytes_of_their_logits() -> None:
    assert rows_at_once(150_000) * 150_000 * 4 <= LOGITS_BYTES < (rows_at_once(150_000) + 1) * 150_000 * 4
    assert rows_at_once(LOGITS_BYTES) == 1


def test_choices_of_many_rows_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    rows = [a_row(temperature=float(row % 3), top_p=0.7, seed=row, top_logprobs=2) for row in range(8)]
    together = choose(logits, rows)
    widths = []

    def noted(values: torch.Tensor, part: Sequence[Row], unseen: int = 0) -> torch.Tensor:
        widths.append(len(part))
        return pick(values, part, unseen)

    monkeypatch.setattr(row_values, "rows_at_once", lambda _vocabulary: 3)
    monkeypatch.setattr(sampling_module, "pick", noted)
    apart = choose(logits, rows)
    assert widths == [3, 2]  # the others are greedy
    assert (apart.ids, apart.logprobs) == (together.ids, together.logprobs)


def test_prefill_logprobs_come_in_parts() -> None:
    logits = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    tokens = list(range(9))
    whole, parts = PrefillLogprobs(tokens, 2), PrefillLogprobs(tokens, 2)
    whole.take(logits)
    for part in torch.split(logits, 4):  # the last one holds only what follows the last token
        parts.take(part)
    assert (parts.values, parts.ranks) == (whole.values, whole.ranks)
    assert whole.values == token_logprobs(logits[:8], torch.tensor(tokens[1:]), [2] * 8)


def test_log_probabilities_of_many_rows_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_values, "rows_at_once", lambda _vocabulary: 3)
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(len(logits)) % 7
    counts = [row % 4 for row in range(len(logits))]
    together = token_logprobs(logits, tokens, counts)
    apart = [
        token_logprobs(logits[row : row + 1], tokens[row : row + 1], counts[row : row + 1])[0]
        for row in range(len(logits))
    ]
    assert together == apart


def test_a_rank_is_the_place_among_all_tokens() -> None:
    logits = torch.tensor([[0.5, 3.0, 1.0], [2.0, -1.0, 0.0]])
    assert ranks(logits, torch.tensor([0, 0])) == [3, 1]


def plain_values(logits: torch.Tensor, row: Row, nudge: float = 0.0) -> torch.Tensor:
    """What is left of one row's logits [vocabulary], by each parameter's definition: logits without a
    temperature, probabilities with one. `nudge` moves the borders of what a share of them bounds."""
    sampling, told = row.sampling, [*row.prompt, *row.generated]
    values = logits.float().tolist()
    if sampling.allowed_token_ids:
        values = [v if token in sampling.allowed_token_ids else -math.inf for token, v in enumerate(values)]
    for *before, last in row.bad_words:
        if last < len(values) and row.generated[max(0, len(row.generated) - len(before)) :] == before:
            values[last] = -math.inf
    if len(row.generated) < sampling.min_tokens:
        values = [-math.inf if token in row.end_ids else v for token, v in enumerate(values)]
    for token, bias in sampling.logit_bias:
        values[token] = float(torch.tensor(values[token]) + torch.tensor(bias))
    for token in set(told):
        scale = torch.tensor(sampling.repetition_penalty)
        found = torch.tensor(values[token])
        values[token] = float(found / scale if found > 0 else found * scale)
    for token in set(row.generated):
        lowered = sampling.presence_penalty + sampling.frequency_penalty * row.generated.count(token)
        values[token] = float(torch.tensor(values[token]) - torch.tensor(lowered))
    if Temperature not in row.steps:
        return torch.tensor(values)
    found = torch.softmax(torch.tensor(values) / sampling.temperature, dim=-1)
    if sampling.min_p:
        found = found * (found >= sampling.min_p * (1 + nudge) * found.max())
        found = found / found.sum()
    if sampling.top_k:
        found = found * (found >= found.sort(descending=True).values[min(sampling.top_k, len(found)) - 1])
        found = found / found.sum()
    if sampling.top_p < 1:
        ordered, ids = found.sort(descending=True, stable=True)
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p + nudge
        dropped[0] = False
        found[ids[dropped]] = 0.0
    return found


def is_drawn(token: int, probabilities: torch.Tensor, row: Row) -> bool:
    ends = probabilities.double().cumsum(-1)
    aim = uniform(row.sampling.seed, len(row.generated)) * ends[-1]
    begin, close = ends[token] - probabilities[token], 1e-6 * ends[-1]
    return bool(probabilities[token] > 0 and begin - close <= aim <= ends[token] + close)


WORDS = [[12], [10, 11], [11, 11, 13], [5000]]
SIZES = st.sampled_from([40, 64, 150, 1000, 4160])
TOKEN = st.integers(10, 39)
PARAMETERS = st.fixed_dictionaries(
    {"seed": st.integers(-(2**63), 2**63 - 1), "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7])},
    optional={
        "top_p": st.floats(0.0, 1.0),
        "top_k": st.sampled_from([1, 2, 7, 40, 500, 5000]),
        "min_p": st.floats(0.0, 1.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "logit_bias": st.dictionaries(TOKEN, st.floats(-100, 100), max_size=5).map(
            lambda d: tuple(d.items())
        ),
        "allowed_token_ids": st.lists(st.integers(14, 39), min_size=1, max_size=9).map(tuple),
        "bad_words": st.just(("a", "b")),
        "min_tokens": st.integers(0, 6),
        "top_logprobs": st.sampled_from([0, 3, 20]),
    },
)
ROWS = st.lists(st.tuples(PARAMETERS, st.lists(TOKEN, max_size=5)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=300)
@given(ROWS, SIZES, st.sampled_from([0.1, 1.0, 5.0]), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_a_choice_is_that_of_the_plain_definition(
    asked: list[tuple[dict[str, Any], list[int]]],
    size: int,
    spread: float,
    has_ties: bool,
    is_narrowed: bool,
    seed: int,
) -> None:
    """Ties, as logits in bfloat16 have many, included."""
    logits = torch.randn(len(asked), size, generator=torch.Generator().manual_seed(seed)) * spread
    logits = logits.bfloat16() if has_ties else logits
    rows = [
        Row(Sampling(**sampling), generated, WORDS if "bad_words" in sampling else [])
        for sampling, generated in asked
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "WORTH_NARROWING", 0 if is_narrowed else size + 1)
        chosen = choose(logits, rows)
    for index, (token, row) in enumerate(zip(chosen.ids, rows, strict=True)):
        if Temperature in row.steps:
            # Sums round: a border is where it should be but for this.
            assert any(
                is_drawn(token, plain_values(logits[index], row, nudge), row) for nudge in (0, 1e-6, -1e-6)
            )
        else:
            assert token == int(plain_values(logits[index], row).argmax())
    assert list(chosen.logprobs) == [i for i, row in enumerate(rows) if row.sampling.top_logprobs is not None]
    for index, (value, likeliest, top) in chosen.logprobs.items():
        plain = torch.log_softmax(logits[index].float(), dim=-1)
        assert value == pytest.approx(float(plain[chosen.ids[index]]), abs=1e-5)
        assert len({*likeliest}) == len(top) == min(rows[index].sampling.top_logprobs or 0, size)
        assert top == plain.topk(len(top)).values.tolist()
        assert top == plain[likeliest].tolist()


def test_what_is_told_comes_back_from_one_transfer() -> None:
    told = [
        torch.tensor([True, False, True]),
        torch.tensor([7, 2**40, -1]),
        torch.tensor([0.5, -math.inf]),
        torch.arange(6.0).view(2, 3),
        torch.zeros(2, 0),
        torch.arange(6).view(2, 3).T,
    ]
    assert unpacked(packed(told), told) == [part.tolist() for part in told]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.sampled_from([2, 5, 40]))
@example(seed=0, top_p=0.9999999999999999, different=40)
def test_of_equally_likely_tokens_the_lower_ids_stay(seed: int, top_p: float, different: int) -> None:
    logits = torch.randint(0, different, (1, 130), generator=torch.Generator().manual_seed(seed)).float()
    row = a_row(top_p=top_p)
    (kept,) = (stepped(logits, row) > 0).tolist()
    # Sums round: a border is where it should be but for this.
    assert any(kept == (plain_values(logits[0], row, nudge) > 0).tolist() for nudge in (0, 1e-6, -1e-6)), kept


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([{"top_p"}, {"top_k"}, {"min_p"}, {"top_k", "min_p"}]),
    st.floats(0.0, 0.999),
    st.integers(1, 70),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0.0, 0.3, 4.0]),
    st.integers(0, 10_000),
)
def test_nothing_is_left_out_that_filters_keep(
    asked: set[str], share: float, top_k: int, temperature: float, spread: float, seed: int
) -> None:
    logits = torch.randn(1, 4000, generator=torch.Generator().manual_seed(seed)) * spread
    parameters: dict[str, Any] = {"top_p": share, "top_k": top_k, "min_p": share}
    row = a_row(temperature=temperature, **{name: parameters[name] for name in asked})
    if "top_p" in asked:
        probabilities = torch.softmax(logits / temperature, dim=-1)
        left = probabilities >= least_probability(probabilities, [row])
    else:
        left = logits >= least_logit(logits, [row])
    assert not ((plain_values(logits[0], row) > 0) & ~left[0]).any()
