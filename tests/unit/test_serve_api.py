"""What is read from Serve's answers, and when a config counts as applied."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.unit.control.builders import REPLICAS, model
from tidegate.control.serve_config import Application, application_config
from tidegate.serve_api import PATH, ServeApi, ServeRejected, ServeUnavailable, is_applied, parse_state

APPLICATION = {
    "status": "RUNNING",
    "message": "",
    "deployed_app_config": {"name": "m--r"},
    "deployments": {
        "Replica": {
            "message": "all is well",
            "target_num_replicas": 2,
            "replicas": [
                {"replica_id": "a", "state": "RUNNING", "pid": 7, "node_id": "n"},
                {"replica_id": "b", "state": "STARTING"},
            ],
        }
    },
}


def test_reading_an_application() -> None:
    state = parse_state({"controller_info": {"actor_id": "c"}, "applications": {"m--r": APPLICATION}})
    application = state.applications["m--r"]
    assert (state.controller, application.is_built, application.wanted_replicas) == ("c", True, 2)
    assert (application.ready_replicas, application.replicas[0].pid) == (1, 7)
    assert application.deployment_message == "all is well"


def test_no_serve_is_an_empty_state() -> None:
    state = parse_state({"controller_info": {}, "applications": {}})
    assert (state.controller, dict(state.applications)) == ("", {})


def config() -> dict[str, Any]:
    return application_config(Application("m", "r", model().spec, "", keep_awake=True), REPLICAS)


def test_serves_own_defaults_and_number_types_do_not_count() -> None:
    reported = config()
    reported["deployments"][0]["max_ongoing_requests"] = 5
    reported["deployments"][0]["ray_actor_options"]["num_gpus"] = 0.0
    del reported["route_prefix"]
    assert is_applied(config(), reported)


def test_a_changed_or_missing_field_counts() -> None:
    reported = config()
    reported["deployments"][0]["autoscaling_config"]["max_replicas"] = 9
    assert not is_applied(config(), reported)
    assert not is_applied(config(), None)
    assert not is_applied(config(), {**config(), "deployments": []})


async def ask(respond: Any) -> None:
    async with ServeApi("http://serve") as api:
        api._client._transport = httpx.MockTransport(respond)
        await api.put({"applications": []})


async def test_a_refusal_carries_serves_text() -> None:
    with pytest.raises(ServeRejected, match="max_replicas must be"):
        await ask(lambda request: httpx.Response(400, text="max_replicas must be above 0"))


async def test_other_errors_may_pass() -> None:
    with pytest.raises(ServeUnavailable, match="503"):
        await ask(lambda request: httpx.Response(503, text="no controller"))


async def test_nobody_there() -> None:
    async with ServeApi("http://127.0.0.1:9") as api:
        with pytest.raises(ServeUnavailable, match="does not answer"):
            await api.get()


async def test_an_answer_that_is_not_serves() -> None:
    async with ServeApi("http://serve") as api:
        api._client._transport = httpx.MockTransport(
            lambda request: httpx.Response(200, text="hello" if request.url.path == PATH else "")
        )
        with pytest.raises(ServeUnavailable, match="cannot be read"):
            await api.get()
