"""What people ask of a Model in its annotations, by the control API or `kubectl annotate`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from tidegate.control.conditions import condition
from tidegate.messages.registry import Condition
from tidegate.messages.rollouts import Action, Verb
from tidegate_operator.cache import Body

ROLLOUT = "tidegate.dev/rollout"
AUTHOR = "tidegate.dev/rollout-author"
DRAIN = "tidegate.dev/drain"
MAX_SHOWN_CHARACTERS = 100


def action_of(body: Body) -> Action | None:
    """Return the action that is asked for; None: none, or one that there is not."""
    asked = annotations_of(body)
    verb, separator, revision = asked.get(ROLLOUT, "").partition("=")
    if verb not in get_args(Verb) or (separator and (verb != "undo" or not revision)):
        return None
    return Action(verb, revision, asked.get(AUTHOR, ""))  # type: ignore[arg-type]


def wrong_action(body: Body) -> Condition | None:
    """Return the Event about an action that there is not."""
    value = annotations_of(body).get(ROLLOUT)
    if value is None or action_of(body) is not None:
        return None
    known = ", ".join(get_args(Verb))
    return condition(
        "RolloutAction",
        "False",
        "InvalidAction",
        f"metadata.annotations: {ROLLOUT}: {value[:MAX_SHOWN_CHARACTERS]!r}: use {known} or undo=REVISION. "
        "It is removed.",
    )


def annotations_for(action: Action) -> dict[str, str | None]:
    """Return the annotations that ask for this action."""
    value = f"{action.verb}={action.revision}" if action.revision else action.verb
    return {ROLLOUT: value, AUTHOR: action.author or None}


def removal(body: Body) -> Sequence[Mapping[str, Any]]:
    """Return the JSON patch that takes the action off, where it is still this one."""
    asked = annotations_of(body)
    path = {name: f"/metadata/annotations/{name.replace('/', '~1')}" for name in (ROLLOUT, AUTHOR)}
    tests = [{"op": "test", "path": path[name], "value": asked[name]} for name in path if name in asked]
    return [*tests, *({"op": "remove", "path": path[name]} for name in path if name in asked)]


def drains(body: Body) -> bool:
    return annotations_of(body).get(DRAIN) == "true"


def annotations_of(body: Body) -> Mapping[str, str]:
    return body["metadata"].get("annotations") or {}
