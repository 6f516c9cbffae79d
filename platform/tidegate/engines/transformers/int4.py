"""Computes with 4-bit weights on a CPU, by the kernel that PyTorch itself has: nothing is compiled.

It gives a row the same bits whatever rows are beside it (ADR 23 says why no second form of the weights stands
beside this one for many rows).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KERNEL_GROUPS = (128, 64, 32)
KERNEL_OUTPUTS = 16  # divide the outputs
MIDDLE = 8  # the kernel takes codes less this


class Int4Linear(nn.Module):
    """A linear layer of `plain`'s shape, whose bias it keeps. Its weights come with `hold`."""

    packed: Tensor
    scales: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias

    def hold(self, codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> None:
        """Take codes (uint8, inputs x outputs), zeros and scales (groups x outputs) and each input's group.

        Raises ValueError where the kernel does not know such groups.
        """
        order = groups.argsort(stable=True)
        size = len(groups) // len(scales)
        if size not in KERNEL_GROUPS or not torch.equal(groups[order], torch.arange(len(groups)) // size):
            raise ValueError(f"no kernel computes with {len(scales)} such groups of {len(groups)} inputs")
        by_output = codes[order].T.int().contiguous()
        halves = scales.bfloat16()
        offsets = (MIDDLE - zeros.bfloat16()) * halves
        self.register_buffer("packed", torch._convert_weight_to_int4pack_for_cpu(by_output, 1))
        self.register_buffer("scales", torch.stack([halves, offsets], dim=-1))
        # Plain attributes: looking a buffer up costs more than a tenth of the product for one row.
        self.kernel = self.packed, size, self.scales
        self.order = None if torch.equal(order, torch.arange(len(order))) else order

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        rows = inputs.reshape(-1, self.in_features)
        found = int4_product(rows, *self.kernel, self.order, self.bias)
        return found.view(*inputs.shape[:-1], self.out_features)


def int4_product(
    inputs: Tensor, packed: Tensor, size: int, scales: Tensor, order: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Map [rows, inputs] to [rows, outputs]. `order`: of the inputs by their groups, of `size` each."""
    rows = inputs.to(torch.bfloat16).contiguous()
    if order is not None:
        rows = rows.index_select(1, order)
    found = torch._weight_int4pack_mm_for_cpu(rows, packed, size, scales).to(inputs.dtype)
    if bias is not None:
        found += bias
    return found
