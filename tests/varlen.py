"""The kernel that attends by pages on a GPU, written out: what its documentation says, row by row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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
