"""Each check alone, and the chains as a whole."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from msgspec.structs import replace

from tests.unit.control.builders import NOW, model
from tidegate.control import condition_checks as checks
from tidegate.control.condition_checks import CHAINS, Check, Facts, conditions
from tidegate.control.conditions import condition
from tidegate.control.desired import ModelRecord, RevisionRecord, spec_on_wire
from tidegate.control.observed import (
    ApplicationState,
    Group,
    Observation,
    PodProblem,
    ReplicaState,
    ServeState,
    SourceState,
)
from tidegate.control.packing import Placement
from tidegate.control.reasons import CONDITION_TYPES, Reason
from tidegate.control.rollout_state import RolloutState
from tidegate.control.status import entry_of
from tidegate.messages.queue import Depth
from tidegate.messages.registry import Parked, ReplicaStats, RevisionReport
from tidegate.messages.rollouts import StepView

WITH_SOURCE = model("m", engine={"name": "transformers"}, source={"uri": "/w"})
SLEEPER = model("m", scaling={"minReplicas": 0, "maxReplicas": 1})
GROUPS = (Group("cpu", cpus=4), Group("gpu", 1, 24 << 30))
FAILED = RevisionReport("m", "new", NOW, proved=False, reason="OutOfMemory", message="No room.")


def revision(name: str, *, is_proved: bool = False, **changes: Any) -> RevisionRecord:
    proof = RevisionReport(
        "m", name, NOW, True, load_seconds=2.0, process_seconds=3.0, notes=[f"Note {name}."]
    )
    return RevisionRecord(name, spec_on_wire(model("m").spec), proof=proof if is_proved else None, **changes)


NEW = revision("new")
PROVED = revision("new", is_proved=True)
OLD = revision("old", is_proved=True)
OLD_PROOF = RevisionReport("m", "old", NOW, True, notes=["Note old."], slots=8, precision="float16")


def facts(*revisions: RevisionRecord, weights: dict[str, int] | None = None, **changes: Any) -> Facts:
    """One model `m` whose spec asks for `new`. Fields of `Observation` are given by their names."""
    seen = {name: changes.pop(name) for name in list(changes) if name in Observation.__dataclass_fields__}
    seen = {"serve": ServeState("c"), **seen}
    plain: dict[str, Any] = {"model": model("m"), "source": None, "misfit": None, "waiting": {}}
    record = ModelRecord(
        "m",
        1,
        weights or {},
        {kept.revision: kept for kept in revisions},
        rollout=changes.pop("rollout", None),
    )
    return Facts(record=record, target="new", seen=Observation(**seen), **{**plain, **changes})


def serve(*states: ApplicationState) -> dict[str, Any]:
    return {"serve": ServeState("c", {state.name: state for state in states})}


def application(name: str = "new", status: str = "RUNNING", **changes: Any) -> ApplicationState:
    return ApplicationState(f"m--{name}", status, **changes)


def found(kind: str, status: Any, reason: str, message: str = "") -> dict[str, Any]:
    return {"found": {**FOUND, kind: condition(kind, status, reason, message)}}


FOUND = {
    "WeightsAvailable": condition("WeightsAvailable", "True", "NotNeeded"),
    "Scheduled": condition("Scheduled", "True", "Placed"),
    "Progressing": condition("Progressing", "False", "Settled"),
    "Degraded": condition("Degraded", "False", "Healthy"),
}
ONE_REPLICA = (ReplicaState("r", "STARTING", 1, "n"),)
SERVES: dict[str, Any] = {"weights": {"new": 100}}
NO_ROOM: dict[str, Any] = {"misfit": ("GpusTaken", "No room.")}
CRASH = PodProblem("p", "c", "CrashLoop", "It ends.", "cpu")
NO_NODE = PodProblem("p", "", "Unschedulable", "No node.", "cpu")
SEATED: dict[str, Any] = {"placement": Placement("cpu")}


def rollout(phase: Any, **changes: Any) -> dict[str, Any]:
    plain = {"target": "new", "stable": "old", "strategy": "Canary", "started": NOW, "message": "Why."}
    return {"rollout": RolloutState("1", phase=phase, **{**plain, **changes})}


PARKING = facts(PROVED, model=SLEEPER, parks={"new": ""}, **SERVES)


def parked(size: int, message: str = "", why_not: str = "") -> Facts:
    found = Parked("m", "new", "node-1", 7, size, message)
    return facts(PROVED, model=SLEEPER, parks={"new": why_not}, parked={("m", "new"): found}, **SERVES)


def stats(name: str, *, draining: bool = False) -> ReplicaStats:
    return ReplicaStats("r", "m", name, 1, "n", NOW, NOW, 4, 0, 0, 0.0, draining)


# (check, facts, status, reason, a part of the message); no status: the check has nothing to say.
CASES: list[tuple[Check, Facts, str | None, str, str]] = [
    (checks.change_refused, facts(refused=("InvalidConfig", "wrong")), "False", "InvalidConfig", "wrong"),
    (checks.change_refused, facts(), None, "", ""),
    (checks.valid, facts(), "True", "Valid", ""),
    # WeightsAvailable
    (checks.no_weights_needed, facts(), "True", "NotNeeded", ""),
    (checks.no_weights_needed, facts(model=WITH_SOURCE), None, "", ""),
    (checks.source_resolving, facts(model=WITH_SOURCE), "Unknown", "Resolving", ""),
    (
        checks.source_resolving,
        facts(source=SourceState("resolving", message="3 of 5")),
        "Unknown",
        "Resolving",
        "3 of 5",
    ),
    (checks.source_resolving, facts(source=SourceState("resolved")), None, "", ""),
    (
        checks.source_failed,
        facts(source=SourceState("failed", reason="NoSpace", message="Full.")),
        "False",
        "NoSpace",
        "Full.",
    ),
    (
        checks.source_failed,
        facts(source=SourceState("failed", reason="Odd")),
        "False",
        "SourceUnavailable",
        "",
    ),
    (checks.source_failed, facts(source=SourceState("resolved")), None, "", ""),
    (checks.source_resolved, facts(source=SourceState("resolved", "/c")), "True", "Resolved", "in /c."),
    (checks.source_resolved, facts(), None, "", ""),
    # Scheduled
    (checks.finds_no_place, facts(**NO_ROOM), "False", "GpusTaken", "No room."),
    (checks.finds_no_place, facts(), None, "", ""),
    (
        checks.not_sized_yet,
        facts(**found("WeightsAvailable", "False", "NoSpace")),
        "Unknown",
        "NotChecked",
        "",
    ),
    (checks.not_sized_yet, facts(found=FOUND), None, "", ""),
    (
        checks.finds_no_node,
        facts(revision("new", **SEATED), pod_problems=(NO_NODE,)),
        "False",
        "Unschedulable",
        "No node.",
    ),
    (checks.finds_no_node, facts(revision("new", **SEATED), pod_problems=(CRASH,)), None, "", ""),
    (checks.finds_no_node, facts(NEW, pod_problems=(NO_NODE,)), None, "", ""),
    (checks.placed, facts(NEW), "True", "Placed", ""),
    (
        checks.placed,
        facts(revision("new", placement=Placement("gpu", 0.5, 1 << 30))),
        "True",
        "Placed",
        "group gpu with 0.5 GPU, 1.00 GiB of memory",
    ),
    # Progressing
    (checks.finishing_before_deletion, facts(NEW), None, "", ""),
    (checks.finishing_before_deletion, facts(NEW, is_deleting=True), "True", "Draining", ""),
    (
        checks.finishing_before_deletion,
        facts(
            NEW,
            OLD,
            is_deleting=True,
            depths={("m", "new"): Depth(1, 0, 0.0), ("m", "old"): Depth(2, 3, 0.0)},
        ),
        "True",
        "Draining",
        "6 requests are left",
    ),
    (
        checks.weights_on_their_way,
        facts(**found("WeightsAvailable", "Unknown", "Resolving", "3 of 5")),
        "True",
        "Resolving",
        "3 of 5",
    ),
    (checks.weights_on_their_way, facts(found=FOUND), None, "", ""),
    (
        checks.source_tried_again,
        facts(**found("WeightsAvailable", "False", "NoSpace")),
        "False",
        "WaitingToRetry",
        "no room for the download",
    ),
    (checks.source_tried_again, facts(NEW, **found("WeightsAvailable", "False", "NoSpace")), None, "", ""),
    (checks.source_tried_again, facts(found=FOUND), None, "", ""),
    (checks.nowhere_to_go, facts(**NO_ROOM), "False", "Settled", "No room."),
    (checks.nowhere_to_go, facts(NEW, groups=GROUPS, **NO_ROOM), "False", "Settled", "No room."),
    (checks.nowhere_to_go, facts(revision("new", **SEATED), groups=GROUPS, **NO_ROOM), None, "", ""),
    (checks.nowhere_to_go, facts(NEW), None, "", ""),
    (
        checks.waiting_to_retry,
        facts(revision("new", failures=2, retry_at=NOW, message="No.")),
        "False",
        "WaitingToRetry",
        "Try 2 failed: No.",
    ),
    (checks.waiting_to_retry, facts(revision("new", retry_at=NOW, attempt_at=NOW)), None, "", ""),
    (checks.waiting_to_retry, facts(revision("new", is_proved=True, retry_at=NOW)), None, "", ""),
    (checks.waiting_for_its_turn, facts(NEW, waiting={"new": (Reason.Queued, "")}), "True", "Queued", ""),
    (checks.waiting_for_its_turn, facts(NEW), None, "", ""),
    (checks.cluster_starting, facts(NEW, serve=None, groups=GROUPS), "True", "ClusterStarting", ""),
    (checks.cluster_starting, facts(NEW, serve=None), None, "", ""),
    (checks.cluster_starting, facts(NEW, groups=GROUPS), None, "", ""),
    (checks.building, facts(NEW), "True", "Building", ""),
    (
        checks.building,
        facts(NEW, **serve(application(deployment_message="no node has room"))),
        "True",
        "Building",
        "no node",
    ),
    (checks.building, facts(NEW, **serve(application(replicas=ONE_REPLICA))), None, "", ""),
    (checks.building, facts(PROVED, **serve(application(status="DEPLOYING"))), "True", "Building", ""),
    (checks.building, facts(PROVED, **serve(application())), None, "", ""),
    (
        checks.building,
        facts(PROVED, **serve(application(status="DEPLOYING", replicas=ONE_REPLICA))),
        None,
        "",
        "",
    ),
    (checks.loading, facts(NEW), "True", "Loading", ""),
    (checks.loading, facts(PROVED), None, "", ""),
    (checks.old_revision_draining, facts(OLD, PROVED), "True", "Draining", ""),
    (checks.old_revision_draining, facts(PROVED), None, "", ""),
    (checks.settled, facts(PROVED), "False", "Settled", ""),
    # Degraded
    (
        checks.revision_failed,
        facts(revision("new", failures=1, reason="OutOfMemory", message="No.")),
        "True",
        "RevisionFailed",
        "OutOfMemory: No.",
    ),
    (checks.revision_failed, facts(revision("new", is_proved=True, failures=1)), None, "", ""),
    (checks.revision_failed, facts(NEW), None, "", ""),
    (
        checks.serve_failed,
        facts(serve_problem=("ServeUnavailable", "Gone.")),
        "True",
        "ServeUnavailable",
        "Gone.",
    ),
    (checks.serve_failed, facts(), None, "", ""),
    (
        checks.pods_failed,
        facts(revision("new", **SEATED), pod_problems=(CRASH,)),
        "True",
        "CrashLoop",
        "It ends.",
    ),
    (
        checks.pods_failed,
        facts(revision("new", placement=Placement("gpu")), pod_problems=(CRASH,)),
        None,
        "",
        "",
    ),
    (
        checks.pods_failed,
        facts(revision("new", is_proved=True, **SEATED), pod_problems=(CRASH,), replicas=(stats("new"),)),
        None,
        "",
        "",
    ),
    (checks.application_refused, facts(rejected={"m--new": "Wrong."}), "True", "ServeRejected", "Wrong."),
    (checks.application_refused, facts(rejected={"m--old": "Wrong."}), None, "", ""),
    (
        checks.replica_failed,
        facts(PROVED, **SERVES, reports={("m", "new"): FAILED}),
        "True",
        "ReplicaFailed",
        "OutOfMemory: No room.",
    ),
    (checks.replica_failed, facts(PROVED, **SERVES), None, "", ""),
    (checks.replica_failed, facts(NEW, reports={("m", "new"): FAILED}), None, "", ""),
    (
        checks.application_given_up,
        facts(PROVED, **SERVES, **serve(application(status="DEPLOY_FAILED", message="ImportError: x"))),
        "True",
        "DeployFailed",
        "ImportError: x",
    ),
    (checks.application_given_up, facts(PROVED, **SERVES, **serve(application())), None, "", ""),
    (
        checks.application_unhealthy,
        facts(PROVED, **SERVES, **serve(application(status="UNHEALTHY", message="Two are."))),
        "True",
        "Unhealthy",
        "Two are.",
    ),
    (checks.application_unhealthy, facts(PROVED, **SERVES, **serve(application())), None, "", ""),
    (
        checks.application_rebuilt,
        facts(replace(PROVED, failures=1, reason="DeployFailed", message="No."), **SERVES),
        "True",
        "DeployFailed",
        "No.",
    ),
    (checks.application_rebuilt, facts(PROVED, **SERVES), None, "", ""),
    (checks.healthy, facts(PROVED, **SERVES), "False", "Healthy", "Note new."),
    # Ready
    (checks.deleting, facts(is_deleting=True), "False", "Deleting", ""),
    (checks.drained, facts(), None, "", ""),
    (checks.drained, facts(is_drained=True), "False", "Drained", ""),
    (checks.deleting, facts(), None, "", ""),
    (
        checks.rollout_given_up,
        facts(NEW, **rollout("Aborted", is_refused=True)),
        "False",
        "RolloutAborted",
        "Why.",
    ),
    (checks.rollout_given_up, facts(NEW, **rollout("Aborted", target="x", is_refused=True)), None, "", ""),
    (checks.rollout_given_up, facts(NEW), None, "", ""),
    (checks.rollout_queued, facts(NEW, **rollout("Queued")), "True", "RolloutQueued", "Why."),
    (checks.rollout_queued, facts(NEW, **rollout("Queued"), **NO_ROOM), None, "", ""),
    (checks.rollout_queued, facts(NEW, **rollout("Warming")), None, "", ""),
    (
        checks.rolling_out,
        facts(
            PROVED,
            **rollout(
                "Progressing", reason=Reason.WaitingForEvidence, weight=15, step=0, steps=[StepView(15)]
            ),
        ),
        "True",
        "WaitingForEvidence",
        "Revision new has 15 % of the requests, step 1 of 1.",
    ),
    (checks.rolling_out, facts(PROVED, **rollout("Completed")), None, "", ""),
    (checks.rolling_out, facts(PROVED, **rollout("Warming", strategy="AllAtOnce")), None, "", ""),
    (
        checks.rollout_aborted,
        facts(NEW, **rollout("Aborted", is_refused=True)),
        "True",
        "RolloutAborted",
        "Why.",
    ),
    (checks.rollout_aborted, facts(NEW, **rollout("Aborted", stable="")), "True", "RolloutAborted", "Why."),
    (checks.rollout_aborted, facts(NEW, **rollout("Aborted")), None, "", ""),
    (checks.rollout_aborted, facts(NEW, **rollout("Progressing")), None, "", ""),
    (
        checks.place_lost,
        facts(PROVED, **SERVES, groups=GROUPS, **found("Scheduled", "False", "NoSuchGroup", "Gone.")),
        "False",
        "NoSuchGroup",
        "Gone.",
    ),
    (
        checks.place_lost,
        facts(replace(PROVED, **SEATED), **SERVES, groups=GROUPS, **found("Scheduled", "False", "GpusTaken")),
        None,
        "",
        "",
    ),
    (checks.place_lost, facts(PROVED, **SERVES, **found("Scheduled", "False", "TooFewCpus")), None, "", ""),
    (checks.place_lost, facts(PROVED, **SERVES, groups=GROUPS, found=FOUND), None, "", ""),
    (checks.unproven, facts(PROVED, **SERVES), None, "", ""),
    (
        checks.unproven,
        facts(NEW, **found("WeightsAvailable", "False", "NoSpace", "Full.")),
        "False",
        "NoSpace",
        "Full.",
    ),
    (checks.unproven, facts(NEW, **found("Scheduled", "False", "GpusTaken")), "False", "GpusTaken", ""),
    (
        checks.unproven,
        facts(NEW, **found("Degraded", "True", "RevisionFailed")),
        "False",
        "RevisionFailed",
        "",
    ),
    (checks.unproven, facts(NEW, **found("Progressing", "True", "Loading")), "False", "Loading", ""),
    (checks.unproven, facts(NEW, found=FOUND), "False", "Unproven", ""),
    (checks.serving, facts(PROVED, **SERVES, replicas=(stats("new"),)), "True", "Serving", ""),
    (checks.serving, facts(PROVED, **SERVES, replicas=(stats("new", draining=True),)), None, "", ""),
    (checks.serving, facts(PROVED, **SERVES, replicas=(stats("other"),)), None, "", ""),
    (
        checks.without_replicas,
        facts(**found("Degraded", "True", "CrashLoop", "It ends.")),
        "False",
        "CrashLoop",
        "",
    ),
    (checks.without_replicas, facts(found=FOUND), None, "", ""),
    (
        checks.asleep,
        facts(PROVED, **SERVES, model=SLEEPER, depths={("m", "new"): Depth(1, 0, 0.0)}),
        None,
        "",
        "",
    ),
    (
        checks.kept_asleep,
        facts(PROVED, **SERVES, waiting={"new": (Reason.WaitingForRoom, "Held by a.")}),
        "False",
        "WaitingForRoom",
        "Held by a.",
    ),
    (checks.kept_asleep, facts(PROVED, **SERVES), None, "", ""),
    (checks.asleep, facts(PROVED, model=SLEEPER, **SERVES), "True", "Asleep", ""),
    (checks.asleep, facts(PROVED, **SERVES), None, "", ""),
    (checks.asleep, PARKING, "True", "Asleep", "not parked yet"),
    (checks.asleep, parked(1 << 30), "True", "Asleep", "parked: 1.00 GiB in host memory of node-1"),
    (checks.asleep, parked(0, "No room."), "True", "Asleep", "Its weights are not parked. No room."),
    (checks.asleep, parked(1 << 30, why_not="Full."), "True", "Asleep", "not parked. Full."),
    (
        checks.asleep,
        facts(PROVED, model=SLEEPER, **SERVES, **serve(application(wanted_replicas=1))),
        None,
        "",
        "",
    ),
    (checks.waking, facts(PROVED, **SERVES), "False", "Waking", "6 s the last time"),
]


@pytest.mark.parametrize(
    ("check", "given", "status", "reason", "message"),
    CASES,
    ids=[f"{number}-{case[0].__name__}-{case[3] or 'passes'}" for number, case in enumerate(CASES)],
)
def test_a_check_alone(check: Check, given: Facts, status: str | None, reason: str, message: str) -> None:
    verdict = check(given)
    assert (verdict.status if verdict else None) == status
    if verdict is not None:
        assert verdict.reason == reason
        assert message in verdict.message


def test_every_check_has_a_case() -> None:
    """In each chain all but the last can pass on, and the last always answers."""
    for chain in CHAINS.values():
        for check in chain[:-1]:
            assert {case[2] is None for case in CASES if case[0] is check} == {True, False}, check
        assert any(case[0] is chain[-1] and case[2] for case in CASES), chain[-1]


def test_the_first_check_that_answers_decides() -> None:
    given = facts(
        PROVED, **SERVES, serve_problem=("ServeUnavailable", "Gone."), rejected={"m--new": "Wrong."}
    )
    by_type = {item.type: item for item in conditions(given)}
    assert set(by_type) == set(CONDITION_TYPES)
    assert by_type["Degraded"].reason == "ServeUnavailable"
    assert (by_type["Ready"].status, by_type["Ready"].reason) == ("False", "ServeUnavailable")


class TestSeveralRevisions:
    """Nothing is said of one revision alone where several take traffic."""

    BOTH: ClassVar = {"weights": {"new": 15, "old": 85}}

    def test_the_entry_sums_over_them(self) -> None:
        given = facts(
            PROVED,
            replace(OLD, proof=OLD_PROOF),
            **self.BOTH,
            replicas=(stats("old"), stats("old"), stats("new"), stats("gone")),
            **serve(application("old", wanted_replicas=3), application("new", wanted_replicas=1)),
        )
        entry = entry_of(given, NOW)
        assert entry.revisions == {"new": 15, "old": 85}
        assert (entry.replicas_ready, entry.replicas_wanted) == (3, 4)
        assert (entry.slots, entry.precision) == (8, "float16")
        assert (entry.ready, entry.accepts) == (True, True)
        notes = next(item.message for item in entry.conditions if item.type == "Degraded")
        assert notes == "Note old. Note new."

    def test_one_without_a_place_takes_nothing(self) -> None:
        given = facts(PROVED, replace(OLD, **SEATED), **self.BOTH, groups=GROUPS)
        assert entry_of(given, NOW).revisions == {"old": 85}
        assert entry_of(facts(PROVED, OLD, **self.BOTH, groups=GROUPS), NOW).revisions == {}

    @pytest.mark.parametrize("name", ["new", "old"])
    def test_trouble_of_any_is_the_models(self, name: str) -> None:
        failed = {("m", name): replace(FAILED, revision=name)}
        verdict = checks.replica_failed(facts(PROVED, OLD, **self.BOTH, reports=failed))
        assert verdict is not None
        given_up = serve(application(name, "DEPLOY_FAILED", message="x"))
        assert checks.application_given_up(facts(PROVED, OLD, **self.BOTH, **given_up)) is not None

    def test_it_sleeps_only_where_all_do(self) -> None:
        awake = serve(application("new", wanted_replicas=1), application("old"))
        assert checks.asleep(facts(PROVED, OLD, model=SLEEPER, **self.BOTH, **awake)) is None
