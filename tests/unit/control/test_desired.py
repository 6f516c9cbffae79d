"""Revisions: equal where no new replica is needed, different where one is."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.control.builders import World, model
from tidegate.control.desired import (
    ModelRecord,
    RevisionRecord,
    named,
    recorded_spec,
    revision_of,
    spec_on_wire,
    target_of,
)
from tidegate.control.observed import SourceState
from tidegate.control.resources import Model
from tidegate.sources.facts import DecoderShape

LOADED: dict[str, Any] = {"engine": {"name": "transformers"}, "source": {"uri": "/w"}}


def resolved(digest: str, **found: Any) -> SourceState:
    return SourceState("resolved", "/w", 7, "none", "float32", digest=digest, **found)


def sourced(**spec: Any) -> Model:
    return model(**{**LOADED, **spec})


def test_a_specs_hash_never_changes() -> None:
    """A model that runs would restart on an upgrade; and its revision would not be found in its history."""
    assert revision_of(model().spec) == "55b1b51e9c"
    assert revision_of(sourced().spec) == "feddb78dd4"


def test_the_task_of_the_version_before_says_nothing() -> None:
    before = sourced(task="text-generation").spec
    assert (before.task, revision_of(before)) == ("auto", "feddb78dd4")
    assert revision_of(sourced(task="embed").spec) != "feddb78dd4"


@pytest.mark.parametrize(
    "spec",
    [
        {"scaling": {"minReplicas": 0, "maxReplicas": 9}},
        {"queue": {"maxRequests": 5}},
        {"precision": "auto"},
    ],
)
def test_what_acts_in_place_keeps_the_revision(spec: dict[str, Any]) -> None:
    assert revision_of(model(**spec).spec) == revision_of(model().spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"precision": "float32"},
        {"contextLength": 512},
        {"resources": {"cpus": 1}},
        {"engine": {"name": "simulated", "maxSlots": 3}},
        {"source": {"uri": "/elsewhere"}},
        {"source": {"uri": "/w"}, "engine": {"name": "transformers"}, "chatTemplate": "vicuna"},
    ],
)
def test_what_needs_a_new_replica_makes_a_revision(spec: dict[str, Any]) -> None:
    assert revision_of(model(**spec).spec) != revision_of(model().spec)


def test_an_old_revision_runs_its_own_spec_with_todays_scaling() -> None:
    old = RevisionRecord("r", spec_on_wire(model(precision="float32").spec))
    today = model(scaling={"minReplicas": 2, "maxReplicas": 4}).spec
    spec = recorded_spec(old, today)
    assert (spec.precision, spec.scaling.max_replicas) == ("float32", 4)
    assert recorded_spec(old, None).scaling.max_replicas == 1
    # A version before let pass what is refused now.
    wrong = {"name": "transformers", "args": {"kv_page": True}}
    before = RevisionRecord("r", old.spec | LOADED | {"engine": wrong})
    assert recorded_spec(before, today).engine.args == {"kv_page": True}


def target(wanted: Model, record: ModelRecord, digest: str = "", **found: Any) -> str | None:
    answers = {("one", revision_of(wanted.spec)): resolved(digest, **found)} if digest else {}
    return target_of(wanted, record, answers)


def test_a_revision_is_named_by_its_spec_and_its_content() -> None:
    nothing = ModelRecord("one", 1)
    names = {target(sourced(), nothing, "a"), target(sourced(), nothing, "b")}
    names.add(target(sourced(precision="float16"), nothing, "a"))
    assert len(names - {None, revision_of(sourced().spec)}) == 3
    assert target(sourced(), nothing, "a") == named(sourced().spec, resolved("a"))


def test_nobody_knows_the_revision_before_its_content() -> None:
    assert target(sourced(), ModelRecord("one", 1)) is None
    assert target_of(model(), ModelRecord("one", 1), {}) == revision_of(model().spec)


def test_a_checkpoint_that_cannot_give_what_is_asked_makes_no_revision() -> None:
    asked = sourced(contextLength=4096)
    assert target(asked, ModelRecord("one", 1), "a", shape=DecoderShape(positions=2048)) is None


def test_what_is_recorded_stays_whatever_another_look_says() -> None:
    """As one of another model of the same source."""
    old = RevisionRecord(revision_of(sourced().spec), spec_on_wire(sourced().spec), checkpoint="/w")
    new = RevisionRecord("n", spec_on_wire(sourced().spec), spec_hash=old.revision, digest="a")
    for kept in (old, new):
        record = ModelRecord("one", 1, {kept.revision: 100}, {kept.revision: kept})
        assert target(sourced(), record, "b") == kept.revision
        assert target(sourced(precision="float16"), record) is None
    both = ModelRecord("one", 1).with_target(old).with_target(new).with_target(old)
    assert target(sourced(), both) == old.revision


def test_a_revision_says_what_it_was_made_of_and_why() -> None:
    world = World(sourced())
    world.source(0, resolved("a", commit="c"))
    first = world.settle("one")
    world.models = [sourced(precision="float16", scaling={"maxReplicas": 3})]
    world.source(0, resolved("a", commit="c"))
    world.step()
    kept = list(world.records["one"].revisions.values())
    assert [(each.commit, each.digest, each.cause) for each in kept] == [
        ("c", "a", "created"),
        ("c", "a", "precision: auto → float16"),
    ]
    world.models = [sourced()]
    world.step()
    assert list(world.records["one"].revisions) == [first]
    assert world.records["one"].weights == {first: 100}
