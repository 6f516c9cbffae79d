"""Computes with 4-bit weights by the tiles for bfloat16 that some processors have (AMX).

PyTorch's own kernel (`int4`) multiplies in float32 there too, which for many rows takes two to seven times
as long (ADR 31). `int4_tiles.c` takes the same packed weights and gives the same but for the order of its
sums.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from tidegate.engines.transformers.int4 import Int4Linear
from tidegate.engines.transformers.native import is_ready

BLOCK = 64  # divides the outputs
TILE = 16  # rows
MOST_ROWS = 512  # that are computed at a time, which bounds the room for them
TOLERANCE = 0.005  # of outputs in bfloat16, beside the kernel of PyTorch


class TiledInt4Linear(Int4Linear):
    """An `Int4Linear` whose products the operator computes."""

    sums: bool

    def hold(self, codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> None:
        super().hold(codes, zeros, scales, groups)
        self.sums = bool(self.scales[..., 1].any())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        rows = inputs.reshape(-1, self.in_features)
        found = tiled_product(rows, *self.kernel, self.order, self.bias, self.sums)
        return found.view(*inputs.shape[:-1], self.out_features)


def tiled_product(
    inputs: Tensor,
    packed: Tensor,
    size: int,
    scales: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    sums: bool,
    most: int = MOST_ROWS,  # TorchScript knows no names of a module
    tile: int = TILE,
) -> Tensor:
    """Compute what `int4_product` does. `sums`: whether anything is added to a group's weights."""
    rows = inputs.to(torch.bfloat16).contiguous()
    if order is not None:
        rows = rows.index_select(1, order)
    count, depth = rows.shape
    at_once = min((count + tile - 1) // tile * tile, most)
    tiled = rows.new_empty([at_once, depth])
    kept = torch.empty([at_once if sums else 0, scales.shape[0]], dtype=torch.float32)
    held = rows.new_empty([count, scales.shape[1]])
    torch.ops.tidegate.int4_product(held, rows, packed, scales, kept, tiled, size)
    found = held.to(inputs.dtype)
    if bias is not None:
        found += bias
    return found


def int4_linear(plain: nn.Linear) -> Int4Linear:
    """Return what stands for a linear layer whose weights will have 4 bits, as fast as this machine can."""
    kind = TiledInt4Linear if plain.out_features % BLOCK == 0 and has_tiles() else Int4Linear
    return kind(plain)


@cache
def has_tiles() -> bool:
    """Tell whether the operator runs here."""
    has = torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()
    return has and torch.cpu._init_amx() and is_ready("int4_tiles", _is_alike)


def _is_alike() -> bool:
    """Compare with PyTorch's kernel, for rows with tiles and without, which get the same bits."""
    generator = torch.Generator().manual_seed(0)
    depth, size = 256, 64
    plain, tiled = (kind(nn.Linear(depth, BLOCK, bias=False)) for kind in (Int4Linear, TiledInt4Linear))
    codes, zeros = (torch.randint(16, shape, generator=generator) for shape in ((depth, BLOCK), (4, BLOCK)))
    scales = torch.rand(4, BLOCK, generator=generator)
    inputs = torch.randn(70, depth, generator=generator).bfloat16()
    for layer in (plain, tiled):
        layer.hold(codes.to(torch.uint8), zeros.to(torch.uint8), scales, torch.arange(depth) // size)
    expected, found = plain(inputs).float(), tiled(inputs)
    same = all(torch.equal(tiled(inputs[:rows]), found[:rows]) for rows in (1, 2, 3, 17))
    error = torch.linalg.vector_norm(found.float() - expected) / expected.norm()
    return same and float(error) <= TOLERANCE
