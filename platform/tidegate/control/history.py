"""The history of a model's revisions: what each was made from, by whom, and why. Pure.

It is a list of records, numbered 1, 2, 3, ..., the newest last. The hosts store what `kept` returns: one file
each on a laptop, one `ControllerRevision` each in a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from tidegate.control.desired import REVISION_FIELDS, ModelRecord, RevisionRecord
from tidegate.control.resources import FIRST_TASK
from tidegate.messages.rollouts import RevisionView

HISTORY_LIMIT = 10
MAX_CAUSE_CHARACTERS = 500
CREATED, CONTENT_CHANGED = "created", "source content changed"
# What a record says of its revision's life, and not of what it was made from.
OF_A_LIFE = (
    "proof",
    "attempt_at",
    "failures",
    "retry_at",
    "reason",
    "message",
    "retired_at",
    "placement",
    "waits_since",
    "restarted",
)


def kept(
    stored: Sequence[RevisionRecord], record: ModelRecord, limit: int = HISTORY_LIMIT
) -> tuple[RevisionRecord, ...]:
    """Return the history with the revisions that are new: the newest `limit`, and all that stand. An entry
    stays as it was first written but for its first proof, which says that it has served."""
    known = {each.revision: each for each in stored}
    number = max((each.number for each in stored), default=0)
    for each in record.revisions.values():
        past = known.get(each.revision)
        if past is None:
            number += 1
            known[each.revision] = replace(unborn(each), number=number, proof=each.proof)
        elif not past.is_proved or not past.digest:
            digest, commit = each.digest or past.digest, each.commit or past.commit
            known[each.revision] = replace(past, proof=past.proof or each.proof, digest=digest, commit=commit)
    ordered = sorted(known.values(), key=lambda each: each.number)
    newest = {each.revision for each in ordered[-limit:]}
    return tuple(each for each in ordered if each.revision in newest | record.revisions.keys())


def unborn(each: RevisionRecord) -> RevisionRecord:
    """Return a record as it begins: its revision has to find its place, and to prove itself."""
    names = RevisionRecord.__struct_fields__
    return RevisionRecord(**{name: getattr(each, name) for name in names if name not in OF_A_LIFE})


def views(stored: Sequence[RevisionRecord], record: ModelRecord) -> list[RevisionView]:
    """Return the history for people and programs, the newest first."""
    return [_view(each, record) for each in reversed(stored)]


def _view(each: RevisionRecord, record: ModelRecord) -> RevisionView:
    standing = record.revisions.get(each.revision)
    weight = record.weights.get(each.revision, 0)
    is_refused = record.rollout is not None and record.rollout.refuses(each.revision)
    state = "Standing" if standing is not None else "Stored"
    return RevisionView(
        revision=each.revision,
        number=each.number,
        created=each.created,
        cause=each.cause,
        author=each.author,
        source=str((each.spec.get("source") or {}).get("uri", "")),
        commit=each.commit,
        digest=each.digest,
        weight=weight,
        state="Serving" if weight else "Refused" if is_refused else state,
        message=standing.message if standing is not None else "",
        spec=each.spec,
    )


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
        walk(name, "auto" if name == "task" and spec.get(name) == FIRST_TASK else spec.get(name))
    return found
