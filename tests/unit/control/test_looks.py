"""Later looks at a source: other content is another revision, and an old one comes back with its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from tests.unit.control.builders import NOW, World, model
from tidegate.control.desired import (
    UNCHANGED,
    ModelRecord,
    RevisionRecord,
    revision_of,
    spec_on_wire,
)
from tidegate.control.looks import looked, next_look, questions, recheck, undo
from tidegate.control.observed import Capacity, SourceState
from tidegate.control.plan import PoolPlan
from tidegate.control.resources import Model
from tidegate.sources.facts import DecoderShape


def sourced(uri: str = "/w", source: dict[str, Any] | None = None, **spec: Any) -> Model:
    return model(**{"engine": {"name": "transformers"}, "source": {"uri": uri, **(source or {})}, **spec})


def resolved(digest: str, **found: Any) -> SourceState:
    return SourceState(
        "resolved", f"/cache/{digest}", 7, "none", "float32", commit=f"c{digest}", digest=digest, **found
    )


class Looking(World):
    """A world whose model serves content "a"."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(sourced(**spec))
        self.source(0, resolved("a"))
        self.first = self.settle("one")
        self.see(sources={})

    @property
    def record(self) -> ModelRecord:
        found: ModelRecord = self.records["one"]
        return found

    def ask(self, change: Callable[[ModelRecord], ModelRecord]) -> None:
        self.records["one"] = change(self.record)

    def recheck(self) -> None:
        self.ask(lambda record: recheck(record, self.models[0], "ann", self.now))

    def undo(self, goal: RevisionRecord) -> None:
        self.ask(lambda record: undo(record, self.models[0], goal, "ann", self.now))

    def finds_other_content(self, revision: str) -> None:
        """A replica that starts does."""
        self.report("one", revision, proved=False, reason="SourceChanged", message="/w holds other bytes.")

    def undone(self) -> RevisionRecord:
        """A second content was taken back for the first, which serves."""
        goal = self.stored(1)
        self.settled("b")
        self.undo(goal)
        self.answer(resolved("a"))
        self.up()
        return goal

    def answer(self, state: SourceState) -> PoolPlan:
        """Answer the look, once it has been asked for."""
        asked = self.step().resolve
        assert self.record.look is not None
        assert asked == (("one", self.record.look.key),)
        self.see(sources={asked[0]: state})
        plan = self.step()
        self.see(sources={})
        assert not self.step().resolve
        return plan

    def settled(self, content: str) -> str:
        """The source holds other content, which is looked at and comes up."""
        self.recheck()
        self.answer(resolved(content))
        return self.up()

    def up(self) -> str:
        """The newest revision proves itself and serves, and those before it have drained."""
        revision = str(next(reversed(self.record.revisions)))
        self.report("one", revision)
        self.replica("one", revision)
        self.step()
        for old in self.record.revisions:
            self.depth("one", old, 0, 0)
        for _ in range(5):
            self.step()
        assert self.record.weights == {revision: 100}
        assert list(self.record.revisions) == [revision]
        self.see(reports={}, replicas=())  # the registry forgets those that are gone
        self.report("one", revision)
        self.replica("one", revision)
        return revision

    def stored(self, number: int) -> RevisionRecord:
        """The newest revision as a history keeps it."""
        return replace(next(reversed(self.record.revisions.values())), number=number)


def test_the_same_content_restarts_nothing() -> None:
    world = Looking()
    before = world.record.revisions
    world.recheck()
    world.answer(replace_path(resolved("a"), "/moved"))
    assert world.record.revisions == before
    assert world.record.look is not None
    assert (world.record.look.ended > 0, world.record.look.message) == (True, UNCHANGED)


def replace_path(state: SourceState, path: str) -> SourceState:
    return SourceState(state.state, path, commit="another commit of the same", digest=state.digest)


def test_other_content_is_another_revision_that_says_so() -> None:
    world = Looking()
    world.recheck()
    world.answer(resolved("b"))
    new = next(reversed(world.record.revisions.values()))
    assert world.record.weights == {world.first: 100}, "it proves itself first"
    assert (new.digest, new.checkpoint, new.cause, new.author) == (
        "b",
        "/cache/b",
        "source content changed",
        "ann",
    )
    assert world.up() == new.revision != world.first


