"""The randomness of sampling: a pure function of (seed, position).

Nothing is drawn from a generator with state, so a token does not depend on which other requests were in
the batch, nor on whether the request was continued by another replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MANY = 32  # requests, from which on NumPy takes less time


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1), 32 random bits, for token `position` (from 0) of a request with `seed`."""
    return float(_uniform(seed & MASK, position))


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> list[float]:
    """Return the `uniform` of each request. Of many at once, as numbers that wrap around by themselves."""
    if len(seeds) < MANY:
        return list(map(uniform, seeds, positions))
    unsigned = np.array([seed & MASK for seed in seeds], np.uint64)
    found: list[float] = _uniform(unsigned, np.array(positions, np.uint64)).tolist()
    return found


def _uniform(seed: Any, position: Any) -> Any:
    return (_mix(_mix(seed) ^ (position * GOLDEN & MASK)) >> 32) / 4294967296.0


def _mix(value: Any) -> Any:
    """Apply SplitMix64's finaliser (Steele et al., 2014): every input bit changes half of the output bits."""
    value = (value + GOLDEN) & MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)
