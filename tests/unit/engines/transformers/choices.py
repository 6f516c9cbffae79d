"""A scripted run of the sampler: rows of every kind that come and go, over logits that follow from integers
alone. `recorded_choices.json` holds what the code chose before its steps were a tuple (commit 512f17d)."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 211
STEPS = 24
SAMPLINGS: list[dict[str, Any]] = [
    {"seed": 1, "temperature": 0.0},
    {"seed": 2, "temperature": 1.0},
    {"seed": 2, "temperature": 1.0, "top_p": 0.8},
    {"seed": 3, "temperature": 0.7, "top_p": 0.3},
    {"seed": 4, "temperature": 0.0, "presence_penalty": 1.5},
    {"seed": 4, "temperature": 0.0, "frequency_penalty": 0.7, "top_logprobs": 2},
    {"seed": 5, "temperature": 1.2, "presence_penalty": -0.5, "frequency_penalty": 1.9},
    {"seed": 6, "temperature": 1.2, "top_p": 0.9, "presence_penalty": 0.4, "top_logprobs": 0},
    {"seed": 7, "temperature": 0.0, "top_logprobs": 3},
    {"seed": 8, "temperature": 1e-6, "top_p": 0.5},
    {"seed": 9, "temperature": 2.0, "top_p": 0.0},
    {"seed": 2**62, "temperature": 1.7, "top_logprobs": 1},
    {"seed": -1, "temperature": 1.0, "frequency_penalty": -0.3},
    {"seed": 10, "temperature": 0.0},
]


def rows_at(step: int) -> list[int]:
    """The rows of a step: some sit out, so that rows are at different positions."""
    return [row for row in range(len(SAMPLINGS)) if (step + row) % 5]


def logits_of(rows: list[int], step: int, dtype: torch.dtype) -> torch.Tensor:
    ids = torch.arange(VOCABULARY)
    mixed = [((ids + 1) * 2654435761 + row * 40503 + step * 7919) % 1000003 for row in rows]
    return (torch.stack(mixed).double() / 1000003 * 9).to(dtype)
