"""Attention of one token of each row to its keys and values by an operator of our own (`attention.c`).

PyTorch's ways (`decoder_parts.attend`) copy keys and values before they multiply, or compute a step of a few
queries a head by a kernel for many; this one reads what a row sees once, where it lies (ADR 31).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention

from tidegate.engines.transformers.decoder_parts import Heads, Window, attend
from tidegate.engines.transformers.native import is_ready

SIZES = (32, 64, 96, 128)  # of heads
TOLERANCE = 0.005  # of what comes out in bfloat16, beside float32


class NativeAttention(Module):
    """Attends as `decoder_parts.Attention` does, and to windows that are for the operator by that."""

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, window: Window, width: int, its: Heads
    ) -> Tensor:
        if not window.is_native:
            return attend(query, keys, values, window, width, its)
        found = query.new_empty([query.shape[0], its.heads * its.size])
        torch.ops.tidegate.attention(found, query, keys, values, window.mask, its.scale)
        return found


def is_native(dtype: torch.dtype, device: torch.device, size: int) -> bool:
    """Tell whether the operator attends with heads of this type and size."""
    return dtype == torch.bfloat16 and device.type == "cpu" and size in SIZES and has_attention()


@cache
def has_attention() -> bool:
    """Tell whether the operator runs here."""
    has = torch.cpu._is_avx512_bf16_supported()
    return has and is_ready("attention", _is_alike)


def _is_alike() -> bool:
    """Compare with PyTorch's attention in float32."""
    generator = torch.Generator().manual_seed(0)
    rows, shared, group, columns = 3, 2, 3, 40
    seen = torch.arange(columns) >= torch.tensor([[0], [17], [columns - 1]])
    for size in SIZES:
        query = torch.randn(rows, shared * group, size, generator=generator).bfloat16()
        held = torch.randn(2, rows, shared, columns, size, generator=generator).bfloat16()
        its = Heads(shared * group, shared, size, size**-0.5)
        window = Window(0, rows, 0, columns, seen, has_products=False, is_native=True)
        found = NativeAttention()(query, *held, window, 1, its).float()
        keys, values = held.float().repeat_interleave(group, dim=2)
        mask = seen[:, None, None]
        expected = scaled_dot_product_attention(query.float().unsqueeze(2), keys, values, attn_mask=mask)
        expected = expected.flatten(1)
        if not float(torch.linalg.vector_norm(found - expected) / expected.norm()) <= TOLERANCE:
            return False
    return True
