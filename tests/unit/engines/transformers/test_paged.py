"""What the kernel of the paged pool is asked for, against one that is written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.varlen import varlen
from tidegate.engines.transformers import paged
from tidegate.engines.transformers.kv import LayerKind
from tidegate.engines.transformers.paged import PagedPool, paged_room
from tidegate.engines.transformers.room import Room

HEADS, SHARED, SIZE, PAGE = 4, 2, 8, 16


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
