"""A rollout as people see it."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from tidegate.cli.rollout_drawing import bar, draw, draw_model, evidence_share, headline
from tidegate.control_api.views import ModelView
from tidegate.messages.registry import ModelEntry
from tidegate.messages.rollouts import Action, GateView, RolloutView, StepView

ERRORS = GateView(
    "errors",
    "waits",
    "1 of 41 failed.",
    evidence=10.0,
    needed=100.0,
    stable_failures=2,
    stable_requests=410,
    target_failures=1,
    target_requests=41,
)
VIEW = RolloutView(
    model="tide",
    id="68f",
    strategy="Canary",
    phase="Progressing",
    stable="9f3a22c0de",
    target="41bc9d0e11",
    weight=15,
    step=1,
    steps=[StepView(5, 30.0), StepView(15, 60.0), StepView(50, 60.0, pause=True), StepView(100)],
    reason="MoreRequests",
    message="18 requests are missing.",
    gates=[ERRORS, GateView("restarts", "passes", "None of its replicas restarted.")],
    clean_requests=41,
    needed_requests=59,
    started=1000.0,
    step_since=1045.0,
    ends_at=1300.0,
    replicas={"9f3a22c0de": "2/2", "41bc9d0e11": "1/1", "0000000000": "1/0"},
)
ENTRY = ModelEntry("tide", 1, "", "", "", "", {}, True, True, "Serving", "One replica serves.")
MODEL = ModelView("tide", "", "default", "1", {}, is_observed=True, entry=ENTRY, rollout=VIEW)


def lines(view: RolloutView, now: float = 1090.0) -> list[str]:
    return draw(view, now).splitlines()


def line(view: RolloutView, start: str) -> str:
    (found,) = [text for text in lines(view) if text.startswith(start)]
    return found


def test_it_begins_with_where_it_stands_and_why() -> None:
    assert lines(VIEW)[:2] == [
        "tide: Progressing: 41bc9d0e11 takes 15 % of the requests.",
        "MoreRequests: 18 requests are missing.",
    ]


def test_steps_show_what_is_done_and_what_is_to_come() -> None:
    assert line(VIEW, "steps") == (
        "steps      ✓ 5 % (30s or more)   ▶ 15 % (60s or more)   "
        "· 50 % (60s or more, until resumed)   · 100 %"
    )
    assert line(VIEW, "time") == "time       90s, 45s of 60s in step 2 of 4"


@pytest.mark.parametrize(("phase", "marks"), [("Aborted", "✓✗··"), ("Completed", "✓✓✓✓"), ("Paused", "✓▶··")])
def test_the_step_at_which_it_ended_is_marked(phase: str, marks: str) -> None:
    shown = line(replace(VIEW, phase=phase), "steps")
    assert "".join(mark for mark in shown if mark in "✓✗▶·") == marks


def test_a_shadow_comes_before_the_first_step() -> None:
    shown = line(replace(VIEW, phase="Shadow", step=-1), "steps")
    assert shown.startswith("steps      ▶ shadow   · 5 % (30s or more)   · 15 %")


def test_what_is_missing_and_when_it_may_end_are_shown_while_it_goes_on() -> None:
    assert line(VIEW, "evidence").endswith("41 of 59 requests that ended well")
    assert line(VIEW, "ends").startswith("ends       in about 3m, at ")
    ended = draw(replace(VIEW, phase="Aborted", ended=1060.0), 5000.0)
    assert "41 of 59" not in ended
    assert "\nends" not in ended
    assert "time       60s\n" in ended


def test_nothing_is_said_of_an_end_that_cannot_be_told() -> None:
    assert "\nends" not in draw(replace(VIEW, ends_at=0.0), 1090.0)
    assert "\nends" not in draw(VIEW, 1301.0)


def test_each_revision_has_its_share_and_its_replicas() -> None:
    assert line(VIEW, "41bc").split() == ["41bc9d0e11", "new", "15", "%", bar(0.15), "1/1"]
    assert line(VIEW, "9f3a").split() == ["9f3a22c0de", "stable", "85", "%", bar(0.85), "2/2"]
    assert line(VIEW, "0000").split()[-1] == "1/0"
    assert "refused" in line(replace(VIEW, phase="Aborted", weight=0), "41bc")


def test_a_first_revision_has_nobody_to_compare_with() -> None:
    first = replace(VIEW, stable="", weight=100, replicas={"41bc9d0e11": "1/1"})
    table = draw(first, 1090.0).split("\n\n")[2].splitlines()
    assert [row.split()[0] for row in table] == ["REVISION", "41bc9d0e11"]
    goes_on = draw(replace(first, phase="Aborted"), 1090.0)
    assert "41bc9d0e11 takes all requests" in goes_on
    assert "refused" not in goes_on


def test_a_gate_shows_its_evidence_against_what_is_needed() -> None:
    shown = line(VIEW, "…   errors")
    assert shown.split() == ["…", "errors", bar(0.5), "10", "of", "100", "1/41", "2/410"]
    assert line(VIEW, "✓   restarts").split() == ["✓", "restarts", "-", "-", "-", "-"]


def test_a_gate_that_passes_says_why_only_where_it_is_asked() -> None:
    assert lines(VIEW)[-1] == "… errors: 1 of 41 failed."
    assert "errors:" not in draw(replace(VIEW, phase="Completed"), 1090.0)
    failed = replace(VIEW, phase="Aborted", gates=[replace(ERRORS, state="fails")])
    assert lines(failed)[-1] == "✗ errors: 1 of 41 failed."
    wide = draw(VIEW, 1090.0, is_wide=True).splitlines()
    assert wide[-2:] == ["… errors: 1 of 41 failed.", "✓ restarts: None of its replicas restarted."]


@pytest.mark.parametrize(
    ("evidence", "share"),
    [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (10.0, 0.5), (100.0, 1.0), (1e9, 1.0), (math.inf, 1)],
)
def test_evidence_is_shown_by_its_factor(evidence: float, share: float) -> None:
    assert evidence_share(evidence, 100.0) == pytest.approx(share)


def test_evidence_beyond_all_numbers_is_still_drawn() -> None:
    assert "inf of 100" in draw(replace(VIEW, gates=[replace(ERRORS, evidence=math.inf)]), 1090.0)


@pytest.mark.parametrize(
    ("share", "text"), [(-1, "····"), (0, "····"), (0.5, "██··"), (0.53125, "██▏·"), (1, "████"), (7, "████")]
)
def test_bar(share: float, text: str) -> None:
    assert bar(share, 4) == text


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("Queued", "place 2 in the Pool's line"),
        ("Warming", "41bc9d0e11 gets ready"),
        ("Shadow", "copies"),
        ("Completed", "41bc9d0e11 takes all requests"),
        ("Aborted", "9f3a22c0de takes all requests"),
    ],
)
def test_a_line_says_what_the_phase_means(phase: str, words: str) -> None:
    said = headline(replace(MODEL, rollout=replace(VIEW, phase=phase, position=2)))
    assert said.startswith(f"{phase}: ")
    assert words in said
    assert said.endswith("MoreRequests: 18 requests are missing.")


def test_a_model_without_a_rollout_says_how_it_is() -> None:
    assert draw_model(replace(MODEL, rollout=None), 0.0) == "No rollout of tide. Serving: One replica serves."
    assert "has not looked at it yet" in headline(replace(MODEL, rollout=None, entry=None))


def test_an_undo_that_holds_is_shown() -> None:
    shown = draw_model(replace(MODEL, pinned="9f3a22c0de"), 1090.0)
    assert "An undo holds revision 9f3a22c0de" in shown
    assert "An undo" not in draw_model(MODEL, 1090.0)


def test_what_was_asked_and_not_begun_is_shown() -> None:
    asked = replace(MODEL, action=Action("undo", "9f3a22c0de", "alice"))
    assert draw_model(asked, 1090.0).endswith("\n\nasked by alice, not begun yet: undo 9f3a22c0de")
