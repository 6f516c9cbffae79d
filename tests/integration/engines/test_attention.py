"""Attention by an operator of our own, beside PyTorch's in float32."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tidegate.engines.transformers.attention import NativeAttention, has_attention, is_native
from tidegate.engines.transformers.decoder_parts import Heads, Window

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="the processor has no products of bfloat16"
)


def attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator gives, and what PyTorch does: both [rows, heads x size]."""
    assert has_attention()
    rows, heads, size = query.shape
    shared, columns = keys.shape[1:3]
    window = Window(0, rows, 0, columns, seen, has_products=False, is_native=True)
    its = Heads(heads, shared, size, 0.1)
    with torch.inference_mode():
        found = NativeAttention()(query, keys, values, window, 1, its).float()
        of_keys, of_values = (
            each.float().repeat_interleave(heads // shared, dim=1) for each in (keys, values)
        )
        expected = scaled_dot_product_attention(
            query.float().unsqueeze(2), of_keys, of_values, attn_mask=seen[:, None, None], scale=its.scale
        )
    return found, expected.flatten(1)


def arena(rows: int, shared: int, columns: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with others around them, as those of a window are."""
    generator = torch.Generator().manual_seed(columns)
    held = torch.randn(2, rows + 2, shared, columns + 9, size, generator=generator).bfloat16()
    keys, values = held[:, 1:-1, :, 5 : columns + 5]
    return keys, values


@pytest.mark.parametrize("size", [32, 64, 96, 128])
@pytest.mark.parametrize(("shared", "group"), [(1, 1), (2, 2), (3, 3), (1, 4), (2, 5), (1, 7), (1, 8)])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 255, 256, 257, 700])
def test_it_gives_what_pytorch_gives(columns: int, shared: int, group: int, size: int) -> None:
    rows = 3
    generator = torch.Generator().manual_seed(group)
    both = torch.randn(rows, shared * (group + 1), size, generator=generator).bfloat16()
    query = both[:, : shared * group]  # with keys behind them, as a step has them
    first = torch.tensor([[0], [columns // 2], [columns - 1]])
    found, expected = attended(query, *arena(rows, shared, columns, size), torch.arange(columns) >= first)
    assert float((found - expected).norm() / expected.norm()) < 0.004


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_gets_the_same_whatever_rows_are_beside_it(threads: int) -> None:
    keys, values = arena(9, 2, 300, 64)
    query = torch.randn(9, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = torch.arange(300) >= torch.arange(9)[:, None] * 30
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together, _ = attended(query, keys, values, seen)
        for row in range(9):
            at = slice(row, row + 1)
            alone, _ = attended(query[at], keys[at], values[at], seen[at])
            assert torch.equal(alone, together[at])
    finally:
        torch.set_num_threads(before)


def test_what_a_row_does_not_see_does_not_matter() -> None:
    keys, values = arena(2, 1, 600, 64)
    query = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = torch.zeros(2, 600, dtype=torch.bool)
    seen[0, 3], seen[0, 299], seen[1, 590:] = True, True, True
    first, expected = attended(query, keys, values, seen)
    assert torch.allclose(first, expected, atol=0.02)
    for held in (keys, values):
        held.masked_fill_(~seen[:, None, :, None], torch.nan)
    again, _ = attended(query, keys, values, seen)
    assert torch.equal(first, again)


@pytest.mark.parametrize("factor", [30.0, 1e4])
def test_large_scores_are_held(factor: float) -> None:
    """One share is then all but 1, and the highest score may come last."""
    keys, values = arena(4, 2, 530, 64)
    query = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(0)).mul(factor).bfloat16()
    found, expected = attended(query, keys, values, torch.ones(4, 530, dtype=torch.bool))
    assert float((found - expected).norm() / expected.norm()) < 0.004


@pytest.mark.parametrize("part", ["query", "keys", "values"])
def test_values_that_are_no_numbers_are_seen(part: str) -> None:
    keys, values = arena(2, 1, 40, 64)
    query = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    place = {"query": query[0], "keys": keys[0, 0], "values": values[0, 0]}[part]
    sound, _ = attended(query, keys, values, torch.ones(2, 40, dtype=torch.bool))
    place[-1] = torch.nan
    found, _ = attended(query, keys, values, torch.ones(2, 40, dtype=torch.bool))
    assert found[0].isnan().any()
    assert torch.equal(found[1], sound[1])


def test_it_is_for_what_it_knows() -> None:
    cpu = torch.device("cpu")
    assert is_native(torch.bfloat16, cpu, 64)
    assert not is_native(torch.float32, cpu, 64)
    assert not is_native(torch.bfloat16, torch.device("meta"), 64)
    assert not is_native(torch.bfloat16, cpu, 80)
    assert not is_native(torch.bfloat16, cpu, 256)
