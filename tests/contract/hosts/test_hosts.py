"""What both hosts promise of models, from the first declaration to the last request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.hosts.rigs import LaptopRig, OperatorRig, Rig, condition, entry, rounds
from tidegate.control.attempts import FIRST_RETRY_SECONDS
from tidegate.control.observed import application_name
from tidegate.control.rollout import SWITCH_SECONDS
from tidegate.control.seating import REST_SECONDS
from tidegate.messages.outcomes import Tally

SETTLED = 12  # rounds of a second within which everything here settles


@pytest.fixture(params=["laptop", "operator"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    return LaptopRig(tmp_path) if request.param == "laptop" else OperatorRig()


async def serving(rig: Rig, name: str = "one", **spec: object) -> str:
    """Declare a model and bring it up; its revision."""
    rig.model(name, **spec)
    await rounds(rig, SETTLED)
    (revision,) = entry(rig, name).revisions
    assert entry(rig, name).ready
    return revision


def revisions_in_serve(rig: Rig, name: str) -> set[str]:
    return {app.rpartition("--")[2] for app in rig.serve.configs if app.startswith(f"{name}--")}


async def test_a_new_model_proves_itself_and_then_serves(rig: Rig) -> None:
    rig.faults.slow.add("one")
    rig.model("one")
    await rounds(rig, SETTLED)
    (revision,) = revisions_in_serve(rig, "one")
    assert not entry(rig, "one").ready
    assert condition(rig, "one", "Progressing").reason == "Loading"
    await rig.serve.prove()
    await rig.round()
    after = entry(rig, "one")
    assert (after.ready, after.accepts, after.revisions) == (True, True, {revision: 100})
    assert condition(rig, "one", "Ready").reason == "Serving"


async def test_records_come_first_and_serve_last(rig: Rig) -> None:
    """A crash in between repeats a step and forgets none."""
    await rounds(rig, 3)
    rig.journal.clear()
    rig.model("one")
    await rounds(rig, SETTLED)
    written = [what for what, _ in rig.journal]
    records = [at for at, what in enumerate(written) if what in ("records", "Model status")]
    entries = [at for at, what in enumerate(written) if what == "put_model"]
    puts = [at for at, what in enumerate(written) if what.startswith("PUT")]
    assert records[0] < entries[0] < puts[0]
    assert records[-1] < entries[-1], "that a model is proved is recorded before gateways read it"


async def test_a_changed_model_switches_after_the_proof_and_drops_the_old_after_its_requests(
    rig: Rig,
) -> None:
    old = await serving(rig)
    rig.store.waiting[("one", old)] = 2
    rig.faults.slow.add("one")
    rig.model("one", contextLength=64)
    await rounds(rig, SETTLED)
    assert entry(rig, "one").revisions == {old: 100}
    (new,) = revisions_in_serve(rig, "one") - {old}
    await rig.serve.prove()
    await rounds(rig, SETTLED)
    assert entry(rig, "one").revisions == {new: 100}
    assert revisions_in_serve(rig, "one") == {old, new}, "two requests still wait for the old one"
    rig.store.waiting[("one", old)] = 0
    await rounds(rig, int(SWITCH_SECONDS))
    assert revisions_in_serve(rig, "one") == {new}
    assert rig.store.dropped[("one", old)] == "The revision has drained."
    assert entry(rig, "one").ready


async def test_a_failing_revision_leaves_the_old_one_serving_and_says_why(rig: Rig) -> None:
    old = await serving(rig)
    rig.faults.broken.add("one")
    rig.model("one", contextLength=64)
    await rounds(rig, SETTLED)
    assert entry(rig, "one").revisions == {old: 100}
    assert revisions_in_serve(rig, "one") == {old}, "what cannot load is not kept in Serve"
    degraded = condition(rig, "one", "Degraded")
    assert (degraded.status, degraded.reason) == ("True", "RevisionFailed")
    assert "model.safetensors is not there" in degraded.message
    # It is tried again later, and comes up when the cause is mended.
    rig.faults.broken.clear()
    rig.clock.now += FIRST_RETRY_SECONDS
    await rounds(rig, SETTLED)
    assert old not in entry(rig, "one").revisions
    assert condition(rig, "one", "Degraded").status == "False"


@pytest.mark.parametrize("strategy", ["BlueGreen", "Recreate"])
async def test_a_revision_that_fails_with_all_requests_gives_them_back(rig: Rig, strategy: str) -> None:
    rollout = {"strategy": strategy, "abortScaleDownSeconds": 0}
    old = await serving(rig, rollout=rollout)
    rig.store.ended["one", old] = {"": Tally({"ok": 1_000})}
    rig.model("one", contextLength=64, rollout=rollout)
    await rounds(rig, 2 * SETTLED)
    (new,) = entry(rig, "one").revisions
    assert new != old
    rig.store.ended["one", new] = {entry(rig, "one").cohort: Tally({"ok": 50, "error": 50})}
    rig.start()
    await rounds(rig, 2 * SETTLED)
    assert entry(rig, "one").revisions == {old: 100}
    assert revisions_in_serve(rig, "one") == {old}
    assert condition(rig, "one", "Degraded").reason == "RolloutAborted"
    assert "at 100 %" in condition(rig, "one", "Degraded").message


async def test_a_removed_model_is_refused_before_its_replicas_go(rig: Rig) -> None:
    revision = await serving(rig)
    await serving(rig, "two")
    rig.journal.clear()
    rig.remove("one")
    await rounds(rig, SETTLED)
    assert "one" not in rig.store.entries
    assert ("one", revision) in rig.store.dropped
    assert revisions_in_serve(rig, "one") == set()
    assert entry(rig, "two").ready
    refused = [
        number
        for number, (what, value) in enumerate(rig.journal)
        if (what == "delete_model" and value == "one")
        or (what == "put_model" and value.name == "one" and not value.accepts)  # type: ignore[attr-defined]
    ]
    gone = [
        number
        for number, (what, value) in enumerate(rig.journal)
        if what.startswith("PUT") and application_name("one", revision) not in value  # type: ignore[operator]
    ]
    assert refused[0] < gone[0]


async def test_redis_away_is_told_and_nothing_is_lost(rig: Rig) -> None:
    revision = await serving(rig)
    rig.journal.clear()
    rig.store.is_away = True
    rig.model("two")
    await rounds(rig, 3)
    assert "Redis is away." in rig.outage
    assert revisions_in_serve(rig, "one") == {revision}
    assert not [what for what, _ in rig.journal if what.startswith("PUT")]
    rig.store.is_away = False
    await rounds(rig, SETTLED)
    assert entry(rig, "one").ready
    assert entry(rig, "one").revisions == {revision: 100}
    assert entry(rig, "two").ready


async def test_serve_away_leaves_what_gateways_read_and_what_was_decided_comes_later(rig: Rig) -> None:
    revision = await serving(rig)
    rig.serve.is_away = True
    rig.model("two")
    await rounds(rig, 5)
    assert entry(rig, "one").revisions == {revision: 100}
    assert entry(rig, "one").accepts
    assert not entry(rig, "two").ready
    rig.serve.is_away = False
    await rounds(rig, SETTLED)
    assert entry(rig, "one").revisions == {revision: 100}
    assert entry(rig, "two").ready


async def test_a_config_that_serve_does_not_answer_is_told_and_sent_again(rig: Rig) -> None:
    await serving(rig)
    rig.serve.is_deaf = True
    rig.model("two")
    await rounds(rig, 5)
    degraded = condition(rig, "two", "Degraded")
    assert (degraded.reason, degraded.message) == ("ServeUnavailable", "Serve is away.")
    rig.serve.is_deaf = False
    await rounds(rig, SETTLED)
    assert entry(rig, "two").ready
    assert condition(rig, "two", "Degraded").status == "False"


async def test_a_serve_that_lost_everything_gets_it_again(rig: Rig) -> None:
    revision = await serving(rig)
    rig.serve.configs = {}
    await rounds(rig, SETTLED)
    assert revisions_in_serve(rig, "one") == {revision}
    assert entry(rig, "one").revisions == {revision: 100}


async def test_of_many_applications_one_that_serve_refuses_harms_no_other(rig: Rig) -> None:
    rig.faults.refused.add("bad")
    rig.model("bad")
    rig.model("one")
    rig.model("two")
    await rounds(rig, SETTLED)
    assert entry(rig, "one").ready
    assert entry(rig, "two").ready
    assert not entry(rig, "bad").ready
    degraded = condition(rig, "bad", "Degraded")
    assert "import_path: not one that can be imported" in degraded.message
    # And what it refuses of a model that serves leaves the model serving.
    rig.faults.refused.add("one")
    rig.model("one", contextLength=64)
    await rounds(rig, SETTLED)
    assert entry(rig, "one").ready
    assert "not one that can be imported" in condition(rig, "one", "Degraded").message


async def test_rounds_without_changes_write_nothing(rig: Rig) -> None:
    await serving(rig)
    await serving(rig, "two", scaling={"minReplicas": 0})
    rig.journal.clear()
    await rounds(rig, 5)
    assert rig.journal == []


async def test_a_host_that_starts_anew_writes_nothing_and_goes_on(rig: Rig) -> None:
    old = await serving(rig)
    await serving(rig, "two", scaling={"minReplicas": 0})
    rig.journal.clear()
    rig.start()
    await rounds(rig, 5)
    assert rig.journal == []
    # In the middle of a change, too: the records say how far it was.
    rig.store.waiting[("one", old)] = 1
    rig.model("one", contextLength=64)
    await rounds(rig, 4)
    rig.start()
    await rounds(rig, SETTLED)
    assert old in revisions_in_serve(rig, "one")
    assert old not in entry(rig, "one").revisions
    rig.store.waiting.clear()
    await rounds(rig, SETTLED)
    assert len(revisions_in_serve(rig, "one")) == 1


async def test_more_sleepers_than_room_prove_themselves_in_turn_and_then_take_turns(rig: Rig) -> None:
    """Both hosts here have room for four replicas of a core."""
    names = [f"m{number}" for number in range(6)]
    for name in names:
        rig.model(name, resources={"cpus": 1}, scaling={"minReplicas": 0, "maxReplicas": 1})
    await rounds(rig, 3 * SETTLED)
    assert {entry(rig, name).reason for name in names} == {"Asleep"}
    queues = {name: (name, next(iter(entry(rig, name).revisions))) for name in names}
    for name in names[:4]:
        rig.store.waiting[queues[name]] = 1
        await rounds(rig, 3)
    assert [entry(rig, name).replicas_ready for name in names] == [1, 1, 1, 1, 0, 0]
    # All work: nobody is sent away, and who waits is told why.
    for name in names[4:]:
        rig.store.waiting[queues[name]] = 1
        await rounds(rig, SETTLED)
        assert (entry(rig, name).ready, entry(rig, name).accepts) == (False, True)
        assert entry(rig, name).reason == "WaitingForRoom"
        assert "held by m0, m1, m2 and m3" in entry(rig, name).message
    assert [entry(rig, name).replicas_ready for name in names] == [1, 1, 1, 1, 0, 0]
    # The one that is idle longest gives way to the one that waits longest, also after a restart of the host.
    for name in ("m2", "m1"):
        rig.store.waiting[queues[name]] = 0
        await rounds(rig, int(REST_SECONDS) - 1)
        rig.start()
    assert [entry(rig, name).replicas_ready for name in names] == [1, 1, 0, 1, 1, 0]
    await rounds(rig, SETTLED)
    assert [entry(rig, name).replicas_ready for name in names] == [1, 0, 0, 1, 1, 1]
    assert {entry(rig, name).reason for name in ("m1", "m2")} == {"Asleep"}
    # At rest there is nothing to write, and who is served has left the line.
    rig.journal.clear()
    await rounds(rig, 5)
    assert rig.journal == []
