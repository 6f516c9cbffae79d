"""Bodies on their way in."""

from __future__ import annotations

import pytest

from tidegate.errors import BodiesFull
from tidegate.gateway.intake import SMALL_BYTES, Intake

LARGE = 4 * SMALL_BYTES


async def test_bodies_together_have_a_bound_and_one_key_half_of_it() -> None:
    intake = Intake(4 * LARGE)
    async with intake.body("a") as first, intake.body("a") as second, intake.body("b") as other:
        first.count(LARGE)
        second.count(LARGE // 2)
        second.count(LARGE)  # it is told how much there is in all
        assert intake.held_bytes == 2 * LARGE
        with pytest.raises(BodiesFull, match="one key's") as refused:
            second.count(LARGE + 1)
        assert refused.value.headers() == {"retry-after": "1"}
        other.count(2 * LARGE)
        async with intake.body("c") as third:
            with pytest.raises(BodiesFull, match=str(4 * LARGE)):
                third.count(LARGE)
            third.count(SMALL_BYTES)  # small ones are always taken
            assert (third.is_large, first.is_large) == (False, True)
    assert (intake.held_bytes, dict(intake.held)) == (0, {})
