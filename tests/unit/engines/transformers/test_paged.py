"""What the kernel of the paged pool is asked for, against one that is written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tidegate.engines.transformers import paged
from tidegate.engines.transformers.kv import LayerKind
from tidegate.engines.transformers.paged import PagedPool, paged_room
from tidegate.engines.transformers.room import Room

HEADS, SHARED, SIZE, PAGE = 4, 2, 8, 16


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begins: Tensor,
    ends: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """Do what `torch.nn.attention.varlen.varlen_attn` says that it does, row by row."""
    assert (window_size, enable_gqa, num_splits) == ((-1, 0), True, 1)
    assert {begins.dtype, ends.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
    assert key.shape[1:] == (PAGE, SHARED, SIZE)
    assert ends.diff().tolist() == seqused_k.tolist()
    found = []
    for row, (first, last) in enumerate(zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True)):
        used = int(seqused_k[row])
        assert last - first <= most_queries
        assert used <= most_keys
        pages = block_table[row].long()
        keys, values = (held[pages].flatten(0, 1)[:used].transpose(0, 1) for held in (key, value))
        mask = torch.ones(last - first, used, dtype=torch.bool).tril(used - (last - first))
        one = scaled_dot_product_attention(
            query[first:last].transpose(0, 1), keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
        found.append(one.transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("width", [1, 3])
def test_the_kernel_attends_as_gathered_pages_do(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "varlen_attn", varlen)
    room = Room(64 * 400, 64, page=PAGE)
    pool = PagedPool([LayerKind()], 4, 200, torch.device("cpu"), room)
    generator = torch.Generator().manual_seed(0)

    def states(rows: int, heads: int, columns: int) -> Tensor:
        return torch.randn(rows, heads, columns, SIZE, generator=generator)

    for lengths in ([37, 40], [5, 90]):
        pool.begin_prefill(lengths)
        pool.update(states(2, SHARED, max(lengths)), states(2, SHARED, max(lengths)), 0)
        pool.commit_prefill(lengths)
    pool.remove(1)
    mask = pool.begin_run([width] * 3)
    keys, values = pool.update(states(3, SHARED, width), states(3, SHARED, width), 0)
    before = torch.ones(width, pool.end, dtype=torch.bool).tril(pool.end - width)
    query = states(3, HEADS, width)
    expected = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask[:, None, None] & before, scale=0.3, enable_gqa=True
    )
    layer: Any = pool.layers[0]
    flat = query.transpose(1, 2).reshape(3 * width, HEADS, SIZE)
    found = pool.attend(flat, layer.keys, layer.values, 0.3).view(3, width, HEADS, SIZE).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-5)


def test_so_many_tokens_are_to_spare_for_every_row() -> None:
    pool = PagedPool([LayerKind()], 4, 200, torch.device("cpu"), Room(64 * 160, 64, page=16))
    pool.begin_prefill([30, 17])
    pool.commit_prefill([30, 17])
    assert pool.spare() == 2 + 3 * 16
    pool.begin_run([pool.spare()] * 2)
    assert pool.spare() == 0
    pool.remove(0)
    assert pool.spare() == 13 + 5 * 16


def test_a_pool_needs_a_page_that_is_nobodys_and_room_for_a_whole_context() -> None:
    assert paged_room(Room(64 * 320, 64), "cpu", 256) == Room(64 * 304, 64, page=16)
    assert paged_room(Room(64 * 320, 64), "cuda", 256) is None
    assert paged_room(Room(64 * 512, 64), "cuda", 256) == Room(64 * 256, 64, page=256)
