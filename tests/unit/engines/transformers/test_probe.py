from __future__ import annotations

from typing import Any

import pytest
import torch

from tidegate.engines.transformers.int4 import Int4Linear
from tidegate.engines.transformers.probe import (
    FORCED,
    TOLERANCE,
    Verdict,
    probe_rows,
    relative_error,
    tolerance_of,
)


def tokenizer(text: str, **_options: object) -> dict[str, Any]:
    return {"input_ids": list(range(len(text.split())))}


@pytest.mark.parametrize("context_length", [4, 16, 1024])
def test_probe_rows_fit_the_context(context_length: int) -> None:
    rows = probe_rows(tokenizer, context_length, 1000)
    assert len({len(row) for row in rows}) == (4 if context_length > 100 else len({len(row) for row in rows}))
    assert all(2 <= len(row) <= context_length for row in rows)
    assert max(map(len, rows)) == min(context_length, 33 + FORCED)


def test_the_error_is_relative_to_the_spread_of_the_logits() -> None:
    expected = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert relative_error(expected, expected) == 0
    assert relative_error(expected * 1.01 + 0, expected) == pytest.approx(0.01, rel=0.1)
    assert relative_error(1000 * expected, 1000 * expected.roll(1)) > 0.5
    assert relative_error(expected + float("nan"), expected) == float("inf")


def test_a_verdict_is_right_within_its_tolerance() -> None:
    assert Verdict(1e-5, TOLERANCE["float32"]).is_right
    assert not Verdict(0.1, TOLERANCE["bfloat16"]).is_right
    assert not Verdict(float("inf"), TOLERANCE["bfloat16"]).is_right


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_layers_that_round_to_bfloat16_are_not_held_to_more(precision: str) -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert tolerance_of(plain, precision) == TOLERANCE[precision]
    rounded = torch.nn.Sequential(Int4Linear(torch.nn.Linear(4, 4)))
    assert tolerance_of(rounded, precision) == TOLERANCE["bfloat16"]


def test_probe_rows_stay_within_the_embedding() -> None:
    assert {token for row in probe_rows(tokenizer, 64, 5) for token in row} <= set(range(5))
    assert probe_rows(lambda *_args, **_options: {"input_ids": [7]}, 4, 5) == [[0] * 4] * 4
