"""What is refused at once of what is asked. Pure. The controller decides on all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tidegate.control_api.views import ModelView, ScaleBody
from tidegate.errors import Conflict, InvalidRequest, NotFound
from tidegate.messages.rollouts import Action, RevisionView, RolloutView

ENDED = ("Aborted", "Completed")


def action_fits(model: ModelView, action: Action, revisions: Sequence[RevisionView]) -> None:
    """Raises `Conflict` where there is nothing to act on, `NotFound` and `InvalidRequest` for a wrong
    revision."""
    if action.revision and action.verb != "undo":
        raise InvalidRequest(
            f"revision: {action.revision!r}: only undo takes one; leave it out.", param="revision"
        )
    if action.revision and all(one.revision != action.revision for one in revisions):
        known = ", ".join(one.revision for one in revisions) or "none"
        raise NotFound(f"Model {model.name} has no revision {action.revision!r}; there is: {known}.")
    view, name = model.rollout, model.name
    if action.verb in ("pause", "resume", "promote", "abort") and (view is None or view.phase in ENDED):
        raise Conflict(f"No rollout of {name} is under way, so there is nothing to {action.verb}.")
    if action.verb == "retry" and (view is None or view.phase != "Aborted"):
        raise Conflict(f"No rollout of {name} was aborted, so there is nothing to retry.")


def scaled(spec: Mapping[str, Any], body: ScaleBody) -> dict[str, Any]:
    """Return the spec with these bounds. Raises `InvalidRequest` where the body has none."""
    wanted = {"minReplicas": body.min_replicas, "maxReplicas": body.max_replicas}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if not wanted:
        raise InvalidRequest("min_replicas, max_replicas: missing: give one of them, or both.")
    return {**spec, "scaling": {**(spec.get("scaling") or {}), **wanted}}


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
