"""What differs between two JSON values, for the audit log. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_CHARACTERS = 2000  # of one text


def differences(before: Any, after: Any) -> tuple[Any, Any]:
    """Return both values without what is equal in them. A field that only one has is in that one alone."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return _bounded(before), _bounded(after)
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for name in dict.fromkeys([*before, *after]):
        if name in before and name in after:
            if before[name] != after[name]:
                old[name], new[name] = differences(before[name], after[name])
        elif name in before:
            old[name] = _bounded(before[name])
        else:
            new[name] = _bounded(after[name])
    return old, new


def _bounded(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        return value[:MOST_CHARACTERS] + "…"
    return value
