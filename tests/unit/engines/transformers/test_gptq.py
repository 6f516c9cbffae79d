"""Packed codes and the weights that they stand for."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from tests.unit.sources.builders import packed, safetensors
from tidegate.engines.transformers.gptq import Joined, Unpacked, unpack
from tidegate.sources.gptq import Layer
from tidegate.sources.tensors import read_header


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_come_back_as_they_were_packed(bits: int) -> None:
    codes = [[(7 * column + 5 * row) % (1 << bits) for row in range(64)] for column in range(3)]
    words = [struct.unpack(f"<{2 * bits}i", stream) for stream in packed(codes, bits)]
    assert unpack(torch.tensor(words, dtype=torch.int32).T, bits).T.tolist() == codes


@pytest.mark.parametrize(("form", "zeros"), [("gptq", (8, 0)), ("gptq_v2", (7, 15))])
def test_a_weight_is_code_less_zero_times_scale(tmp_path: Path, form: str, zeros: tuple[int, int]) -> None:
    """Two groups of four inputs in a mixed order; a stored 15 of the first format is 0 less one."""
    order = [0, 1, 1, 0, 0, 1, 1, 0]
    codes, outputs = list(range(8)), 8
    file = tmp_path / "model.safetensors"
    raw = packed([codes] * outputs, 4) + packed([[7] * outputs, [15] * outputs], 4)
    raw += [struct.pack("<8e", *[0.5] * 8), struct.pack("<8e", *[2.0] * 8), struct.pack("<8i", *order)]
    shapes = {"qweight": ("I32", [1, 8]), "qzeros": ("I32", [2, 1]), "scales": ("F16", [2, 8])}
    safetensors(file, {**shapes, "g_idx": ("I32", [8])}, b"".join(raw))
    found = read_header(file)
    layer = Layer(found["qweight"], found["qzeros"], found["scales"], found["g_idx"], 4, 0)
    expected = [(code - zeros[group]) * (0.5, 2.0)[group] for code, group in zip(codes, order, strict=True)]
    weight = Unpacked(layer, form)
    assert weight[...].tolist() == [expected] * outputs
    assert Unpacked(layer, form, as_stored=True)[...].T.tolist() == [expected] * outputs
    assert Joined([weight, weight], torch.cat)[...].shape == (16, 8)
