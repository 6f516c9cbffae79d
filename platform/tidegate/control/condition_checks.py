"""The chains of named checks behind a model's conditions. Pure.

Each condition has a tuple of checks, `CHAINS`: the first that answers decides, and the last always answers. A
check sees the facts alone. Chains run in their order, so a later one may read what an earlier one found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from tidegate.control.conditions import Status, condition, last_lines
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.control.observed import ApplicationState, Observation, PodProblem, SourceState
from tidegate.control.packing import Placement, Refusal
from tidegate.control.reasons import (
    CONFIG_VALID,
    DEGRADED,
    PROGRESSING,
    READY,
    SCHEDULED,
    WEIGHTS_AVAILABLE,
    Reason,
)
from tidegate.control.resources import Model
from tidegate.control.rollout import is_judged
from tidegate.control.serve_words import why_given_up
from tidegate.control.sizing import gib
from tidegate.messages.registry import Condition, RevisionReport

SERVE_DECISION_SECONDS = 1.0  # until Serve has seen a waiting request and asked Ray for a replica


@dataclass(frozen=True, slots=True)
class Verdict:
    """A condition without its type. Without a message it says what its reason means."""

    status: Status
    reason: str
    message: str = ""


@dataclass(frozen=True)
class Facts:
    """One model at one moment. `target` is the revision that its spec asks for. `misfit` says why the target,
    or one of its replicas, finds no place; `waiting` why it lacks a replica that it should have, or is not in
    Serve yet, by revision; `refused` why a newer spec is not what runs. `found` holds the conditions of the
    chains that ran before."""

    model: Model
    record: ModelRecord
    target: str
    source: SourceState | None
    misfit: Refusal | None
    waiting: Mapping[str, Refusal]
    seen: Observation
    is_deleting: bool = False
    is_drained: bool = False
    refused: Refusal | None = None
    parks: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, Condition] = field(default_factory=dict)

    @property
    def candidate(self) -> RevisionRecord | None:
        """The target's record."""
        return self.record.revisions.get(self.target)

    @cached_property
    def serving(self) -> tuple[RevisionRecord, ...]:
        return self.record.serving

    @cached_property
    def shown(self) -> tuple[RevisionRecord, ...]:
        """The revisions whose figures are the model's: those that take traffic, else the target."""
        if self.serving:
            return self.serving
        return (self.candidate,) if self.candidate is not None else ()

    @property
    def placed(self) -> tuple[RevisionRecord, ...]:
        """Those of `shown` that have a place. Where a group is gone from the pool, its revisions have served
        but can no longer."""
        return tuple(kept for kept in self.shown if kept.placement is not None or not self.seen.groups)

    @property
    def proof(self) -> RevisionReport | None:
        """The proof of the revision with the largest share."""
        return self.shown[0].proof if self.shown else None

    @cached_property
    def replicas_ready(self) -> int:
        return sum(self.seen.ready_replicas(self.model.name, kept.revision) for kept in self.shown)

    @property
    def replicas_wanted(self) -> int:
        states = [self.application(kept.revision) for kept in self.shown]
        return sum(state.wanted_replicas for state in states if state is not None)

    @cached_property
    def pod_problem(self) -> PodProblem | None:
        """The first problem of a pod that keeps this model from a replica it should have."""
        for kept in (self.candidate, *self.serving) if self.seen.pod_problems else ():
            if kept is None or kept.placement is None or not self._lacks_replica(kept):
                continue
            for problem in self.seen.pod_problems:
                if problem.group in ("", kept.group):
                    return problem
        return None

    def application(self, revision: str) -> ApplicationState | None:
        return self.seen.application(self.model.name, revision)

    def _lacks_replica(self, kept: RevisionRecord) -> bool:
        state = self.application(kept.revision)
        wanted = state.wanted_replicas if state is not None else self.model.spec.scaling.min_replicas
        if not kept.is_proved:
            wanted = max(1, wanted)
        return self.seen.ready_replicas(self.model.name, kept.revision) < wanted


Check = Callable[[Facts], Verdict | None]


def conditions(facts: Facts) -> list[Condition]:
    """Run every chain."""
    found: dict[str, Condition] = {}
    facts = replace(facts, found=found)
    for kind, chain in CHAINS.items():
        verdict = next(verdict for check in chain if (verdict := check(facts)) is not None)
        found[kind] = condition(kind, verdict.status, verdict.reason, verdict.message)
    return list(found.values())


