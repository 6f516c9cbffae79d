from __future__ import annotations

from typing import Any

import pytest

from tidegate.control_api.differences import MOST_CHARACTERS, differences


@pytest.mark.parametrize(
    ("before", "after", "old", "new"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2, "d": 4}}, {"b": {"d": 3}}, {"b": {"d": 4}}),
        ({"a": 1}, {"b": 2}, {"a": 1}, {"b": 2}),
        ({"a": [1]}, {"a": [1, 2]}, {"a": [1]}, {"a": [1, 2]}),
        ({"a": None}, {"a": {"b": 1}}, {"a": None}, {"a": {"b": 1}}),
        (None, {"a": 1}, None, {"a": 1}),
        ({"a": 1}, {"a": 1}, {}, {}),
    ],
)
def test_only_what_differs_is_left(before: Any, after: Any, old: Any, new: Any) -> None:
    assert differences(before, after) == (old, new)


def test_long_texts_are_cut() -> None:
    _, new = differences({"a": ""}, {"a": "x" * 2 * MOST_CHARACTERS})
    assert len(new["a"]) == MOST_CHARACTERS + 1
