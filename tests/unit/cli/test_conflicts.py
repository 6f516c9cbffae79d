"""A change of a model that others write to meanwhile."""

from __future__ import annotations

import json

import httpx
import msgspec
import pytest

from tidegate.cli.control_client import Conflict, Control, new_spec
from tidegate.control_api.views import ModelView


def control(specs: list[dict[str, int]], versions: list[str]) -> tuple[Control, list[str]]:
    """A control API whose model has, one after the other, these specs and versions; and the versions that it
    was sent."""
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        view = ModelView("m", "", "default", versions[0], dict(specs[0]))
        if request.method == "PUT":
            sent.append(json.loads(request.content)["resource_version"])
            if sent[-1] != versions[-1]:
                del specs[: len(specs) > 1], versions[0]
                return httpx.Response(409, json={"error": {"message": "It has changed."}})
        return httpx.Response(200, content=msgspec.json.encode(view))

    client = httpx.Client(base_url="http://control", transport=httpx.MockTransport(answer))
    return Control(client), sent


def test_a_status_that_was_written_meanwhile_is_no_conflict() -> None:
    api, sent = control([{"a": 1}], ["1", "2", "3"])
    api.carry_out(new_spec(api.model("m"), {"a": 2}))
    assert sent == ["1", "2", "3"]


def test_another_s_change_of_the_spec_is() -> None:
    api, sent = control([{"a": 1}, {"a": 7}], ["1", "2"])
    with pytest.raises(Conflict, match="It has changed"):
        api.carry_out(new_spec(api.model("m"), {"a": 2}))
    assert sent == ["1"]
