"""What the control API promises over both hosts: its real ports in the fake world of the control loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.hosts.rigs import LaptopRig, OperatorRig, Rig, entry, rounds
from tests.contract.hosts.test_hosts import SETTLED, revisions_in_serve, serving
from tests.control_api import Api, control_api
from tidegate.messages.rollouts import Action


@pytest.fixture(params=["laptop", "operator"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    return LaptopRig(tmp_path) if request.param == "laptop" else OperatorRig()


@pytest.fixture
async def api(rig: Rig) -> AsyncIterator[Api]:
    async with control_api(rig.host) as api:
        yield api


async def test_models_are_listed_by_name_with_what_gateways_know(rig: Rig, api: Api) -> None:
    await serving(rig, "two")
    revision = await serving(rig, "one")
    rig.store.waiting[("one", revision)] = 3
    listed = (await api.call("GET", "/v1/models"))["items"]
    assert [model["name"] for model in listed] == ["one", "two"]
    assert listed[0] == await api.call("GET", "/v1/models/one")
    assert (listed[0]["waiting"], listed[0]["entry"]["ready"]) == (3, True)
    assert listed[0]["spec"]["engine"]["name"] == "simulated"
    (pool,) = (await api.call("GET", "/v1/pools"))["items"]
    assert (pool["name"], pool["models"]) == ("default", ["one", "two"])
    (known,) = (await api.call("GET", "/v1/models/one/revisions"))["items"]
    assert (known["revision"], known["weight"]) == (revision, 100)


async def test_a_model_that_is_not_there_is_told_with_those_that_are(rig: Rig, api: Api) -> None:
    await serving(rig, "one")
    for method, path, body in (
        ("GET", "/v1/models/two", None),
        ("PUT", "/v1/models/two", {"spec": {}, "resource_version": "1"}),
        ("POST", "/v1/models/two/rollout", {"verb": "pause"}),
        ("GET", "/v1/models/two/revisions", None),
        ("POST", "/v1/models/two/drain", {}),
    ):
        told = await api.refused(method, path, body, status=404)
        assert told == "No model is called 'two'; there is: one."


async def test_a_spec_is_replaced_at_the_version_that_was_read(rig: Rig, api: Api) -> None:
    old = await serving(rig)
    read = await api.call("GET", "/v1/models/one")
    wanted = read["spec"] | {"contextLength": 64}
    body = {"spec": wanted, "resource_version": read["resource_version"]}
    written = await api.call("PUT", "/v1/models/one", body)
    assert written["spec"]["contextLength"] == 64
    assert written["resource_version"] != read["resource_version"]
    assert (read["is_observed"], written["is_observed"]) == (True, False)
    await rounds(rig, SETTLED)
    assert (await api.call("GET", "/v1/models/one"))["is_observed"]
    assert old not in entry(rig, "one").revisions
    told = await api.refused("PUT", "/v1/models/one", body, status=409)
    assert "has changed since it was read" in told
    (noted,) = api.audit.entries
    assert (noted.who, noted.key, noted.what, noted.model) == ("anna", "key_1", "set", "one")
    assert noted.after == {"contextLength": 64}


async def test_a_status_that_was_written_meanwhile_is_no_conflict(rig: Rig, api: Api) -> None:
    revision = await serving(rig)
    read = await api.call("GET", "/v1/models/one")
    rig.store.waiting["one", revision] = 7
    await rounds(rig, SETTLED)
    assert (await api.call("GET", "/v1/models/one"))["waiting"] == 7
    body = {"spec": read["spec"] | {"contextLength": 64}, "resource_version": read["resource_version"]}
    await api.call("PUT", "/v1/models/one", body)


async def test_a_wrong_spec_changes_nothing_and_names_its_field(rig: Rig, api: Api) -> None:
    await serving(rig)
    read = await api.call("GET", "/v1/models/one")
    body = {"spec": read["spec"] | {"contextSize": 64}, "resource_version": read["resource_version"]}
    for query in ("", "?dryRun=true"):
        told = await api.refused("PUT", f"/v1/models/one{query}", body, status=400)
        assert "contextSize" in told
        assert "no such field" in told
    assert await api.call("GET", "/v1/models/one") == read
    assert api.audit.entries == []


async def test_a_dry_run_says_what_would_happen_and_changes_nothing(rig: Rig, api: Api) -> None:
    old = await serving(rig)
    read = await api.call("GET", "/v1/models/one")
    body = {"spec": read["spec"] | {"contextLength": 64}, "resource_version": read["resource_version"]}
    rig.journal.clear()
    plan = await api.call("PUT", "/v1/models/one?dryRun=true", body)
    assert rig.journal == []
    assert await api.call("GET", "/v1/models/one") == read
    assert api.audit.entries == []
    assert (plan["replicas_now"], plan["replicas_peak"]) == (1, 2)
    (starts,) = (action for action in plan["actions"] if "starts with" in action)
    assert starts.endswith("starts with 1 replicas.")
    assert plan["rollout"]["stable"] == old
    assert starts.startswith(f"Revision {plan['rollout']['target']} ")
    # And that is what happens.
    await api.call("PUT", "/v1/models/one", body)
    rig.faults.slow.add("one")
    await rounds(rig, 3)
    (new,) = revisions_in_serve(rig, "one") - {old}
    assert starts.startswith(f"Revision {new} ")


async def test_a_rollout_that_takes_too_many_accelerators_is_refused_with_the_sum(rig: Rig, api: Api) -> None:
    if isinstance(rig, OperatorRig):
        group = {"name": "gpu", "gpus": 4, "gpuMemory": "24Gi", "cpus": "4"}
        rig.declare("Pool", "default", {"groups": [group]})
    old = await serving(rig, resources={"gpus": 0.67}, rollout={"maxSurgeAccelerators": 0.23})
    read = await api.call("GET", "/v1/models/one")
    smaller = read["spec"] | {"resources": read["spec"]["resources"] | {"gpus": 0.3}}
    body = {"spec": smaller, "resource_version": read["resource_version"]}
    for query in ("", "?dryRun=true"):
        told = await api.refused("PUT", f"/v1/models/one{query}", body, status=400)
        assert "1 x 0.67 + 1 x 0.3 = 0.97 of it; raise maxSurgeAccelerators to 0.3" in told
    assert await api.call("GET", "/v1/models/one") == read
    assert api.audit.entries == []
    body["spec"] = smaller | {"rollout": smaller["rollout"] | {"maxSurgeAccelerators": 0.3}}
    plan = await api.call("PUT", "/v1/models/one?dryRun=true", body)
    assert (plan["gpus_now"], plan["gpus_peak"]) == (0.67, pytest.approx(0.97))
    await api.call("PUT", "/v1/models/one", body)
    rig.faults.slow.add("one")
    await rounds(rig, 3)
    (new,) = revisions_in_serve(rig, "one") - {old}
    assert new == plan["rollout"]["target"]


async def test_scaling_changes_the_bounds_in_place(rig: Rig, api: Api) -> None:
    revision = await serving(rig)
    plan = await api.call("POST", "/v1/models/one/scale?dryRun=true", {"min_replicas": 2, "max_replicas": 3})
    assert (plan["replicas_now"], plan["replicas_peak"]) == (1, 2)
    assert plan["actions"] == [f"Revision {revision} may have 2 to 3 replicas, and had 1 to 1."]
    await api.call("POST", "/v1/models/one/scale", {"min_replicas": 2, "max_replicas": 3})
    await rounds(rig, SETTLED)
    (deployment,) = rig.serve.configs[f"one--{revision}"]["deployments"]
    bounds = deployment["autoscaling_config"]
    assert (bounds["min_replicas"], bounds["max_replicas"]) == (2, 3)
    assert list(entry(rig, "one").revisions) == [revision]
    assert api.audit.entries[-1].after["scaling"]["maxReplicas"] == 3
    told = await api.refused("POST", "/v1/models/one/scale", {"min_replicas": 5}, status=400)
    assert "minReplicas (5) is above maxReplicas (3)" in told
    told = await api.refused("POST", "/v1/models/one/scale", {}, status=400)
    assert "give one of them" in told


async def test_an_action_reaches_the_controller_once(rig: Rig, api: Api) -> None:
    await serving(rig)
    action = await api.call("POST", "/v1/models/one/rollout", {"verb": "recheck"}, status=202)
    assert (action["verb"], action["author"]) == ("recheck", "anna")
    assert (await api.call("GET", "/v1/models/one"))["action"]["verb"] == "recheck"
    await rig.round()
    assert (await api.call("GET", "/v1/models/one"))["action"] is None
    (noted,) = api.audit.entries
    assert (noted.who, noted.what, noted.after["verb"]) == ("anna", "rollout recheck", "recheck")


async def test_an_action_is_not_lost_when_the_host_dies_before_it_is_recorded(rig: Rig, api: Api) -> None:
    await serving(rig)
    await rig.host.act("one", Action("restart", "", "anna", 5.0))
    rig.store.is_away = True
    await rig.round()
    rig.start()
    rig.store.is_away = False
    waiting = (await rig.host.model("one")).action
    assert waiting is not None
    assert (waiting.verb, waiting.author) == ("restart", "anna")


@pytest.mark.parametrize("verb", ["pause", "resume", "promote", "abort", "retry"])
async def test_without_a_rollout_there_is_nothing_to_act_on(rig: Rig, api: Api, verb: str) -> None:
    await serving(rig)
    for query in ("", "?dryRun=true"):
        told = await api.refused("POST", f"/v1/models/one/rollout{query}", {"verb": verb}, status=409)
        assert told.startswith(f"{verb} was refused: ")
    assert api.audit.entries == []
    assert (await api.call("GET", "/v1/models/one"))["action"] is None


async def test_a_rollout_is_seen_held_and_aborted(rig: Rig, api: Api) -> None:
    canary = {"steps": [{"weight": 50, "pause": True, "holdSeconds": 0}, {"weight": 100}], "minRequests": 0}
    old = await serving(rig, rollout=canary)
    read = await api.call("GET", "/v1/models/one")
    body = {"spec": read["spec"] | {"contextLength": 64}, "resource_version": read["resource_version"]}
    await api.call("PUT", "/v1/models/one", body)
    await rounds(rig, SETTLED)
    seen = (await api.call("GET", "/v1/models/one/rollout"))["rollout"]
    assert (seen["phase"], seen["stable"], seen["weight"]) == ("Paused", old, 50)
    assert (await api.call("GET", "/v1/models/one"))["rollout"] == seen
    plan = await api.call("POST", "/v1/models/one/rollout?dryRun=true", {"verb": "abort"})
    assert plan["rollout"]["phase"] == "Aborted"
    assert (await api.call("GET", "/v1/models/one/rollout"))["rollout"] == seen
    await api.call("POST", "/v1/models/one/rollout", {"verb": "abort"}, status=202)
    await rounds(rig, SETTLED)
    ended = (await api.call("GET", "/v1/models/one/rollout"))["rollout"]
    assert ended["phase"] == "Aborted"
    assert "by anna" in ended["message"]
    assert entry(rig, "one").revisions == {old: 100}
    told = [(noted.who, noted.what) for noted in rig.audit.entries]
    assert ("tidegate", ended["reason"]) in told


async def test_a_restart_gives_a_model_fresh_replicas_once(rig: Rig, api: Api) -> None:
    revision = await serving(rig)
    name = f"one--{revision}"
    before = rig.serve.configs[name]["args"]
    await api.call("POST", "/v1/models/one/restart", status=202)
    await rounds(rig, SETTLED)
    restarted = rig.serve.configs[name]["args"]
    assert restarted == {**before, "restarted": restarted["restarted"]}
    await rounds(rig, SETTLED)
    assert rig.serve.configs[name]["args"] == restarted
    assert entry(rig, "one").revisions == {revision: 100}


async def test_undo_names_a_revision_that_there_is(rig: Rig, api: Api) -> None:
    revision = await serving(rig)
    body = {"verb": "undo", "revision": "0000000000"}
    told = await api.refused("POST", "/v1/models/one/rollout", body, status=409)
    assert f"revision '0000000000' is not known; known are {revision}." in told
    body = {"verb": "pause", "revision": revision}
    assert "only undo takes one" in await api.refused("POST", "/v1/models/one/rollout", body, status=400)


async def test_an_undo_is_shown_until_the_spec_is_another(rig: Rig, api: Api) -> None:
    old = await serving(rig)

    async def change(context_length: int) -> None:
        read = await api.call("GET", "/v1/models/one")
        spec = read["spec"] | {"contextLength": context_length}
        body = {"spec": spec, "resource_version": read["resource_version"]}
        await api.call("PUT", "/v1/models/one", body)
        await rounds(rig, SETTLED)

    await change(64)
    assert (await api.call("GET", "/v1/models/one"))["pinned"] == ""
    await api.call("POST", "/v1/models/one/rollout", {"verb": "undo"}, status=202)
    await rounds(rig, SETTLED)
    assert entry(rig, "one").revisions == {old: 100}
    assert (await api.call("GET", "/v1/models/one"))["pinned"] == old
    await change(128)
    assert (await api.call("GET", "/v1/models/one"))["pinned"] == ""


async def test_a_drained_model_refuses_what_is_new_and_ends_what_it_has(rig: Rig, api: Api) -> None:
    revision = await serving(rig)
    rig.store.waiting[("one", revision)] = 2
    assert (await api.call("POST", "/v1/models/one/drain", {}))["drains"]
    await rounds(rig, SETTLED)
    drained = entry(rig, "one")
    assert (drained.accepts, drained.ready, drained.reason) == (False, False, "Drained")
    (deployment,) = rig.serve.configs[f"one--{revision}"]["deployments"]
    bounds = deployment["autoscaling_config"]
    assert (bounds["min_replicas"], bounds["downscale_to_zero_delay_s"]) == (0, 0.0)
    assert rig.store.waiting[("one", revision)] == 2
    rig.start()
    await rounds(rig, 2)
    assert entry(rig, "one").reason == "Drained"
    async with control_api(rig.host) as started_anew:
        after = await started_anew.call("POST", "/v1/models/one/drain", {"drain": False})
    assert not after["drains"]
    await rounds(rig, SETTLED)
    assert entry(rig, "one").accepts
    assert entry(rig, "one").revisions == {revision: 100}
    (noted,) = api.audit.entries
    assert (noted.what, noted.before, noted.after) == ("drain", {"drains": False}, {"drains": True})


async def test_models_are_told_also_while_redis_is_away(rig: Rig, api: Api) -> None:
    await serving(rig)
    rig.store.is_away = True
    model = await api.call("GET", "/v1/models/one")
    assert (model["entry"], model["spec"]["engine"]["name"]) == (None, "simulated")
    assert "Redis is away." in await api.refused("POST", "/v1/models/one/restart?dryRun=true", status=503)
