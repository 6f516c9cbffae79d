"""The rollout moves a model's traffic to the revision that its spec asks for. Pure.

Each round every gate judges one snapshot; traffic moves only where all advance. What has lost its traffic
drains and goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from tidegate.control.desired import WHOLE, ModelRecord
from tidegate.control.observed import Observation

# Gateways follow the registry within a second; an old revision may get requests until then.
SWITCH_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """One model at one moment. `target` is the revision that its spec asks for."""

    record: ModelRecord
    target: str
    seen: Observation


@dataclass(frozen=True, slots=True)
class GateResult:
    action: Literal["advance", "hold"]
    reason: str
    message: str


Gate = Callable[[Rollout], GateResult]


def proved(rollout: Rollout) -> GateResult:
    """Hold until a replica of the target has loaded and proved itself."""
    kept = rollout.record.revisions.get(rollout.target)
    if kept is None or not kept.is_proved:
        return GateResult("hold", "Unproven", f"Revision {rollout.target} has not proved itself yet.")
    return GateResult("advance", "Proved", f"Revision {rollout.target} has proved itself.")


def answers(rollout: Rollout) -> GateResult:
    """Hold while the target's replica, whose proof is in, does not say yet that it takes requests, and those
    of the revisions before it do: the model would not be ready for that moment."""
    name, seen = rollout.record.name, rollout.seen
    state = seen.application(name, rollout.target)
    is_asleep = state is not None and state.wanted_replicas == 0
    others = [revision for revision in rollout.record.weights if revision != rollout.target]
    if seen.ready_replicas(name, rollout.target) or is_asleep:
        return GateResult("advance", "Answers", f"Revision {rollout.target} takes requests.")
    if not any(seen.ready_replicas(name, revision) for revision in others):
        return GateResult("advance", "NothingToLose", "No other revision takes requests either.")
    return GateResult("hold", "Starting", f"Revision {rollout.target} takes no requests yet.")


GATES: tuple[Gate, ...] = (proved, answers)


def decide(rollout: Rollout) -> GateResult:
    """Return the answer of the first gate that does not advance, else that of the last gate."""
    results = [gate(rollout) for gate in GATES]
    return next((result for result in results if result.action != "advance"), results[-1])


def weights_after(rollout: Rollout) -> dict[str, int]:
    """Return the traffic table that follows from the gates."""
    return {rollout.target: WHOLE} if decide(rollout).action == "advance" else rollout.record.weights


def retired(
    record: ModelRecord, target: str, seen: Observation, now: float
) -> tuple[ModelRecord, tuple[tuple[str, str], ...]]:
    """Return the record with the revisions marked that lost their traffic, and without those that have
    drained or never proved themselves; and which went, each with the message for its requests."""
    gone: dict[str, str] = {}
    revisions = dict(record.revisions)
    for revision, kept in record.revisions.items():
        if revision == target or revision in record.weights:
            continue
        if not kept.is_proved:
            gone[revision] = "A newer revision of the model took its place."
        elif not kept.retired_at:
            revisions[revision] = replace(kept, retired_at=now)
        elif now >= kept.retired_at + SWITCH_SECONDS and seen.unfinished(record.name, [revision]) == 0:
            gone[revision] = "The revision has drained."
    left = {revision: kept for revision, kept in revisions.items() if revision not in gone}
    return replace(record, revisions=left), tuple(gone.items())
