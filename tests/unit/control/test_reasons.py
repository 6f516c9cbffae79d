"""The list of reasons."""

from __future__ import annotations

import pytest

from tidegate.control.reasons import CONDITION_TYPES, Reason


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_knows_its_sentence_and_its_condition(reason: Reason) -> None:
    assert reason.name == reason.value == str(reason)
    assert reason.kind in CONDITION_TYPES
    assert reason.sentence.endswith(".")
    assert Reason.of(reason.value) is reason


def test_what_passes_by_itself() -> None:
    assert Reason.Loading.passes_by_itself
    assert not Reason.Serving.passes_by_itself
    assert not Reason.OutOfMemory.passes_by_itself


def test_a_word_of_another_version_is_no_reason() -> None:
    assert Reason.of("OfAnotherVersion") is None
