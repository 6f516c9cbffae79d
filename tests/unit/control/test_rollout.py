"""Traffic: the gates that move it, and the revisions that lose it."""

from __future__ import annotations

import pytest

from tests.unit.control.builders import NOW
from tidegate.control import rollout
from tidegate.control.desired import WHOLE, ModelRecord, RevisionRecord, traffic_of
from tidegate.control.observed import ApplicationState, Observation, ServeState, application_name
from tidegate.control.rollout import (
    SWITCH_SECONDS,
    GateResult,
    Rollout,
    decide,
    proved,
    retired,
    weights_after,
)
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ReplicaStats, RevisionReport

NOBODY = Observation(serve=None)


def with_replicas(*revisions: str, wanted: int = 1) -> Observation:
    """Replicas of these revisions take requests; the new one's application wants so many."""
    application = ApplicationState(application_name("m", "new"), "RUNNING", wanted_replicas=wanted)
    stats = tuple(ReplicaStats(name, "m", name, 1, "n", NOW, NOW, 1, 0, 0, 0.0) for name in revisions)
    return Observation(ServeState("c", {application.name: application}), replicas=stats)


def revision(name: str, *, is_proved: bool, retired_at: float = 0.0) -> RevisionRecord:
    proof = RevisionReport("m", name, NOW, True) if is_proved else None
    return RevisionRecord(name, {}, proof=proof, retired_at=retired_at)


def record(weights: dict[str, int], *revisions: RevisionRecord) -> ModelRecord:
    return ModelRecord("m", 1, weights, {kept.revision: kept for kept in revisions})


OLD, NEW = revision("old", is_proved=True), revision("new", is_proved=True)
UNPROVED = revision("new", is_proved=False)


class TestGates:
    @pytest.mark.parametrize("revisions", [(OLD,), (OLD, UNPROVED)], ids=["unknown", "not proved"])
    def test_proved_holds_until_there_is_a_proof(self, revisions: tuple[RevisionRecord, ...]) -> None:
        result = proved(Rollout(record({"old": WHOLE}, *revisions), "new", NOBODY))
        assert (result.action, result.reason) == ("hold", "Unproven")
        assert "new" in result.message

    def test_proved_advances_with_a_proof(self) -> None:
        assert proved(Rollout(record({"old": WHOLE}, OLD, NEW), "new", NOBODY)).action == "advance"

    @pytest.mark.parametrize(
        ("seen", "action"),
        [
            (with_replicas("old"), "hold"),
            (with_replicas("old", "new"), "advance"),
            (with_replicas(), "advance"),
            (with_replicas("old", wanted=0), "advance"),
            (NOBODY, "advance"),
        ],
        ids=["starting", "both", "neither", "asleep", "nothing known"],
    )
    def test_it_waits_for_a_replica_that_takes_requests(self, seen: Observation, action: str) -> None:
        """Else the model is not ready between the proof and the first sign of life."""
        moving = Rollout(record({"old": WHOLE}, OLD, NEW), "new", seen)
        assert decide(moving).action == action
        assert weights_after(moving) == {"new" if action == "advance" else "old": WHOLE}

    def test_a_revision_that_serves_stays(self) -> None:
        serving = Rollout(record({"new": WHOLE}, OLD, NEW), "new", with_replicas("old"))
        assert weights_after(serving) == {"new": WHOLE}

    def test_the_first_gate_that_holds_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        held = GateResult("hold", "TooSlow", "It is slow.")
        monkeypatch.setattr(rollout, "GATES", (proved, lambda _: held, lambda _: GateResult("hold", "X", "")))
        ready = Rollout(record({"old": WHOLE}, OLD, NEW), "new", NOBODY)
        assert decide(ready) == held
        assert weights_after(ready) == {"old": WHOLE}
        assert decide(Rollout(record({"old": WHOLE}, OLD, UNPROVED), "new", NOBODY)).reason == "Unproven"

    def test_traffic_moves_as_a_whole_once_all_advance(self) -> None:
        assert weights_after(Rollout(record({"old": WHOLE}, OLD, NEW), "new", NOBODY)) == {"new": WHOLE}
        assert weights_after(Rollout(record({"old": 60, "older": 40}, OLD, NEW), "new", NOBODY)) == {
            "new": WHOLE
        }
        assert weights_after(Rollout(record({"old": WHOLE}, OLD, UNPROVED), "new", NOBODY)) == {"old": WHOLE}
        assert weights_after(Rollout(record({}, UNPROVED), "new", NOBODY)) == {}


class TestRetiring:
    def test_whoever_takes_traffic_stays(self) -> None:
        both = record({"old": 85, "new": 15}, OLD, NEW)
        assert retired(both, "target", Observation(serve=None), NOW) == (both, ())

    def test_what_never_proved_itself_goes_at_once(self) -> None:
        left, gone = retired(record({"old": WHOLE}, OLD, UNPROVED), "target", Observation(serve=None), NOW)
        assert (list(left.revisions), [name for name, _ in gone]) == (["old"], ["new"])

    @pytest.mark.parametrize(
        ("age_seconds", "depth", "goes"),
        [
            (SWITCH_SECONDS, Depth(0, 0, 0.0), True),
            (SWITCH_SECONDS - 0.1, Depth(0, 0, 0.0), False),
            (SWITCH_SECONDS, Depth(1, 0, 0.0), False),
            (SWITCH_SECONDS, Depth(0, 1, 0.0), False),
            (SWITCH_SECONDS, None, False),
        ],
    )
    def test_what_lost_its_traffic_drains_first(
        self, age_seconds: float, depth: Depth | None, *, goes: bool
    ) -> None:
        without, _ = retired(record({"new": WHOLE}, OLD, NEW), "new", Observation(serve=None), NOW)
        assert without.revisions["old"].retired_at == NOW
        seen = Observation(serve=None, depths={("m", "old"): depth} if depth is not None else {})
        left, gone = retired(without, "new", seen, NOW + age_seconds)
        assert ("old" not in left.revisions, bool(gone)) == (goes, goes)


class TestRecords:
    def test_serving_goes_by_share_and_lead_is_its_first(self) -> None:
        both = record({"old": 15, "new": 85}, OLD, NEW)
        assert both.serving == (NEW, OLD)
        assert both.lead == NEW
        assert record({}, OLD, NEW).lead == NEW
        assert record({}).lead is None

    @pytest.mark.parametrize(
        ("stored", "weights"),
        [
            ({"serving": "a"}, {"a": WHOLE}),
            ({"serving": ""}, {}),
            ({}, {}),
            ({"weights": {"a": 15, "b": 85}}, {"a": 15, "b": 85}),
            ({"weights": {}, "serving": "a"}, {}),
        ],
    )
    def test_the_form_before_is_read(self, stored: dict[str, object], weights: dict[str, int]) -> None:
        assert traffic_of(stored) == weights
