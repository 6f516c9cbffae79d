"""What `rollout` and `models set` make of what is typed, and how a rollout ended."""

from __future__ import annotations

import pytest
import typer
from msgspec.structs import replace

from tests.unit.cli.test_rollout_drawing import ENTRY, MODEL, VIEW
from tidegate.cli.models import with_fields
from tidegate.cli.output import CommandFailed
from tidegate.cli.rollout import differing, find_revision, seconds
from tidegate.cli.rollout_watch import outcome
from tidegate.messages.registry import Condition
from tidegate.messages.rollouts import Action, RevisionView

REVISIONS = [
    RevisionView("41bc9d0e11", 12, 30.0, "spec"),
    RevisionView("41ff000000", 11, 20.0, "spec"),
    RevisionView("11aa000000", 3, 10.0, "spec"),
]
SPEC = {"source": {"uri": "/m"}, "scaling": {"maxReplicas": 1}, "rollout": None, "precision": "auto"}


@pytest.mark.parametrize(
    ("named", "number"), [("12", 12), ("11", 11), ("11aa", 3), ("41bc9d0e11", 12), ("41b", 12)]
)
def test_a_revision_is_named_by_its_number_or_how_its_name_begins(named: str, number: int) -> None:
    assert find_revision("tide", REVISIONS, named).number == number


@pytest.mark.parametrize(
    ("named", "words"), [("41", "several revisions"), ("99", "is no revision"), ("x", "no revision")]
)
def test_a_name_that_fits_none_or_several_is_refused(named: str, words: str) -> None:
    with pytest.raises(CommandFailed, match=words) as refused:
        find_revision("tide", REVISIONS, named)
    assert "tidegate rollout history tide" in refused.value.message


def test_differences_are_told_by_the_path_of_the_field() -> None:
    new = {"source": {"uri": "/n"}, "scaling": {"maxReplicas": 1}, "rollout": {"maxSurge": 0}}
    assert differing(SPEC, new) == {
        "source.uri": ("/m", "/n"),
        "rollout": (None, {"maxSurge": 0}),
        "precision": ("auto", None),
    }


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("0", 0)]
)
def test_times(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "m", "10 m", "-1", "1m1h", "1.5m", "1d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="10m"):
        seconds(text)


def test_fields_are_set_by_their_path() -> None:
    changed = with_fields(
        SPEC,
        ["scaling.maxReplicas=2", "spec.rollout.steps=[{weight: 100}]", "source.uri=", "precision=float16"],
    )
    assert changed == {
        "source": {},
        "scaling": {"maxReplicas": 2},
        "rollout": {"steps": [{"weight": 100}]},
        "precision": "float16",
    }
    assert SPEC["scaling"] == {"maxReplicas": 1}


@pytest.mark.parametrize("assignment", ["scaling.maxReplicas", "=2", "spec.=2", "a..b=1"])
def test_what_names_no_field_is_refused(assignment: str) -> None:
    with pytest.raises(CommandFailed, match=r"scaling\.maxReplicas=2"):
        with_fields(SPEC, [assignment])


def test_a_field_within_a_plain_value_is_refused() -> None:
    with pytest.raises(CommandFailed, match="precision has no fields"):
        with_fields(SPEC, ["precision.bits=8"])


def test_a_value_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(CommandFailed, match="not YAML"):
        with_fields(SPEC, ["precision=[1"])


@pytest.mark.parametrize(
    ("phase", "ended"),
    [
        ("Completed", "rolled out"),
        ("Aborted", "aborted"),
        ("Paused", "under way"),
        ("Queued", "under way"),
        ("Warming", "under way"),
    ],
)
def test_how_a_rollout_ended(phase: str, ended: str) -> None:
    model = replace(MODEL, rollout=replace(VIEW, phase=phase))
    assert outcome(model) == ended
    assert outcome(replace(model, action=Action("retry"))) == "under way"


def test_the_last_rollout_says_nothing_of_what_is_still_to_be_looked_at() -> None:
    ended = replace(MODEL, rollout=replace(VIEW, phase="Completed"))
    assert outcome(ended) == "rolled out"
    for source, said in (
        (Condition("WeightsAvailable", "True", "Resolved", ""), "rolled out"),
        (Condition("WeightsAvailable", "Unknown", "Resolving", ""), "under way"),
        (Condition("WeightsAvailable", "False", "SourceNotFound", ""), "under way"),
    ):
        assert outcome(replace(ended, entry=replace(ENTRY, conditions=[source]))) == said
    assert outcome(replace(ended, is_observed=False)) == "under way"
    assert outcome(replace(ended, entry=None)) == "under way"


def test_an_undo_that_its_source_refuses_has_not_rolled_out() -> None:
    ended = replace(VIEW, phase="Completed")
    assert outcome(replace(MODEL, rollout=replace(ended, undo="LookedAt"))) == "under way"
    assert outcome(replace(MODEL, rollout=replace(ended, undo="Refused"))) == "aborted"


def test_a_model_that_never_rolled_is_there_when_it_is_ready() -> None:
    assert outcome(replace(MODEL, rollout=None, entry=replace(ENTRY, ready=False))) == "under way"
    assert outcome(replace(MODEL, rollout=None)) == "rolled out"
