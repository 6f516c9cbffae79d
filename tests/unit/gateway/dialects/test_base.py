"""Token counts of a call."""

from __future__ import annotations

from tidegate.gateway.dialects.base import count_usage
from tidegate.messages.work import Finish

STOP = Finish("stop", prompt_tokens=3, completion_tokens=2)


def test_choices_of_one_prompt_count_it_once() -> None:
    usage = count_usage([STOP, STOP, None, STOP], n=2)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 6, 12)
