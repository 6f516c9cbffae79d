"""`rollout`, `models set|scale|restart|drain` and their exit codes against a real control API."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from tests.integration.cli.command import assert_refused, program, tidegate
from tests.integration.cli.control_api import ControlApi
from tidegate.control_api.views import PlanView
from tidegate.messages.rollouts import Phase, RevisionView, RolloutView, StepView

VIEW = RolloutView(
    model="bold",
    id="68f",
    strategy="Canary",
    phase="Warming",
    stable="0123456789",
    target="41bc9d0e11",
    weight=0,
    step=-1,
    steps=[StepView(15), StepView(100)],
)
REVISIONS = [
    RevisionView(
        "41bc9d0e11", 2, 30.0, "spec", "alice", commit="b2", spec={"precision": "float16", "task": "auto"}
    ),
    RevisionView(
        "0123456789", 1, 10.0, "spec", "bob", commit="a1", spec={"precision": "bfloat16", "task": "auto"}
    ),
]
PLAN = PlanView("bold", ["Revision 41bc9d0e11 starts with 1 replicas."], 1, 2, 0, 0)


def at(phase: Phase, weight: int, message: str = "") -> RolloutView:
    return replace(VIEW, phase=phase, weight=weight, step=0, reason="Because", message=message)


@pytest.mark.parametrize(
    ("arguments", "rollouts", "status"),
    [
        (["-w"], [VIEW, at("Progressing", 15), at("Completed", 100)], 0),
        (["-w"], [at("Aborted", 0)], 1),
        (["--timeout", "1m"], [VIEW, at("Completed", 100)], 0),
        (["--timeout", "1m"], [at("Progressing", 15), at("Aborted", 0)], 1),
        (["--timeout", "0s"], [at("Paused", 15)], 2),
        (["-w", "--timeout", "0s"], [at("Paused", 15)], 2),
        ([], [at("Aborted", 0)], 0),
    ],
)
def test_the_exit_status_says_how_it_ended(
    arguments: list[str], rollouts: list[RolloutView | None], status: int, api: ControlApi
) -> None:
    api.host.rollouts = rollouts
    shown = tidegate("rollout", "status", "bold", *arguments, environment=api.environment)
    assert shown.returncode == status, shown
    last = rollouts[-1]
    assert last is not None
    assert last.phase in shown.stdout
    assert ("in time" in shown.stderr) == (status == 2)


def test_without_a_terminal_each_thing_that_happens_is_a_line(api: ControlApi) -> None:
    counted = [replace(at("Progressing", 15), clean_requests=count) for count in (1, 2, 3)]
    api.host.rollouts = [VIEW, *counted, at("Completed", 100, "All is well.")]
    shown = tidegate("rollout", "status", "bold", "-w", environment=api.environment)
    told = [line.partition(" s  ")[2].partition(":")[0] for line in shown.stdout.splitlines()]
    assert told == ["Warming", "Progressing", "Completed"]
    assert shown.stdout.endswith("Because: All is well.\n")


def test_for_programs_each_line_is_the_whole_state(api: ControlApi) -> None:
    api.host.rollouts = [VIEW, at("Completed", 100)]
    shown = tidegate("rollout", "status", "bold", "-w", "-o", "json", environment=api.environment)
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [record["rollout"]["phase"] for record in records] == ["Warming", "Completed"]
    assert {record["model"] for record in records} == {"bold"}


def test_a_control_api_that_goes_away_meanwhile_is_asked_again(api: ControlApi) -> None:
    api.host.rollouts = [VIEW, None, at("Completed", 100)]
    shown = tidegate("rollout", "status", "bold", "--timeout", "1m", environment=api.environment)
    assert shown.returncode == 0
    assert "does not lead" in shown.stderr


def test_one_that_was_never_there_is_not_waited_for(api: ControlApi) -> None:
    gone = api.environment | {"TIDEGATE_ADMIN_URL": "http://127.0.0.1:1"}
    assert_refused(tidegate("rollout", "status", "bold", "--timeout", "10m", environment=gone), "127.0.0.1:1")


def test_a_wrong_time_is_a_wrong_command_line(api: ControlApi) -> None:
    shown = tidegate("rollout", "status", "bold", "--timeout", "soon", environment=api.environment)
    assert shown.returncode == 2
    assert "10m" in shown.stderr


def test_history_lists_revisions(api: ControlApi) -> None:
    api.host.history = REVISIONS
    shown = tidegate("rollout", "history", "bold", environment=api.environment).stdout.splitlines()
    assert shown[0].split() == ["NUMBER", "REVISION", "AGE", "AUTHOR", "CAUSE", "STATE"]
    assert [line.split()[1] for line in shown[1:]] == ["41bc9d0e11", "0123456789"]
    wide = tidegate("rollout", "history", "bold", "-o", "wide", environment=api.environment)
    assert "COMMIT" in wide.stdout


@pytest.mark.parametrize("named", [(), ("1",), ("0123", "2")])
def test_diff_shows_fields_and_bytes_that_differ(named: Sequence[str], api: ControlApi) -> None:
    api.host.history = REVISIONS
    shown = tidegate("rollout", "diff", "bold", *named, "-o", "json", environment=api.environment)
    assert json.loads(shown.stdout) == [
        {"field": "spec.precision", "before": "bfloat16", "after": "float16"},
        {"field": "source.commit", "before": "a1", "after": "b2"},
    ]
    assert "from 1 (0123456789) to 2 (41bc9d0e11)" in shown.stderr


def test_diff_of_the_first_revision_asks_for_another(api: ControlApi) -> None:
    api.host.history = REVISIONS[1:]
    assert_refused(tidegate("rollout", "diff", "bold", environment=api.environment), "before 1", "other one")


@pytest.mark.parametrize("verb", ["pause", "resume", "promote", "abort"])
def test_an_action_reaches_the_platform(verb: str, api: ControlApi) -> None:
    api.host.rollouts = [at("Progressing", 15)]
    done = tidegate("rollout", verb, "bold", environment=api.environment)
    assert (done.returncode, done.stdout) == (0, "")
    assert "tidegate rollout status bold -w" in done.stderr
    (action,) = api.host.asked
    assert (action.verb, action.revision, action.author) == (verb, "", "admin")


def test_what_cannot_be_done_now_is_refused_with_the_platforms_sentence(api: ControlApi) -> None:
    api.host.planned = replace(PLAN, refusal="abort was refused: no rollout is under way.")
    assert_refused(
        tidegate("rollout", "abort", "bold", environment=api.environment), "no rollout is under way"
    )
    assert api.host.asked == []
    assert_refused(tidegate("rollout", "pause", "none", environment=api.environment), "'none'", "bold")


@pytest.mark.parametrize(("named", "goal"), [("1", "0123456789"), ("41bc", "41bc9d0e11")])
def test_undo_names_its_goal_by_number_or_name(named: str, goal: str, api: ControlApi) -> None:
    api.host.history = REVISIONS
    done = tidegate("rollout", "undo", "bold", "--to-revision", named, environment=api.environment)
    assert done.returncode == 0, done
    assert [(action.verb, action.revision) for action in api.host.asked] == [("undo", goal)]


def test_a_dry_run_shows_the_plan_and_asks_nothing_of_the_platform(api: ControlApi) -> None:
    api.host.planned = PLAN
    for command in (
        ["rollout", "undo", "bold"],
        ["models", "set", "bold", "precision=float16"],
        ["models", "scale", "bold", "--max", "3"],
        ["models", "restart", "bold"],
    ):
        shown = tidegate(*command, "--dry-run", environment=api.environment)
        assert shown.returncode == 0, shown
        assert "1. Revision 41bc9d0e11 starts with 1 replicas." in shown.stdout
        assert "1 now, 2 at most" in shown.stdout
    assert (api.host.asked, api.host.specs) == ([], [])


def test_set_changes_these_fields_alone(api: ControlApi) -> None:
    api.host.planned = PLAN
    done = tidegate("models", "set", "bold", "scaling.maxReplicas=5", environment=api.environment)
    assert done.returncode == 0, done
    changed = {**api.host.view.spec, "scaling": {"minReplicas": 1, "maxReplicas": 5}}
    assert api.host.specs == [changed]


def test_scale_changes_the_bounds(api: ControlApi) -> None:
    done = tidegate("models", "scale", "bold", "--min", "2", "--max", "4", environment=api.environment)
    assert done.returncode == 0, done
    assert [spec["scaling"] for spec in api.host.specs] == [{"minReplicas": 2, "maxReplicas": 4}]
    assert_refused(tidegate("models", "scale", "bold", environment=api.environment), "max_replicas")


def test_what_interrupts_somebody_is_asked_about(api: ControlApi) -> None:
    outage = replace(PLAN, rollout=replace(VIEW, strategy="Recreate"))
    api.host.planned = outage
    asks = (
        ["models", "set", "bold", "precision=float16"],
        ["models", "restart", "bold"],
        ["models", "drain", "bold"],
    )
    for command in asks:
        refused = tidegate(*command, environment=api.environment, stdin="n\n")
        assert refused.returncode == 1
        assert "[y/N]" in refused.stderr
    assert (api.host.asked, api.host.specs, api.host.drains) == ([], [], [])
    for command in asks:
        assert tidegate(*command, "--yes", environment=api.environment).returncode == 0
    assert (len(api.host.asked), len(api.host.specs), api.host.drains) == (1, 1, [True])


def test_draining_ends(api: ControlApi) -> None:
    assert tidegate("models", "drain", "bold", "--end", environment=api.environment).returncode == 0
    assert api.host.drains == [False]


def test_on_a_terminal_it_is_drawn_until_it_ends(api: ControlApi) -> None:
    api.host.rollouts = [VIEW, at("Progressing", 15), at("Completed", 100, "All is well.")]
    ours, theirs = pty.openpty()
    command = subprocess.Popen(
        [*program(), "rollout", "status", "bold", "-w"],
        env={**os.environ, **api.environment, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the command has ended
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert command.wait(timeout=20) == 0
    text = shown.decode()
    assert all(f"bold: {phase}: " in text for phase in ("Warming", "Progressing", "Completed"))
    last = text.rpartition("\x1b[2K")[2]  # what stood there before was drawn over
    assert last.count("bold: ") == 1
    assert "Because: All is well." in last
