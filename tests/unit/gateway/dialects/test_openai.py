"""What both of OpenAI's text endpoints share."""

from __future__ import annotations

import pytest

from tidegate.gateway.dialects.openai import finite


@pytest.mark.parametrize(
    ("logprob", "sent"), [(-0.5, -0.5), (float("-inf"), -9999.0), (float("nan"), -9999.0), (-1e30, -9999.0)]
)
def test_logprobs_are_always_json_numbers(logprob: float, sent: float) -> None:
    assert finite(logprob) == sent
