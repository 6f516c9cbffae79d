"""The history of a model's revisions: what each was made from, by whom, and why. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tidegate.control.desired import REVISION_FIELDS, ModelRecord

MAX_CAUSE_CHARACTERS = 500
CREATED, CONTENT_CHANGED = "created", "source content changed"


def cause_of(record: ModelRecord, spec: Mapping[str, Any]) -> str:
    """Say what makes `spec` (as on the wire) another revision than the record's last target."""
    before = next(reversed(record.revisions.values()), None)
    if before is None:
        return CREATED
    old, new = _flat(before.spec), _flat(spec)
    changes = [
        f"{name}: {old.get(name, 'none')} → {new.get(name, 'none')}"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]
    text = "; ".join(changes) or CONTENT_CHANGED
    return text if len(text) <= MAX_CAUSE_CHARACTERS else f"{text[: MAX_CAUSE_CHARACTERS - 3]}..."


def _flat(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that make a revision by their paths, without those that are empty."""
    found: dict[str, str] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                walk(f"{path}.{name}", item)
        elif value not in (None, "", []):
            found[path] = value if isinstance(value, str) else json.dumps(value)

    for name in REVISION_FIELDS:
        walk(name, spec.get(name))
    return found
