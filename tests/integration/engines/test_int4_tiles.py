"""Products of 4-bit weights by the processor's tiles, and that nothing breaks where it has none."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tidegate.engines.transformers.int4 import Int4Linear
from tidegate.engines.transformers.int4_tiles import MOST_ROWS, TiledInt4Linear, has_tiles, int4_linear

OUTPUTS, DEPTH = 192, 512
needs_tiles = pytest.mark.skipif(
    not (torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()),
    reason="the processor has no tiles for bfloat16, or the kernel does not lend them",
)


@pytest.fixture
def asks_anew() -> Iterator[None]:
    has_tiles.cache_clear()
    yield
    has_tiles.cache_clear()


def held(layer: Int4Linear, size: int, *, is_even: bool, is_ordered: bool = False) -> torch.Tensor:
    """Give the layer weights of groups of `size`, and return them as float32 [outputs, inputs]."""
    generator = torch.Generator().manual_seed(size)
    shape = (DEPTH // size, OUTPUTS)
    codes = torch.randint(16, (DEPTH, OUTPUTS), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
    zeros = torch.full_like(zeros, 8) if is_even else zeros
    scales = (torch.rand(shape, generator=generator) / 50).bfloat16().float()
    groups = torch.arange(DEPTH) // size
    if is_ordered:
        groups = groups[torch.randperm(DEPTH, generator=generator)]
    layer.hold(codes, zeros, scales, groups)
    return ((codes.float() - zeros.float()[groups]) * scales[groups]).T


@needs_tiles
@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("is_even", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_gets_the_product_of_its_weights_whatever_rows_are_beside_it(
    size: int, is_even: bool, is_ordered: bool, threads: int
) -> None:
    assert has_tiles()
    plain = torch.nn.Linear(DEPTH, OUTPUTS, dtype=torch.bfloat16)
    layer = int4_linear(plain)
    assert type(layer) is TiledInt4Linear
    weight = held(layer, size, is_even=is_even, is_ordered=is_ordered)
    inputs = torch.randn(MOST_ROWS + 70, DEPTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            found = layer(inputs)
            alone = [layer(inputs[:rows]) for rows in (0, 1, 2, 3, 4, 15, 16, 17, 63, 64, 65, MOST_ROWS + 1)]
            apart = torch.cat([layer(row) for row in inputs.unsqueeze(1)])
    finally:
        torch.set_num_threads(before)
    expected = inputs.float() @ weight.T + plain.bias.detach().float()
    assert float((found.float() - expected).norm() / expected.norm()) < 0.005
    assert torch.equal(apart, found)
    for some in alone:
        assert torch.equal(some, found[: len(some)])


@needs_tiles
def test_tiles_leave_those_of_other_products_as_they_were() -> None:
    """oneDNN uses the same tiles, and shapes them itself."""
    assert has_tiles()
    layer = int4_linear(torch.nn.Linear(DEPTH, OUTPUTS, bias=False))
    held(layer, 32, is_even=True)
    inputs = torch.randn(40, DEPTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(OUTPUTS, DEPTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    with torch.inference_mode():
        first = [
            torch.ops.mkldnn._linear_pointwise(inputs[:rows], packed, None, "none", [], "")
            for rows in (5, 40)
        ]
        for rows in (40, 5, 33):
            layer(inputs[:rows])
            for before in first:
                again = torch.ops.mkldnn._linear_pointwise(
                    inputs[: len(before)], packed, None, "none", [], ""
                )
                assert torch.equal(again, before)


@needs_tiles
def test_values_that_are_no_numbers_stay_in_their_row() -> None:
    assert has_tiles()
    layer = int4_linear(torch.nn.Linear(DEPTH, OUTPUTS, bias=False))
    held(layer, 64, is_even=True)
    for rows in (2, 20):
        inputs = torch.randn(rows, DEPTH, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.inference_mode():
            sound = layer(inputs)
            inputs[1, 7] = torch.nan
            found = layer(inputs)
        assert found[1].isnan().all()
        assert torch.equal(found[0], sound[0])
        assert torch.equal(found[2:], sound[2:])


def test_outputs_that_fill_no_block_are_for_pytorchs_kernel() -> None:
    assert type(int4_linear(torch.nn.Linear(DEPTH, 48))) is Int4Linear


@needs_tiles
@pytest.mark.usefixtures("asks_anew")
def test_an_operator_that_computes_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when PyTorch packs in another order."""
    pack = torch._convert_weight_to_int4pack_for_cpu
    calls = []

    def other(codes: torch.Tensor, inner: int) -> torch.Tensor:
        calls.append(codes)
        return pack(codes if len(calls) == 1 else codes.roll(1, 1), inner)

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack_for_cpu", other)
    with caplog.at_level(logging.WARNING):
        assert not has_tiles()
    assert "the operator int4_tiles is not used: it computes otherwise here" in caplog.text
