"""What the gates of a rollout read: one revision's figures, of this rollout, over all of its steps."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tests.unit.control.builders import NOW
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.control.evidence import Thresholds
from tidegate.control.observed import Observation
from tidegate.control.rollout_gates import baseline, first_look, shadowed, verdict_of
from tidegate.control.rollout_schema import RolloutSpec
from tidegate.control.rollout_state import RolloutState
from tidegate.messages.outcomes import Tally
from tidegate.messages.registry import RevisionReport

STATE = RolloutState("a1", "new", "old", "Canary", "Progressing", NOW)


def tally(ok: int = 0, error: int = 0, **changes: Any) -> Tally:
    return Tally(ends={"ok": ok, "error": error}, **changes)


def seen(new: dict[str, Tally], old: dict[str, Tally] | None = None, **changes: Any) -> Observation:
    return Observation(None, outcomes={("m", "new"): new, ("m", "old"): old or {}}, **changes)


def record(*revisions: RevisionRecord) -> ModelRecord:
    return ModelRecord("m", 1, {}, {each.revision: each for each in revisions})


def failure(observed: Observation, *revisions: RevisionRecord) -> str:
    return verdict_of(record(*revisions), STATE, RolloutSpec(), 5, observed).failure


FIRST = {"a1.15": tally(30, 2)}
SECOND = {"a1.50": tally(60, 4)}
GOOD = {"a1.15": tally(300), "a1.50": tally(60)}


def test_evidence_adds_up_over_the_steps() -> None:
    """Neither step alone says enough."""
    assert not failure(seen(FIRST, GOOD))
    assert not failure(seen(SECOND, GOOD))
    assert failure(seen({**FIRST, **SECOND}, GOOD)).startswith("Errors: 6 of 96 requests of the target")


def test_the_stables_errors_are_not_the_targets() -> None:
    assert not failure(seen(GOOD, {"a1.15": tally(10, 90), "a1.50": tally(10, 90)}))


def test_failures_ask_for_more_good_requests_while_the_stable_has_some() -> None:
    observed = seen({"a1.15": tally(60, 1)}, GOOD)
    found = verdict_of(record(), replace(STATE, weight=15), RolloutSpec(), 59, observed)
    assert (found.failure, found.missing[:9]) == ("", "60 of 112")
    for state, asked in (
        (replace(STATE, weight=100), RolloutSpec()),  # or a failure at 15 % could hold it for ever
        (replace(STATE, weight=15), RolloutSpec.model_validate({"minRequests": 59})),
    ):
        assert not verdict_of(record(), state, asked, 59, observed).missing


@pytest.mark.parametrize("cohort", ["", "9f.15", "a1x.15"])
def test_requests_of_no_or_another_rollout_say_nothing(cohort: str) -> None:
    asked = RolloutSpec.model_validate({"minRequests": 5})
    found = verdict_of(record(), STATE, asked, 5, seen({cohort: tally(50, 50)}, GOOD))
    assert (found.failure, found.clean_requests) == ("", 0)
    assert found.missing.startswith("0 of 5 requests")


def test_nothing_is_no_pass() -> None:
    assert verdict_of(record(), STATE, RolloutSpec(), 1, Observation(None)).missing
    assert not verdict_of(record(), STATE, RolloutSpec(), 0, Observation(None)).missing


PROOF = RevisionReport("m", "new", NOW + 1, True, slots=4)
NEW = RevisionRecord("new", {}, proof=PROOF)


@pytest.mark.parametrize(
    ("report", "fails"),
    [
        (None, False),
        (PROOF, False),
        (RevisionReport("m", "new", NOW + 5, False, "OutOfMemory", "No room."), True),
        (RevisionReport("m", "new", NOW - 5, False, "OutOfMemory", "No room."), False),
        (RevisionReport("m", "new", NOW + 5, False, "EngineCrashed", "It ends.", slots=4), False),
    ],
    ids=["none", "proof", "failed start", "before this rollout", "one that served"],
)
def test_a_start_that_fails(report: RevisionReport | None, fails: bool) -> None:
    reports = {("m", "new"): report} if report is not None else {}
    assert failure(seen({}, reports=reports), NEW) == ("OutOfMemory: No room." if fails else "")


def test_lost_replicas_are_counted_over_the_steps() -> None:
    lost = Tally(ends={"lost": 1})
    two = {"a1.15": lost, "a1.50": lost}
    assert not failure(seen(two, GOOD))
    assert "It lost 3 replicas." in failure(seen({**two, "a1.100": lost}, GOOD))
    assert not failure(seen({**two, "9f.100": lost}, GOOD))


def test_the_baseline_is_what_was_before_any_rollout() -> None:
    slow, usual = Tally(first_token={40: 500}), tally(60, first_token={20: 60})
    observed = seen({"": slow}, {"": usual, "a1.15": slow})
    assert baseline(record(), STATE, observed, NOW) == Thresholds((20, 20, 20, 20))


def test_at_100_percent_a_failure_asks_for_more_good_requests() -> None:
    before = {"": tally(1_000)}
    found = verdict_of(
        record(), replace(STATE, weight=100), RolloutSpec(), 59, seen({"a1.100": tally(60, 2)}, before)
    )
    assert (found.failure, found.clean_requests) == ("", 60)
    assert found.needed_requests > 100
    asked = RolloutSpec.model_validate({"minRequests": 59})
    assert not verdict_of(
        record(), replace(STATE, weight=100), asked, 59, seen({"a1.100": tally(60, 2)}, before)
    ).missing


def test_the_margin_of_the_spec_counts_at_100_percent() -> None:
    observed, state = seen({"a1.100": tally(880, 120)}, {"": tally(1_000)}), replace(STATE, weight=100)
    for margin, fails in ((0.05, True), (0.1, False)):
        asked = RolloutSpec.model_validate({"margin": margin})
        assert bool(verdict_of(record(), state, asked, 5, observed).failure) == fails


def test_the_rate_is_measured_between_two_looks() -> None:
    looked = first_look(record(), STATE, seen({}, {"": tally(100)}), NOW)
    assert first_look(record(), looked, seen({}, {"": tally(130)}), NOW + 1) is looked
    assert baseline(record(), looked, seen({}, {"": tally(130)}), NOW + 10).per_second == 3.0
    back = first_look(record(), looked, seen({}, {"": tally(130)}), NOW - 60)
    assert (back.looked_at, back.looked_ended) == (NOW - 60, 130)
    assert first_look(record(), STATE, Observation(None), NOW) is STATE


def test_shadowed_requests_that_went_well_on_the_target() -> None:
    pairs = {"00": 5, "10": 2, "01": 9, "11": 9}
    assert shadowed(record(), STATE, seen({"a1.0": Tally(pairs=pairs), "9f.0": Tally(pairs=pairs)})) == 7
