"""platform/docs/reference/failures.md says the same in its table, its manifests and its texts. Whether a
cluster says it too is for tests/cluster/test_failures.py."""

from __future__ import annotations

import re

import pytest

from tests.cluster.failure_page import Failure, Told, common_resources, failures, table
from tidegate.control.reasons import CONDITION_TYPES, Reason
from tidegate.control.resources import Model, Pool

KINDS = {"Model": Model, "Pool": Pool}


def test_the_table_is_what_the_chapters_show() -> None:
    shown = {
        failure.title: (
            {f"{told.type}={told.status}" for told in failure.told},
            {told.reason for told in failure.told},
        )
        for failure in failures()
    }
    rows = table()
    assert list(rows) == list(shown)
    for (types, reason), (shown_types, reasons) in zip(rows.values(), shown.values(), strict=True):
        assert types <= shown_types
        assert reasons == {reason}


@pytest.mark.parametrize("failure", failures(), ids=str)
def test_a_chapter_is_whole(failure: Failure) -> None:
    assert failure.told
    for told in failure.told:
        assert told.type in CONDITION_TYPES
        assert told.reason in {*Reason}
        assert re.search(r"\w", told.message)
    names = {
        (each["kind"].lower(), each["metadata"]["name"]) for each in (*common_resources(), *failure.resources)
    }
    assert {(told.kind, told.name) for told in failure.told} <= names


@pytest.mark.parametrize(
    "resource",
    [each for part in (common_resources(), *(failure.resources for failure in failures())) for each in part],
    ids=lambda each: f"{each['kind']}-{each['metadata']['name']}",
)
def test_its_resources_are_valid(resource: dict[str, object]) -> None:
    if kind := KINDS.get(str(resource["kind"])):
        kind.model_validate(resource)


def test_an_ellipsis_stands_for_anything_and_nothing_else_does() -> None:
    told = Told("pool", "a", "Ready", "False", "CrashLoop", "Pod a-…-b. Wait … GiB.")
    assert told.matches("Pod a-1-b. Wait 2 GiB.")
    assert not told.matches("Pod a-1-b! Wait 2 GiB.")
    assert not told.matches("Pod a-1-b. Wait 2 GiB. And more.")
