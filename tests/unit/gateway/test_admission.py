"""Admission: pure decisions over snapshots."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import InvalidRequest, ModelNotFound, ModelUnavailable, QueueFull
from tidegate.gateway import admission
from tidegate.messages.queue import Depth, QueueLimits, Rejected
from tidegate.messages.registry import ModelEntry


def an_entry(**changes: Any) -> ModelEntry:
    values: dict[str, Any] = {
        "name": "m",
        "created": 1,
        "task": "chat",
        "engine": "simulated",
        "precision": "bf16",
        "quantization": "none",
        "revisions": {"r1": 1},
        "accepts": True,
        "ready": True,
        "reason": "",
        "message": "",
        "replicas_ready": 1,
    }
    return ModelEntry(**(values | changes))


def test_an_unknown_model_names_those_that_exist() -> None:
    with pytest.raises(ModelNotFound, match="Models that exist: a, b"):
        admission.find_model("x", {"b": an_entry(name="b"), "a": an_entry(name="a")})
    with pytest.raises(ModelNotFound, match="names no model"):
        admission.find_model("", {"b": an_entry(name="b"), "a": an_entry(name="a")})
    with pytest.raises(ModelNotFound, match="No model is registered yet"):
        admission.find_model("x", {})
    with pytest.raises(ModelNotFound, match="and 80 more"):
        admission.find_model("x", {f"m{i}": an_entry() for i in range(100)})


@pytest.mark.parametrize("changes", [{"accepts": False}, {"revisions": {}}])
def test_a_model_that_cannot_come_says_its_own_sentence(changes: dict[str, Any]) -> None:
    entry = an_entry(reason="WeightsMissing", message="No file model.safetensors.", **changes)
    with pytest.raises(ModelUnavailable, match=r"WeightsMissing.*No file model\.safetensors"):
        admission.find_model("m", {"m": entry})


@given(
    weights=st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 100), min_size=1, max_size=5),
    key=st.text(max_size=20),
)
def test_a_revision_without_weight_is_chosen_only_where_none_has_any(
    weights: dict[str, int], key: str
) -> None:
    chosen = admission.choose_revision(weights, key)
    assert weights[chosen] > 0 or not any(weights.values())
    assert admission.choose_revision(weights, key) == chosen


def test_revisions_are_chosen_by_weight() -> None:
    keys = [f"chatcmpl-{number}" for number in range(10_000)]
    chosen = [admission.choose_revision({"old": 90, "none": 0, "new": 10}, key) for key in keys]
    assert 900 < chosen.count("new") < 1100
    assert chosen.count("old") + chosen.count("new") == len(keys)


def test_a_growing_share_takes_keys_and_gives_none_back() -> None:
    keys = [f"chatcmpl-{number}" for number in range(1000)]
    tables = [{"old": 100 - share, "new": share} for share in (0, 15, 50, 100)]
    moved = [{key for key in keys if admission.choose_revision(table, key) == "new"} for table in tables]
    assert moved[0] < moved[1] < moved[2] < moved[3] == set(keys)


def test_a_session_stays_on_the_new_revision_as_its_weight_grows_and_its_like_of_other_tenants_may_not() -> (
    None
):
    sessions = [admission.session_of(tenant, f"user {n}") for tenant in ("a", "b") for n in range(500)]
    assert len(set(sessions)) == len(sessions)
    tables = [{"new": share, "old": 100 - share} for share in (0, 5, 15, 50, 100)]
    moved = [{key for key in sessions if admission.choose_revision(table, key) == "new"} for table in tables]
    assert set() == moved[0] < moved[1] < moved[2] < moved[3] < moved[4] == set(sessions)
    assert admission.session_of("a", "") == ""


def test_a_share_of_calls_is_shadowed_but_not_what_goes_to_that_revision_anyway() -> None:
    entry = an_entry(shadow="new", shadow_share=25)
    calls = [f"chatcmpl-{n}" for n in range(2000)]
    shadowed = [call for call in calls if admission.is_shadowed(entry, call, "old")]
    assert 400 < len(shadowed) < 600
    assert not any(admission.is_shadowed(entry, call, "new") for call in calls)
    assert not any(admission.is_shadowed(an_entry(shadow_share=100), call, "old") for call in calls)
    # Which revision a call gets says nothing about whether it is shadowed.
    chosen = {admission.choose_revision({"a": 25, "b": 75}, call) for call in shadowed}
    assert chosen == {"a", "b"}


@pytest.mark.parametrize("header", ["soon", "0", "-1", "nan", "inf", "0.5", ""])
def test_a_wait_header_that_is_no_wait_is_refused(header: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        admission.wait_budget_seconds(an_entry(), header)
    assert refused.value.param == "x-tidegate-max-wait-seconds"


def test_the_header_lowers_the_models_bound_and_never_raises_it() -> None:
    entry = an_entry(limits=QueueLimits(max_wait_seconds=30))
    assert admission.wait_budget_seconds(entry, None) == 30
    assert admission.wait_budget_seconds(entry, "2.5") == 2.5
    assert admission.wait_budget_seconds(entry, "1000") == 30


@given(
    ahead=st.integers(0, 10_000),
    drain=st.floats(0, 10),
    wake=st.floats(0, 300),
    ready=st.integers(0, 2),
    budget=st.floats(1, 1000),
)
def test_a_call_is_refused_exactly_where_its_predicted_wait_passes_the_budget(
    ahead: int, drain: float, wake: float, ready: int, budget: float
) -> None:
    entry = an_entry(wake_seconds=wake, replicas_ready=ready)
    depth = Depth(ahead, 1, drain)
    expected = ahead * drain + (wake if ready == 0 else 0)
    try:
        admission.check_wait(ahead, depth, entry, budget)
    except QueueFull as error:
        assert expected > budget
        assert error.retry_after_seconds == pytest.approx(expected - budget)
    except ModelUnavailable as error:
        assert expected > budget and ready == 0 and wake > budget
        assert error.retry_after_seconds == wake
    else:
        assert expected <= budget


@pytest.mark.parametrize(
    ("bound", "said"), [("model", "model 'm'"), ("tenant", "tenant's share"), ("total", "The queue is full")]
)
def test_a_full_queue_says_which_bound(bound: Any, said: str) -> None:
    error = admission.queue_full(Rejected(bound, "requests", 10, Depth(8, 2, 0.5)), an_entry(), 1)
    assert said in error.message and "at most 10 requests" in error.message
    assert error.retry_after_seconds == 1.0  # a quarter of the 8 that wait, at 0.5 s each


def test_retry_after_covers_the_call_itself_and_has_a_default() -> None:
    rejected = Rejected("model", "bytes", 10, Depth(0, 2, 2.0))
    assert admission.queue_full(rejected, an_entry(), 6).retry_after_seconds == 12
    unknown = Rejected("model", "bytes", 10, Depth(50, 2, 0.0))
    assert admission.queue_full(unknown, an_entry(), 1).retry_after_seconds == 5


def test_a_call_without_a_name_means_the_only_model() -> None:
    only = an_entry()
    for name in ("", "tgi", "dummy"):
        assert admission.find_listed(name, {only.name: only}) is only
        for models in ({}, {"a": only, "b": only}):
            with pytest.raises(ModelNotFound):
                admission.find_listed(name, models)
    named = an_entry(name="tgi")
    assert admission.find_listed("tgi", {"a": only, "tgi": named}) is named