# ConfigValid -------------------------------------------------------------------------------------------


def change_refused(facts: Facts) -> Verdict | None:
    """A refused change: what ran before goes on. A model that was never valid never comes so far."""
    return Verdict("False", *facts.refused) if facts.refused is not None else None


def valid(_: Facts) -> Verdict | None:
    return Verdict("True", Reason.Valid)


# WeightsAvailable --------------------------------------------------------------------------------------


def no_weights_needed(facts: Facts) -> Verdict | None:
    return Verdict("True", Reason.NotNeeded) if facts.model.spec.source is None else None


def source_resolving(facts: Facts) -> Verdict | None:
    source = facts.source
    if source is None or source.state == "resolving":
        return Verdict("Unknown", Reason.Resolving, source.message if source is not None else "")
    return None


def source_failed(facts: Facts) -> Verdict | None:
    source = facts.source
    if source is None or source.state != "failed":
        return None
    return Verdict("False", Reason.of(source.reason) or Reason.SourceUnavailable, source.message)


def source_resolved(facts: Facts) -> Verdict | None:
    if facts.source is None:
        return None
    return Verdict("True", Reason.Resolved, f"The checkpoint is in {facts.source.checkpoint}.")


# Scheduled ---------------------------------------------------------------------------------------------


def finds_no_place(facts: Facts) -> Verdict | None:
    return Verdict("False", *facts.misfit) if facts.misfit is not None else None


def not_sized_yet(facts: Facts) -> Verdict | None:
    """The size follows from the weights."""
    if facts.found[WEIGHTS_AVAILABLE].status == "True":
        return None
    return Verdict("Unknown", Reason.NotChecked)


def finds_no_node(facts: Facts) -> Verdict | None:
    problem = facts.pod_problem
    if problem is None or problem.reason != Reason.Unschedulable:
        return None
    return Verdict("False", problem.reason, problem.message)


def placed(facts: Facts) -> Verdict | None:
    placement = facts.candidate.placement if facts.candidate is not None else None
    return Verdict("True", Reason.Placed, _place(placement) if placement is not None else "")


def _place(placement: Placement) -> str:
    cap = f", {gib(placement.memory_cap_bytes)} of memory" if placement.memory_cap_bytes else ""
    share = f"{placement.gpus:g} GPU{cap}" if placement.gpus else f"no share of a GPU{cap}"
    return f"Each replica runs in group {placement.group} with {share}."


# Progressing -------------------------------------------------------------------------------------------


def finishing_before_deletion(facts: Facts) -> Verdict | None:
    if not facts.is_deleting:
        return None
    left = facts.seen.unfinished(facts.model.name, facts.record.revisions)
    return Verdict("True", Reason.Draining, f"{left} requests are left." if left is not None else "")


def weights_on_their_way(facts: Facts) -> Verdict | None:
    weights = facts.found[WEIGHTS_AVAILABLE]
    return Verdict("True", Reason.Resolving, weights.message) if weights.status == "Unknown" else None


def source_tried_again(facts: Facts) -> Verdict | None:
    weights = facts.found[WEIGHTS_AVAILABLE]
    if weights.status != "False" or facts.candidate is not None:
        return None
    return Verdict("False", Reason.WaitingToRetry, f"Tried again by itself. {weights.message}")


def rollout_given_up(facts: Facts) -> Verdict | None:
    state = facts.record.rollout
    if state is None or not state.refuses(facts.target):
        return None
    return Verdict("False", Reason.RolloutAborted, state.message)


def rollout_queued(facts: Facts) -> Verdict | None:
    state = facts.record.rollout
    if state is None or state.phase != "Queued" or facts.misfit is not None:
        return None
    return Verdict("True", Reason.RolloutQueued, state.message)


def nowhere_to_go(facts: Facts) -> Verdict | None:
    kept, misfit, state = facts.candidate, facts.misfit, facts.record.rollout
    is_queued = state is not None and state.phase == "Queued"
    has_no_place = is_queued or (bool(facts.seen.groups) and kept is not None and kept.placement is None)
    if kept is None or (misfit is not None and has_no_place):
        return Verdict("False", Reason.Settled, misfit[1] if misfit is not None else "")
    return None


