"""The operator's Kubernetes calls and its Lease, against a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from tests.cluster.cluster import Cluster as ApiServer
from tidegate_operator import leader
from tidegate_operator.cluster import (
    ApiConflict,
    ApiError,
    ApiExpired,
    ApiGone,
    ApiUnavailable,
    Cluster,
    Object,
    configuration,
)
from tidegate_operator.kinds import RESOURCES, Kind, Resource

SPEC = {"engine": {"name": "simulated"}}


class Calls:
    """A connection and the writes that it counted."""

    def __init__(self, cluster: Cluster, writes: list[tuple[str, str]]) -> None:
        self.cluster = cluster
        self.writes = writes

    async def model(self, name: str, **metadata: Any) -> Object:
        return await self.cluster.apply(
            "Model",
            {
                "apiVersion": "tidegate.dev/v1alpha1",
                "kind": "Model",
                "metadata": {"name": name, "namespace": "default", **metadata},
                "spec": SPEC,
            },
        )


@pytest.fixture
async def calls(api_server: ApiServer) -> AsyncIterator[Calls]:
    writes: list[tuple[str, str]] = []
    settings = await configuration(str(api_server.facts.kubeconfig))
    async with Cluster(settings, lambda kind, verb: writes.append((kind, verb))) as cluster:
        yield Calls(cluster, writes)
        for body in (await cluster.list("Model", "default"))[0]:
            await cluster.set_finalizers("Model", body, [])
            await cluster.delete("Model", body)


async def test_the_same_apply_twice_is_one_version(calls: Calls) -> None:
    first = await calls.model("one")
    second = await calls.model("one")
    assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]
    assert calls.writes == [("Model", "apply"), ("Model", "apply")]


async def test_a_listing_says_what_its_items_are_and_comes_in_pages(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate_operator.cluster.PAGE", 2)
    for number in range(5):
        await calls.model(f"m{number}", labels={"odd": str(number % 2)})
    found, version = await calls.cluster.list("Model", "default")
    assert [body["metadata"]["name"] for body in found] == [f"m{number}" for number in range(5)]
    assert {(body["apiVersion"], body["kind"]) for body in found} == {("tidegate.dev/v1alpha1", "Model")}
    assert version >= max(int(body["metadata"]["resourceVersion"]) for body in found)
    odd, _ = await calls.cluster.list("Model", "default", "odd=1")
    assert len(odd) == 2


async def test_a_status_is_replaced_whole_and_leaves_the_spec_alone(calls: Calls) -> None:
    body = await calls.model("one")
    await calls.cluster.apply_status("Model", body, {"waiting": 3, "accelerator": "a10"})
    with pytest.raises(ApiConflict):
        await calls.cluster.apply_status("Model", body, {"waiting": 4})
    ((newest,), _) = await calls.cluster.list("Model", "default")
    after = await calls.cluster.apply_status("Model", newest, {"waiting": 4})
    assert after["status"] == {"waiting": 4}
    assert after["metadata"]["generation"] == body["metadata"]["generation"]
    again = await calls.cluster.apply_status("Model", after, {"waiting": 4})
    assert again["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"]


async def test_the_status_of_a_deleted_object_does_not_land_on_its_successor(calls: Calls) -> None:
    body = await calls.model("one")
    await calls.cluster.delete("Model", body)
    with pytest.raises(ApiError):
        await calls.cluster.apply_status("Model", body, {"waiting": 3})
    await calls.model("one")
    with pytest.raises(ApiConflict):
        await calls.cluster.apply_status("Model", body, {"waiting": 3})


async def test_finalizers_are_set_on_the_version_that_was_seen(calls: Calls) -> None:
    body = await calls.model("one")
    held = await calls.cluster.set_finalizers("Model", body, ["tidegate.dev/drain"])
    with pytest.raises(ApiConflict):
        await calls.cluster.set_finalizers("Model", body, [])
    await calls.cluster.delete("Model", held)
    ((waiting,), _) = await calls.cluster.list("Model", "default")
    assert "deletionTimestamp" in waiting["metadata"]
    gone = await calls.cluster.set_finalizers("Model", waiting, [])
    assert not gone["metadata"].get("finalizers")
    assert (await calls.cluster.list("Model", "default"))[0] == []
    with pytest.raises(ApiGone):
        await calls.cluster.set_finalizers("Model", waiting, [])


async def test_a_json_patch_whose_test_fails_is_a_conflict(calls: Calls) -> None:
    body = await calls.model("one")
    replace = {"op": "add", "path": "/spec/contextLength", "value": 64}
    wrong = {"op": "test", "path": "/spec/device", "value": "cuda"}
    with pytest.raises(ApiConflict):
        await calls.cluster.patch("Model", body, [wrong, replace])
    patched = await calls.cluster.patch("Model", body, [replace])
    assert patched["spec"]["contextLength"] == 64
    assert calls.writes.count(("Model", "patch")) == 1


async def test_deleting_what_is_gone_or_another_is_fine(calls: Calls) -> None:
    body = await calls.model("one")
    await calls.cluster.delete("Model", body)
    await calls.cluster.delete("Model", body)
    successor = await calls.model("one")
    await calls.cluster.delete("Model", body)
    ((standing,), _) = await calls.cluster.list("Model", "default")
    assert standing["metadata"]["uid"] == successor["metadata"]["uid"]


async def test_what_the_server_refuses_is_told_in_its_words_and_not_counted(calls: Calls) -> None:
    with pytest.raises(ApiError, match="Unsupported value"):
        await calls.cluster.apply(
            "Model",
            {
                "apiVersion": "tidegate.dev/v1alpha1",
                "kind": "Model",
                "metadata": {"name": "bad", "namespace": "default"},
                "spec": {"engine": {"name": "simulated"}, "device": "tpu"},
            },
        )
    assert calls.writes == []


async def test_a_watch_brings_what_happens_after_a_version(calls: Calls) -> None:
    await calls.model("before")
    _, version = await calls.cluster.list("Model", "default")
    made = await calls.model("one", labels={"watched": "yes"})
    await calls.model("other")
    await calls.cluster.delete("Model", made)
    seen = []
    async with aclosing(calls.cluster.watch("Model", "default", "watched=yes", version)) as events:
        async for change, body in events:
            seen.append((change, body["metadata"]["name"]))
            if change == "DELETED":
                break
    assert seen == [("ADDED", "one"), ("DELETED", "one")]
    assert int(body["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])


async def test_a_watch_from_a_version_that_is_gone_says_so(calls: Calls) -> None:
    with pytest.raises(ApiExpired):
        async with aclosing(calls.cluster.watch("Model", "default", "", 1)) as events:
            await anext(events)


async def test_an_event_is_taken(calls: Calls) -> None:
    body = await calls.model("one")
    event = await calls.cluster.create(
        "Event",
        {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": "one-", "namespace": "default"},
            "eventTime": "2026-01-01T00:00:00.000000Z",
            "reportingController": "tidegate.dev/operator",
            "reportingInstance": "test",
            "action": "ReadyFalse",
            "reason": "KubeRayMissing",
            "note": "It is missing.",
            "type": "Warning",
            "regarding": {
                "apiVersion": body["apiVersion"],
                "kind": "Model",
                "name": "one",
                "namespace": "default",
            },
        },
    )
    assert event["metadata"]["name"].startswith("one-")


async def test_an_unknown_kind_is_gone_and_a_dead_server_is_unavailable(
    api_server: ApiServer, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        resources: dict[Kind, Resource] = {**RESOURCES, "RayCluster": Resource("ray.io/v9", "rayclusters")}
        patch.setattr("tidegate_operator.cluster.RESOURCES", resources)
        with pytest.raises(ApiGone):
            await calls.cluster.list("RayCluster", "default")
    settings = await configuration(str(api_server.facts.kubeconfig))
    settings.host = "https://127.0.0.1:9"
    async with Cluster(settings, lambda *_: None) as dead:
        with pytest.raises(ApiUnavailable):
            await dead.list("Model", "default")


# The Lease -----------------------------------------------------------------------------------------------


@pytest.fixture
def quick_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "LEASE_SECONDS", 4)
    monkeypatch.setattr(leader, "RENEW_SECONDS", 3)
    monkeypatch.setattr(leader, "RETRY_SECONDS", 1)


async def test_one_leads_and_the_next_starts_at_once_when_it_ends(calls: Calls, quick_lease: None) -> None:
    log: list[str] = []
    begun, stop = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        log.append("first")
        begun.set()
        await stop.wait()

    async def second() -> None:
        log.append("second")

    client = calls.cluster.client
    one = asyncio.create_task(leader.lead(client, "handover", "default", "one", first))
    await asyncio.wait_for(begun.wait(), 10)
    two = asyncio.create_task(leader.lead(client, "handover", "default", "two", second))
    await asyncio.sleep(leader.LEASE_SECONDS + 1)
    assert log == ["first"]  # it renews
    stop.set()
    assert await one
    began = asyncio.get_running_loop().time()
    assert await two
    assert asyncio.get_running_loop().time() - began < leader.LEASE_SECONDS
    assert log == ["first", "second"]


async def test_a_leader_that_is_cancelled_stops_and_gives_its_lease_back(
    calls: Calls, quick_lease: None
) -> None:
    """As by a signal."""
    working, stopped = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        working.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    client = calls.cluster.client
    leading = asyncio.create_task(leader.lead(client, "cancelled", "default", "one", work))
    await asyncio.wait_for(working.wait(), 10)
    leading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leading
    assert stopped.is_set()
    meta = {"namespace": "default", "name": "cancelled"}
    lease = await calls.cluster.read("Lease", {"metadata": meta})
    assert not lease["spec"].get("holderIdentity")


async def test_a_leader_that_cannot_renew_is_stopped(api_server: ApiServer, quick_lease: None) -> None:
    stopped = asyncio.Event()
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    settings = await configuration(str(api_server.facts.kubeconfig))
    async with Cluster(settings, lambda *_: None) as own:
        leading = asyncio.create_task(leader.lead(own.client, "lost", "default", "one", work))
        await asyncio.wait_for(started.wait(), 10)
        own.client.configuration.host = "https://127.0.0.1:9"  # the API server is away from now on
        assert await asyncio.wait_for(leading, 15) is False
        await asyncio.wait_for(stopped.wait(), 1)


async def test_what_the_work_raises_ends_the_leader(calls: Calls, quick_lease: None) -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await leader.lead(calls.cluster.client, "raises", "default", "one", work)
