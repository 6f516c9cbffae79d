"""What is refused at once of what is asked. Pure. The controller decides on all else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.control.reasons import Reason
from tidegate.control_api.views import PlanView, ScaleBody
from tidegate.errors import InvalidRequest
from tidegate.messages.rollouts import Action, RolloutView


def takes_revision(action: Action) -> None:
    """Raises `InvalidRequest` for a revision with a verb that takes none."""
    if action.revision and action.verb != "undo":
        raise InvalidRequest(
            f"revision: {action.revision!r}: only undo takes one; leave it out.", param="revision"
        )


def scaled(spec: Mapping[str, Any], body: ScaleBody) -> dict[str, Any]:
    """Return the spec with these bounds. Raises `InvalidRequest` where the body has none."""
    wanted = {"minReplicas": body.min_replicas, "maxReplicas": body.max_replicas}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if not wanted:
        raise InvalidRequest("min_replicas, max_replicas: missing: give one of them, or both.")
    return {**spec, "scaling": {**(spec.get("scaling") or {}), **wanted}}


def counts_accelerators(spec: Mapping[str, Any]) -> bool:
    """Tell whether only a plan says if a rollout by this spec fits: what replicas take is not in it."""
    rollout = spec.get("rollout")
    if not isinstance(rollout, Mapping):
        return False
    return rollout.get("maxSurgeAccelerators") is not None or bool(rollout.get("minAvailableAccelerators"))


def fitting(plan: PlanView) -> PlanView:
    """Return the plan. Raises `InvalidRequest` where its rollout could never keep to its bounds."""
    for each in plan.conditions:
        if each.reason == Reason.SurgeTooSmall:
            raise InvalidRequest(each.message, param="rollout")
    return plan


def brief(view: RolloutView | None) -> dict[str, Any] | None:
    """Return what the audit log says of a rollout."""
    if view is None:
        return None
    return {
        "rollout": view.id,
        "phase": view.phase,
        "stable": view.stable,
        "target": view.target,
        "weight": view.weight,
        "step": view.step,
        "reason": view.reason,
        "message": view.message,
    }