def waiting_to_retry(facts: Facts) -> Verdict | None:
    kept = facts.candidate
    if kept is None or kept.is_proved or not kept.retry_at or kept.attempt_at:
        return None
    return Verdict("False", Reason.WaitingToRetry, f"Try {kept.failures} failed: {kept.message}")


def waiting_for_its_turn(facts: Facts) -> Verdict | None:
    waiting = facts.waiting.get(facts.target)
    return Verdict("True", *waiting) if waiting is not None else None


def cluster_starting(facts: Facts) -> Verdict | None:
    if facts.seen.serve is None and facts.seen.groups:
        return Verdict("True", Reason.ClusterStarting)
    return None


def building(facts: Facts) -> Verdict | None:
    kept, state = facts.candidate, facts.application(facts.target)
    if kept is not None and not kept.is_proved:
        return Verdict("True", Reason.Building, _slow(state)) if state is None or not state.replicas else None
    # Serve calls it the same when only its scaling changes.
    is_there = state is not None and (state.is_built or bool(state.replicas))
    return Verdict("True", Reason.Building) if not is_there else None


def loading(facts: Facts) -> Verdict | None:
    if facts.candidate is None or facts.candidate.is_proved:
        return None
    return Verdict("True", Reason.Loading, _slow(facts.application(facts.target)))


def _slow(state: ApplicationState | None) -> str:
    """Ray's own words where a replica waits for room or a process for long."""
    return last_lines(state.deployment_message) if state and state.deployment_message else ""


def rolling_out(facts: Facts) -> Verdict | None:
    """Its steps; before them it is what keeps the new revision from being ready that says most. Figures that
    change all the time are in the rollout's view: a condition is written, and read by gateways, when it
    changes."""
    state = facts.record.rollout
    if state is None or not is_judged(state):
        return None
    step = f", step {state.step + 1} of {len(state.steps)}" if state.step >= 0 else ""
    return Verdict(
        "True", state.reason, f"Revision {state.target} has {state.weight} % of the requests{step}."
    )


def old_revision_draining(facts: Facts) -> Verdict | None:
    return Verdict("True", Reason.Draining) if len(facts.record.revisions) > 1 else None


def settled(_: Facts) -> Verdict | None:
    return Verdict("False", Reason.Settled)


# Degraded ----------------------------------------------------------------------------------------------


def rollout_aborted(facts: Facts) -> Verdict | None:
    state = facts.record.rollout
    if state is None or state.phase != "Aborted" or state.target != facts.target:
        return None
    return (
        Verdict("True", Reason.RolloutAborted, state.message)
        if not state.stable or state.is_refused
        else None
    )


def revision_failed(facts: Facts) -> Verdict | None:
    kept = facts.candidate
    if kept is None or kept.is_proved or not kept.failures:
        return None
    return Verdict("True", Reason.RevisionFailed, f"{kept.reason}: {kept.message}")


def serve_failed(facts: Facts) -> Verdict | None:
    return Verdict("True", *facts.seen.serve_problem) if facts.seen.serve_problem is not None else None


def pods_failed(facts: Facts) -> Verdict | None:
    problem = facts.pod_problem
    return Verdict("True", problem.reason, problem.message) if problem is not None else None


def application_refused(facts: Facts) -> Verdict | None:
    refused = facts.seen.refusal(facts.model.name, facts.target)
    return Verdict("True", Reason.ServeRejected, refused) if refused is not None else None


def replica_failed(facts: Facts) -> Verdict | None:
    for kept in facts.serving:
        report = facts.seen.reports.get((facts.model.name, kept.revision))
        if report is not None and not report.proved:
            return Verdict("True", Reason.ReplicaFailed, f"{report.reason}: {report.message}")
    return None


def application_given_up(facts: Facts) -> Verdict | None:
    for kept in facts.serving:
        state = facts.application(kept.revision)
        if state is not None and state.status == "DEPLOY_FAILED":
            return Verdict("True", *why_given_up(state, kept.group, facts.seen.workers))
    return None


def application_unhealthy(facts: Facts) -> Verdict | None:
    for kept in facts.serving:
        state = facts.application(kept.revision)
        if state is not None and state.status == "UNHEALTHY":
            message = last_lines(state.deployment_message or state.message)
            return Verdict("True", Reason.Unhealthy, message)
    return None


def application_rebuilt(facts: Facts) -> Verdict | None:
    for kept in facts.serving:
        if kept.failures:
            return Verdict("True", kept.reason, kept.message)
    return None


