"""Conditions keep their transition time while their status stays."""

from __future__ import annotations

from tidegate.control.conditions import condition, settle
from tidegate.control.reasons import CONDITION_TYPES, Reason


def test_reading_order_and_transition_times() -> None:
    first = settle(
        [condition("Degraded", "False", "Healthy"), condition("Ready", "False", "Unproven")], [], 0.0
    )
    assert [item.type for item in first] == ["Ready", "Degraded"]
    assert {item.lastTransitionTime for item in first} == {"1970-01-01T00:00:00Z"}
    later = settle(
        [condition("Ready", "True", "Serving"), condition("Degraded", "False", "Healthy", "other words")],
        first,
        60.0,
    )
    assert [item.lastTransitionTime for item in later] == ["1970-01-01T00:01:00Z", "1970-01-01T00:00:00Z"]


def test_a_condition_without_a_message_says_what_its_reason_means() -> None:
    assert condition("Ready", "True", "Serving").message == Reason.Serving.sentence
    assert condition("Ready", "True", "OfAnotherVersion").message == "OfAnotherVersion"
    assert len(CONDITION_TYPES) == 6
