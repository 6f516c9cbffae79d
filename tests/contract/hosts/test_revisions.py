"""What both hosts promise of revisions: named by what they hold, looked at again, kept in a history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.hosts.rigs import LaptopRig, OperatorRig, Rig, entry, rounds
from tests.contract.hosts.test_hosts import SETTLED, revisions_in_serve, serving
from tidegate.cli.rollout_watch import outcome
from tidegate.control.desired import revision_of
from tidegate.control.history import HISTORY_LIMIT
from tidegate.control.resources import ModelSpec
from tidegate.messages.rollouts import Action

SOURCE = {"uri": "/w"}
SIMULATED = {"name": "simulated"}


@pytest.fixture(params=["laptop", "operator"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    rig = LaptopRig(tmp_path) if request.param == "laptop" else OperatorRig()
    rig.contents["/w"] = "first"
    return rig


async def changed(rig: Rig, **spec: Any) -> str:
    """Change the model and let the old revision drain; the revision that serves."""
    found = await serving(rig, **spec)
    await rounds(rig, SETTLED)
    assert revisions_in_serve(rig, "one") == {found}
    return found


async def test_the_same_spec_with_other_content_is_another_revision(rig: Rig) -> None:
    first = await serving(rig, source={**SOURCE, "recheckSeconds": 60})
    rig.contents["/w"] = "second"
    await rounds(rig, SETTLED)
    assert revisions_in_serve(rig, "one") == {first}, "nobody has looked"
    rig.clock.now += 60
    await rounds(rig, 2 * SETTLED)
    (second,) = revisions_in_serve(rig, "one")
    assert second != first
    assert entry(rig, "one").ready
    assert [kept.digest for kept in rig.history("one")] == ["first", "second"]
    rig.clock.now += 60
    await rounds(rig, 2 * SETTLED)
    assert revisions_in_serve(rig, "one") == {second}, "it holds what it held"


async def test_an_upgrade_restarts_nothing(rig: Rig) -> None:
    """The version before knew no content, and named a revision by its spec."""
    rig.contents["/w"] = ""
    old = await serving(rig, source=SOURCE)
    assert old == revision_of(ModelSpec.model_validate({"engine": SIMULATED, "source": SOURCE}))
    rig.contents["/w"] = "content"
    rig.start()
    puts = len([what for what, _ in rig.journal if what.startswith("PUT")])
    await rounds(rig, SETTLED)
    assert revisions_in_serve(rig, "one") == {old}
    assert len([what for what, _ in rig.journal if what.startswith("PUT")]) == puts


async def test_every_revision_is_kept_with_what_it_was_made_from(rig: Rig) -> None:
    first = await serving(rig, source=SOURCE)
    second = await changed(rig, source=SOURCE, precision="float16")
    history = rig.history("one")
    assert [(kept.revision, kept.number, kept.digest, kept.cause) for kept in history] == [
        (first, 1, "first", "created"),
        (second, 2, "first", "precision: auto → float16"),
    ]
    assert all(kept.is_proved for kept in history)
    assert history[1].spec["precision"] == "float16"
    assert rig.clock.now - 100 < history[0].created < history[1].created


async def test_a_revision_that_comes_back_is_the_one_it_was(rig: Rig) -> None:
    first = await serving(rig)
    rig.faults.slow.add("one")
    rig.model("one", contextLength=64)
    await rounds(rig, SETTLED)
    rig.model("one")
    await rounds(rig, SETTLED)
    assert revisions_in_serve(rig, "one") == {first}
    assert entry(rig, "one").revisions == {first: 100}
    assert [kept.number for kept in rig.history("one")] == [1, 2]


async def test_the_history_is_bounded_outlasts_the_host_and_is_written_once(rig: Rig) -> None:
    first = await serving(rig)
    for length in range(1, HISTORY_LIMIT + 3):
        await changed(rig, contextLength=64 * length)
    numbers = [kept.number for kept in rig.history("one")]
    assert numbers == list(range(4, HISTORY_LIMIT + 4))
    before = rig.history("one")
    rig.start()
    rig.journal.clear()
    await rounds(rig, SETTLED)
    assert rig.history("one") == before
    assert [what for what, _ in rig.journal if what.startswith("ControllerRevision")] == []
    assert await changed(rig) == first
    assert rig.history("one")[-1].number == HISTORY_LIMIT + 4


async def test_a_person_has_the_source_looked_at(rig: Rig) -> None:
    first = await serving(rig, source=SOURCE)
    await rig.host.act("one", Action("recheck", author="ann", at=rig.clock.now))
    await rounds(rig, SETTLED)
    assert revisions_in_serve(rig, "one") == {first}
    rig.contents["/w"] = "second"
    await rig.host.act("one", Action("recheck", author="ann", at=rig.clock.now))
    await rounds(rig, 2 * SETTLED)
    (second,) = revisions_in_serve(rig, "one")
    assert second != first
    kept = rig.history("one")[-1]
    assert (kept.revision, kept.cause, kept.author) == (second, "source content changed", "ann")


async def test_an_undo_brings_back_what_the_source_still_has_and_else_moves_nothing(rig: Rig) -> None:
    first = await serving(rig, source=SOURCE)
    rig.contents["/w"] = "second"
    await rig.host.act("one", Action("recheck", at=rig.clock.now))
    await rounds(rig, 2 * SETTLED)
    (second,) = revisions_in_serve(rig, "one")
    await rig.host.act("one", Action("undo", revision=first, at=rig.clock.now))
    await rig.round()
    assert outcome(await rig.host.model("one")) == "under way", "its source is being looked at"
    await rounds(rig, 2 * SETTLED)
    assert revisions_in_serve(rig, "one") == {second}
    refused = await rig.host.model("one")
    assert refused.rollout is not None
    assert (refused.rollout.phase, refused.rollout.undo) == ("Completed", "Refused")
    assert "cannot come back: /w holds second." in refused.rollout.message
    assert outcome(refused) == "aborted"
    rig.contents["/w"] = "first"
    await rig.host.act("one", Action("undo", at=rig.clock.now))
    await rounds(rig, 2 * SETTLED)
    assert outcome(await rig.host.model("one")) == "rolled out"
    assert entry(rig, "one").revisions == {first: 100}
    assert revisions_in_serve(rig, "one") == {first}
    assert [kept.number for kept in rig.history("one")] == [1, 2]
    rig.start()
    await rounds(rig, SETTLED)
    assert revisions_in_serve(rig, "one") == {first}, "the spec is the user's, and the undo is remembered"
