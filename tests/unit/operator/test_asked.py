"""Actions in annotations: what is understood, what is told, what is taken off."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from tidegate.messages.rollouts import Action, Verb
from tidegate_operator.asked import AUTHOR, ROLLOUT, action_of, annotations_for, drains, removal, wrong_action


def body(**annotations: str) -> dict[str, Any]:
    return {
        "metadata": {"name": "one", "annotations": {f"tidegate.dev/{k}": v for k, v in annotations.items()}}
    }


@pytest.mark.parametrize("verb", get_args(Verb))
def test_every_verb_is_understood_and_what_the_api_writes_is_read_back(verb: Verb) -> None:
    assert action_of(body(rollout=verb)) == Action(verb)
    action = Action(verb, "0123456789" if verb == "undo" else "", "anna")
    written = {"metadata": {"annotations": annotations_for(action)}}
    assert action_of(written) == action
    assert wrong_action(written) is None


@pytest.mark.parametrize("value", ["", "Pause", "pause=0123456789", "undo=", "stop", "x" * 1000])
def test_a_wrong_value_is_told_with_those_that_there_are(value: str) -> None:
    asked = body(rollout=value)
    assert action_of(asked) is None
    told = wrong_action(asked)
    assert told is not None
    assert told.reason == "InvalidAction"
    assert all(verb in told.message for verb in (*get_args(Verb), "undo=REVISION", ROLLOUT))
    assert len(told.message) < 400


def test_nothing_asked_is_nothing_wrong() -> None:
    for asked in ({"metadata": {"name": "one"}}, {"metadata": {"annotations": None}}, body(other="x")):
        assert (action_of(asked), wrong_action(asked), drains(asked)) == (None, None, False)


def test_the_action_is_taken_off_only_as_it_was_read() -> None:
    asked = {"metadata": {"annotations": {ROLLOUT: "pause", AUTHOR: "anna", "other": "x"}}}
    path = "/metadata/annotations/tidegate.dev~1rollout"
    assert list(removal(asked)) == [
        {"op": "test", "path": path, "value": "pause"},
        {"op": "test", "path": f"{path}-author", "value": "anna"},
        {"op": "remove", "path": path},
        {"op": "remove", "path": f"{path}-author"},
    ]


def test_a_model_drains_by_the_word_true() -> None:
    assert drains({"metadata": {"annotations": {"tidegate.dev/drain": "true"}}})
    assert not drains({"metadata": {"annotations": {"tidegate.dev/drain": "false"}}})