def test_content_that_comes_back_starts_nothing_that_stands() -> None:
    world = Looking()
    world.recheck()
    world.answer(resolved("b"))
    world.recheck()
    world.answer(resolved("a"))
    assert list(world.record.revisions) == [world.first]
    assert world.record.weights == {world.first: 100}
    world.recheck()
    world.answer(resolved("a"))
    assert world.record.look is not None
    assert world.record.look.message == UNCHANGED


@pytest.mark.parametrize(
    ("answer", "capacity", "reason"),
    [
        (SourceState("failed", reason="Offline", message="No network."), Capacity(4, 0), "Offline"),
        (resolved("b", shape=DecoderShape(positions=16)), Capacity(4, 0), "InvalidEngineArgs"),
        (resolved("b"), Capacity(4, 0, memory_bytes=1), "TooLittleMemory"),
    ],
)
def test_what_cannot_be_served_changes_nothing(answer: SourceState, capacity: Capacity, reason: str) -> None:
    world = Looking(contextLength=32)
    before = world.record.revisions
    world.see(capacity=capacity)
    world.recheck()
    plan = world.answer(answer)
    assert world.record.revisions == before
    assert plan.entries["one"].ready
    assert world.record.look is not None
    assert world.record.look.reason == reason


def test_a_record_of_before_learns_its_content_and_then_sees_a_change() -> None:
    world = Looking()
    name = revision_of(world.models[0].spec)
    old = RevisionRecord(name, spec_on_wire(world.models[0].spec), checkpoint="/w", proof=None)
    world.records["one"] = ModelRecord("one", 1, {name: 100}, {name: old})
    world.recheck()
    world.answer(resolved("a"))
    assert [(kept.revision, kept.digest) for kept in world.record.revisions.values()] == [(name, "a")]
    world.recheck()
    world.answer(resolved("a"))
    assert list(world.record.revisions) == [name]
    world.recheck()
    world.answer(resolved("b"))
    assert len(world.record.revisions) == 2


def test_a_changed_spec_ends_a_look() -> None:
    world = Looking()
    world.recheck()
    world.models = [sourced(precision="float16")]
    world.step()
    assert world.record.look is not None
    assert world.record.look.reason == "Superseded"


def test_it_is_looked_at_as_often_as_the_spec_says() -> None:
    world = Looking(source={"recheckSeconds": 60})
    due = next_look(world.models[0], world.record)
    assert due == world.record.revisions[world.first].created + 60
    assert world.plan().next_at == due
    world.now = due
    world.answer(resolved("a"))
    assert world.record.look is not None
    assert next_look(world.models[0], world.record) == world.record.look.ended + 60
    never = Looking()
    assert next_look(never.models[0], never.record) is None


def test_when_to_look_is_no_part_of_a_revision() -> None:
    assert revision_of(sourced(source={"recheckSeconds": 60}).spec) == revision_of(sourced().spec)


def test_first_looks_at_one_source_are_one_question_and_later_ones_are_their_own() -> None:
    both = [model("one", **LOADED), model("two", **LOADED)]
    asked = questions(both, {})
    assert len(asked) == 2
    assert {each.identity for each in asked.values()} == {"/w"}
    world = Looking()
    world.recheck()
    (later,) = questions(world.models, world.records).values()
    assert (later.identity != "/w", later.arguments) == (True, ["/w"])


LOADED: dict[str, Any] = {"engine": {"name": "transformers"}, "source": {"uri": "/w"}}


# Undo --------------------------------------------------------------------------------------------------


def test_undo_looks_first_and_brings_back_spec_and_content() -> None:
    world = Looking()
    goal = world.stored(3)
    world.models = [sourced("/other", precision="float16", scaling={"maxReplicas": 4})]
    world.source(0, resolved("b"))
    world.step()
    second = world.up()
    world.see(sources={})
    world.undo(goal)
    (question,) = questions(world.models, world.records).values()
    assert question.arguments == ["/w", "--commit", "ca", "--digest", "a", "--since", str(int(NOW))]
    world.step()
    assert list(world.record.revisions) == [second], "nothing moves before the answer"
    plan = world.answer(resolved("a"))
    assert world.record.weights == {second: 100}
    back = world.record.revisions[goal.revision]
    assert (back.cause, back.author, back.checkpoint) == ("undo to 3", "ann", "/cache/a")
    (app,) = (app for app in plan.applications if app.revision == goal.revision)
    assert (app.spec.precision, app.spec.scaling.max_replicas) == ("auto", 4)
    assert world.up() == goal.revision
    # The spec is the user's, and a changed one is followed again.
    world.models = [sourced("/third")]
    world.step()
    assert world.record.pinned is None
    assert list(world.plan().resolve) == [("one", revision_of(world.models[0].spec))]


