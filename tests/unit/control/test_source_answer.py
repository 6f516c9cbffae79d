"""What the resolving process wrote, or something else."""

from __future__ import annotations

import pytest

from tidegate.control.source_answer import read_answer


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"path": 1}', '{"error": 3}', '{"path":"x","shape":{"layers":"a"}}']
)
def test_what_is_no_answer(text: str) -> None:
    assert read_answer(text) is None
