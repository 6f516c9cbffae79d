"""The history of a model's revisions: numbers, causes, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from tests.unit.control.builders import model
from tidegate.control.desired import ModelRecord, RevisionRecord, spec_on_wire
from tidegate.control.history import MAX_CAUSE_CHARACTERS, cause_of, kept, views
from tidegate.control.packing import Placement
from tidegate.messages.registry import RevisionReport

PROOF = RevisionReport("one", "r", 5.0, True)
LATER = replace(PROOF, at=6.0)


def record(*revisions: RevisionRecord) -> ModelRecord:
    return ModelRecord("one", 1, revisions={each.revision: each for each in revisions})


def revision(name: str, **fields: object) -> RevisionRecord:
    return replace(RevisionRecord(name, {"precision": name}), **fields)


def numbers(history: Sequence[RevisionRecord]) -> dict[str, int]:
    return {each.revision: each.number for each in history}


def test_revisions_are_numbered_in_the_order_in_which_they_came() -> None:
    history = kept((), record(revision("a"), revision("b")))
    assert numbers(history) == {"a": 1, "b": 2}
    # `a` comes back, and is the revision that it was.
    assert kept(history, record(revision("b"), revision("a"))) == history
    assert numbers(kept(history, record(revision("c")))) == {"a": 1, "b": 2, "c": 3}


def test_the_newest_are_kept_and_those_that_stand() -> None:
    history: Sequence[RevisionRecord] = ()
    for name in "abcdefg":
        history = kept(history, record(revision("a"), revision(name)), limit=3)
    assert numbers(history) == {"a": 1, "e": 5, "f": 6, "g": 7}
    history = kept(history, record(revision("g")), limit=3)
    assert numbers(history) == {"e": 5, "f": 6, "g": 7}
    assert numbers(kept(history, record(revision("h")), limit=1)) == {"h": 8}


def test_an_entry_stays_as_it_was_first_written_but_for_its_first_proof() -> None:
    new = revision("a", failures=2, attempt_at=3.0, retired_at=4.0, placement=Placement("g", 1.0))
    (first,) = kept((), record(new))
    assert first == revision("a", number=1)
    (proved,) = kept((first,), record(replace(new, proof=PROOF)))
    assert proved == replace(first, proof=PROOF)
    changed = replace(new, proof=LATER, spec={"scaling": {}}, cause="undo to 1")
    assert kept((proved,), record(changed)) == (proved,)


def test_an_entry_of_before_learns_its_content() -> None:
    history = kept((), record(revision("a", proof=PROOF)))
    (learnt,) = kept(history, record(revision("a", proof=PROOF, digest="d", commit="c")))
    assert (learnt.number, learnt.digest, learnt.commit) == (1, "d", "c")


def test_views_are_newest_first_and_say_what_stands() -> None:
    spec = {"source": {"uri": "/w"}}
    history = kept((), record(*(revision(name, spec=spec, digest=name) for name in "abc")))
    now = ModelRecord("one", 1, {"b": 100}, {"b": history[1], "c": replace(history[2], message="no room")})
    shown = views(history, now)
    assert [(each.number, each.state, each.weight, each.message) for each in shown] == [
        (3, "Standing", 0, "no room"),
        (2, "Serving", 100, ""),
        (1, "Stored", 0, ""),
    ]
    assert (shown[0].source, shown[0].digest, shown[0].spec) == ("/w", "c", spec)


@pytest.mark.parametrize(
    ("before", "after", "cause"),
    [
        ({}, {"precision": "float16"}, "precision: auto → float16"),
        ({"source": {"uri": "/a"}}, {"source": {"uri": "/b"}}, "source.uri: /a → /b"),
        ({}, {"engine": {"name": "simulated", "maxSlots": 3}}, "engine.maxSlots: 0 → 3"),
        (
            {"engine": {"name": "simulated", "args": {"a": True}}},
            {"contextLength": 64},
            "engine.args.a: true → none; contextLength: 0 → 64",
        ),
        ({}, {"scaling": {"maxReplicas": 2}}, "source content changed"),
    ],
)
def test_the_cause_is_what_differs(before: dict[str, Any], after: dict[str, Any], cause: str) -> None:
    old, new = (spec_on_wire(model(**spec).spec) for spec in (before, after))
    assert cause_of(record(RevisionRecord("a", old)), new) == cause


def test_a_cause_is_bounded_and_the_first_revision_has_none_before_it() -> None:
    spec = spec_on_wire(model(source={"uri": f"/{'w' * 2000}"}).spec)
    assert cause_of(record(), spec) == "created"
    assert len(cause_of(record(revision("a")), spec)) == MAX_CAUSE_CHARACTERS