def healthy(facts: Facts) -> Verdict | None:
    notes = [note for kept in facts.serving if kept.proof is not None for note in kept.proof.notes]
    return Verdict("False", Reason.Healthy, " ".join(notes))


# Ready -------------------------------------------------------------------------------------------------


def deleting(facts: Facts) -> Verdict | None:
    return Verdict("False", Reason.Deleting) if facts.is_deleting else None


def drained(facts: Facts) -> Verdict | None:
    return Verdict("False", Reason.Drained) if facts.is_drained else None


def place_lost(facts: Facts) -> Verdict | None:
    scheduled = facts.found[SCHEDULED]
    if facts.placed or not facts.shown or scheduled.status != "False":
        return None
    return Verdict("False", scheduled.reason, scheduled.message)


def unproven(facts: Facts) -> Verdict | None:
    """The first thing in the way of the first proof."""
    if facts.serving:
        return None
    blockers = ((WEIGHTS_AVAILABLE, "False"), (SCHEDULED, "False"), (DEGRADED, "True"), (PROGRESSING, "True"))
    for kind, status in blockers:
        if (blocker := facts.found[kind]).status == status:
            return Verdict("False", blocker.reason, blocker.message)
    return Verdict("False", Reason.Unproven)


def serving(facts: Facts) -> Verdict | None:
    return Verdict("True", Reason.Serving) if facts.replicas_ready else None


def without_replicas(facts: Facts) -> Verdict | None:
    degraded = facts.found[DEGRADED]
    return Verdict("False", degraded.reason, degraded.message) if degraded.status == "True" else None


def kept_asleep(facts: Facts) -> Verdict | None:
    """A request waits, and so does the replica that should take it."""
    for kept in facts.shown:
        if (waiting := facts.waiting.get(kept.revision)) is not None:
            return Verdict("False", *waiting)
    return None


def asleep(facts: Facts) -> Verdict | None:
    may_sleep = facts.model.spec.scaling.min_replicas == 0 and facts.replicas_wanted == 0
    is_asked = facts.seen.unfinished(facts.model.name, [kept.revision for kept in facts.shown])
    return Verdict("True", Reason.Asleep, _parked(facts)) if may_sleep and not is_asked else None


def _parked(facts: Facts) -> str:
    """Say what of a sleeping model is in host memory, where its weights should be."""
    for kept in facts.shown:
        if (why_not := facts.parks.get(kept.revision)) is None:
            continue
        found = facts.seen.parked.get((facts.model.name, kept.revision))
        if not why_not and found is not None and found.bytes:
            return f"Its weights are parked: {gib(found.bytes)} in host memory of {found.node}."
        why_not = why_not or (found.message if found is not None else "")
        return f"Its weights are not parked. {why_not}" if why_not else "Its weights are not parked yet."
    return ""


def waking(facts: Facts) -> Verdict | None:
    known = wake_seconds(facts.proof) if facts.proof is not None else 0.0
    message = f"A replica is starting (that took {known:.0f} s the last time)." if known else ""
    return Verdict("False", Reason.Waking, message)


def wake_seconds(proof: RevisionReport) -> float:
    """Return how long a sleeping revision takes to serve: Serve's decision, the process, the load."""
    return SERVE_DECISION_SECONDS + proof.process_seconds + proof.load_seconds


CHAINS: Mapping[str, tuple[Check, ...]] = {
    CONFIG_VALID: (change_refused, valid),
    WEIGHTS_AVAILABLE: (no_weights_needed, source_resolving, source_failed, source_resolved),
    SCHEDULED: (finds_no_place, not_sized_yet, finds_no_node, placed),
    PROGRESSING: (
        finishing_before_deletion,
        weights_on_their_way,
        source_tried_again,
        rollout_given_up,
        rollout_queued,
        nowhere_to_go,
        waiting_to_retry,
        waiting_for_its_turn,
        cluster_starting,
        building,
        loading,
        rolling_out,
        old_revision_draining,
        settled,
    ),
    DEGRADED: (
        rollout_aborted,
        revision_failed,
        serve_failed,
        pods_failed,
        application_refused,
        replica_failed,
        application_given_up,
        application_unhealthy,
        application_rebuilt,
        healthy,
    ),
    READY: (deleting, drained, place_lost, unproven, serving, without_replicas, kept_asleep, asleep, waking),
}
