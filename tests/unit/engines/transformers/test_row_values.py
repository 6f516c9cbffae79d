from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.engines.transformers.row_values import (
    PILOT,
    keep_share,
    keep_share_by_bits,
    likeliest,
    without_last_ties,
)

Keep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

WAYS = (keep_share, keep_share_by_bits)  # of a CPU, and of a GPU
SHARES = (0.0, 1e-6, 0.1, 0.5, 0.9, 0.99, 1 - 1e-7)


def rows_like(kind: str, vocabulary: int, seed: int) -> torch.Tensor:
    """Probabilities [rows, vocabulary] as models have them, and as none should."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((len(SHARES), vocabulary), generator=generator)
    scale = {"flat": 0.1, "peaked": 4.0, "tied": 2.0, "sorted": 3.0, "hidden": 1.0}[kind]
    logits *= scale
    if kind == "tied":
        logits = logits.round()
    if kind == "sorted":
        logits = logits.sort(dim=-1).values
    if kind == "hidden":
        logits[:, 1::PILOT] += 9  # what the pilot does not see
    return torch.softmax(logits, dim=-1)


def by_sorting(values: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Keep tokens from the likeliest on, one by one, until they reach the share."""
    ordered, ids = values.sort(dim=-1, descending=True, stable=True)
    is_kept = ordered.cumsum(dim=-1) - ordered < shares
    is_kept[:, 0] = True
    return torch.zeros_like(values).scatter(-1, ids, torch.where(is_kept, ordered, 0.0))


@pytest.mark.parametrize("keep", WAYS)
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["flat", "peaked", "tied", "sorted", "hidden"]),
    st.integers(1, 9000),
    st.integers(0, 1 << 30),
)
def test_what_is_kept_of_a_share_is_what_is_of_the_sorted_row(
    keep: Keep, kind: str, vocabulary: int, seed: int
) -> None:
    values = rows_like(kind, vocabulary, seed)
    shares = torch.tensor(SHARES).unsqueeze(-1)
    kept = keep(values.clone(), shares)
    expected = by_sorting(values, shares)
    for found, wanted, row in zip(kept, expected, values, strict=True):
        assert (found > 0).any()
        assert ((found == row) | (found == 0)).all()
        # Sums in another order round otherwise, which may move the border.
        apart = row[found != wanted].sum()
        assert apart <= 1.001 * torch.where(found > 0, found, torch.inf).amin() + 1e-6
        least = torch.where(found > 0, found, torch.inf).amin()
        tied = (row == least).nonzero().flatten().tolist()
        stay = [place for place in tied if found[place] > 0]
        assert stay == tied[: len(stay)], "the first of equal ones"
        assert (found[row > least] > 0).all()


@pytest.mark.parametrize("keep", WAYS)
def test_a_row_gets_the_same_whatever_rows_are_beside_it(keep: Keep) -> None:
    values = torch.cat([rows_like(kind, 4096, 7) for kind in ("flat", "peaked", "tied", "hidden")])
    shares = torch.tensor(SHARES * 4).unsqueeze(-1)
    together = keep(values.clone(), shares)
    for row in range(len(values)):
        alone = keep(values[row : row + 1].clone(), shares[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("keep", WAYS)
@pytest.mark.parametrize(
    ("row", "share", "kept"),
    [
        ([0.2, 0.1, 0.2, 0.25, 0.25], 0.6, [0.2, 0, 0, 0.25, 0.25]),
        ([0.0, 1.0, 0.0, 0.0, 0.0], 1 - 1e-7, [0, 1, 0, 0, 0]),
        ([0.25, 0.25, 0.25, 0.25, 0.0], 0.5, [0.25, 0.25, 0, 0, 0]),
        ([0.25, 0.25, 0.25, 0.125, 0.0], 0.99, [0.25, 0.25, 0.25, 0.125, 0]),  # never reached
    ],
)
def test_just_as_many_are_kept_as_reach_the_share(
    keep: Keep, row: list[float], share: float, kept: list[float]
) -> None:
    assert keep(torch.tensor([row]), torch.tensor([[share]])).tolist() == [
        [pytest.approx(value) for value in kept]
    ]


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("vocabulary", [100, 1300, 9000])  # all, those of all, and those of some blocks
@pytest.mark.parametrize("has_ties", [False, True])
def test_the_likeliest_are_those_of_the_sorted_row(rows: int, vocabulary: int, has_ties: bool) -> None:
    values = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    values = values.bfloat16().float() if has_ties else values
    found, places = likeliest(values, 20)
    assert torch.equal(found, values.sort(dim=-1, descending=True).values[:, :20])
    assert torch.equal(values.gather(-1, places), found)
    assert all(len({*row}) == 20 for row in places.tolist())


def test_a_row_of_no_numbers_leaves_the_likeliest_of_the_others() -> None:
    values = torch.randn(40, 1300, generator=torch.Generator().manual_seed(0))
    values[0] = torch.nan
    found, _ = likeliest(values, 20)
    assert torch.equal(found[1:], values[1:].topk(20, dim=-1).values)
    likeliest(torch.full((40, 1300), torch.nan), 20)


def test_of_equal_ones_the_last_go() -> None:
    values = torch.tensor([[0.2, 0.1, 0.2, 0.2], [0.5, 0.5, 0.0, 0.0]])
    found = without_last_ties(values, torch.tensor([[0.2], [0.5]]), torch.tensor([[2], [0]]))
    assert found.tolist() == [[pytest.approx(0.2), pytest.approx(0.1), 0, 0], [0.5, 0.5, 0, 0]]