def test_undo_to_what_the_source_no_longer_holds_moves_nothing_and_says_why() -> None:
    world = Looking()
    goal = world.stored(1)
    second = world.settled("b")
    world.undo(goal)
    plan = world.answer(SourceState("failed", reason="SourceChanged", message="/w holds other bytes."))
    assert list(world.record.revisions) == [second]
    assert (world.record.pinned, plan.entries["one"].ready) == (None, True)
    assert world.record.look is not None
    assert (
        world.record.look.message == f"Revision 1 ({goal.revision}) cannot come back: /w holds other bytes."
    )


def test_a_replica_that_finds_other_content_makes_its_source_be_looked_at() -> None:
    world = Looking()
    world.finds_other_content(world.first)
    world.answer(resolved("b"))
    assert world.record.revisions[str(next(reversed(world.record.revisions)))].digest == "b"
    assert world.up() != world.first


def test_it_is_looked_at_once_for_each_replica_that_says_so() -> None:
    """What lies there may be whole again: the next replica finds out."""
    world = Looking()
    world.finds_other_content(world.first)
    world.answer(resolved("a"))
    assert not world.step().resolve
    world.finds_other_content(world.first)
    assert world.step().resolve


def test_an_undo_is_not_given_up_for_what_lies_there_now() -> None:
    world = Looking()
    goal = world.undone()
    world.finds_other_content(goal.revision)
    assert not world.step().resolve


def test_undo_to_what_still_stands_starts_and_asks_nothing() -> None:
    world = Looking()
    goal = world.stored(1)
    world.recheck()
    world.answer(resolved("b"))
    world.undo(goal)
    plan = world.step()
    assert plan.resolve == ()
    assert list(world.record.revisions) == [world.first]
    assert [app.revision for app in plan.applications] == [world.first]


def test_an_undone_content_does_not_come_back_with_the_next_look() -> None:
    world = Looking()
    goal = world.undone()
    for content in ("b", "a"):
        world.recheck()
        world.answer(resolved(content))
        assert list(world.record.revisions) == [goal.revision]
    world.recheck()
    world.answer(resolved("c"))
    assert world.record.pinned is None
    assert world.up() not in (goal.revision, world.first)


def test_a_recheck_looks_at_what_the_spec_names_also_under_an_undo() -> None:
    world = Looking()
    goal = world.stored(1)
    world.models = [sourced("/other")]
    world.source(0, resolved("b"))
    world.step()
    world.undo(goal)
    world.recheck()
    (question,) = questions(world.models, world.records).values()
    assert (world.record.pinned is not None, question.arguments) == (True, ["/other"])


def test_undo_of_a_model_without_a_source_needs_no_look() -> None:
    world = World(model())
    first = world.settle("one")
    kept = world.records["one"].revisions[first]
    goal = replace(kept, number=1)
    world.models = [model(precision="float16")]
    world.step()
    second = str(next(reversed(world.records["one"].revisions)))
    world.report("one", second)
    world.replica("one", second)
    world.step()
    record = world.records["one"]
    world.see(reports={})
    world.records["one"] = replace(record, revisions={second: record.revisions[second]})
    world.records["one"] = undo(world.records["one"], world.models[0], goal, "", world.now)
    assert [app.revision for app in world.step().applications] == [second, first]


def told(plan: PoolPlan) -> list[tuple[str, bool]]:
    """What is told of looks, and whether it is a warning."""
    reasons = ("SourceLookedAt", "Offline")
    return [(note.reason, note.is_trouble) for note in plan.notes if note.reason in reasons]


def test_what_a_look_found_is_told_to_who_waits_for_it() -> None:
    world = Looking(source={"recheckSeconds": 60})
    world.recheck()
    assert told(world.answer(resolved("a"))) == [("SourceLookedAt", False)]
    offline = SourceState("failed", reason="Offline", message="No network.")
    for answer, news in (
        (resolved("a"), []),
        (offline, [("Offline", True)]),
        (resolved("b"), [("SourceLookedAt", False)]),
    ):
        world.now = next_look(world.models[0], world.record) or 0.0
        assert told(world.answer(answer)) == news


def test_a_restart_in_the_middle_of_a_look_goes_on() -> None:
    """All of it is in the record."""
    world = Looking()
    world.recheck()
    key = world.step().resolve
    assert world.step().resolve == key
    assert looked(world.models[0], world.record, world.seen, world.now) == world.record
