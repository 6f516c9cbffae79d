"""Revisions: equal where no new replica is needed, different where one is."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.control.builders import model
from tidegate.control.desired import RevisionRecord, recorded_spec, revision_of, spec_on_wire


@pytest.mark.parametrize(
    "spec",
    [
        {"scaling": {"minReplicas": 0, "maxReplicas": 9}},
        {"queue": {"maxRequests": 5}},
        {"precision": "auto"},
    ],
)
def test_what_acts_in_place_keeps_the_revision(spec: dict[str, Any]) -> None:
    assert revision_of(model(**spec).spec) == revision_of(model().spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"precision": "float32"},
        {"contextLength": 512},
        {"resources": {"cpus": 1}},
        {"engine": {"name": "simulated", "maxSlots": 3}},
        {"source": {"uri": "/elsewhere"}},
    ],
)
def test_what_needs_a_new_replica_makes_a_revision(spec: dict[str, Any]) -> None:
    assert revision_of(model(**spec).spec) != revision_of(model().spec)


def test_an_old_revision_runs_its_own_spec_with_todays_scaling() -> None:
    old = RevisionRecord("r", spec_on_wire(model(precision="float32").spec))
    today = model(scaling={"minReplicas": 2, "maxReplicas": 4}).spec
    spec = recorded_spec(old, today)
    assert (spec.precision, spec.scaling.max_replicas) == ("float32", 4)
    assert recorded_spec(old, None).scaling.max_replicas == 1
