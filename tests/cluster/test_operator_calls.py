"""The operator's Kubernetes calls and its Lease, against a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from tests.cluster.cluster import Cluster as ApiServer
from tests.contract.hosts.api_server_contract import ApiServerContract, Calls
from tidegate_operator import leader
from tidegate_operator.cache import author_of, slim
from tidegate_operator.cluster import (
    FIELD_MANAGER,
    ApiError,
    ApiExpired,
    ApiGone,
    ApiUnavailable,
    Cluster,
    configuration,
)
from tidegate_operator.kinds import RESOURCES, Kind, Resource


@pytest.fixture
def writes() -> list[tuple[str, str]]:
    """What was written, as it is counted."""
    return []


@pytest.fixture
async def api(api_server: ApiServer, writes: list[tuple[str, str]]) -> AsyncIterator[Cluster]:
    settings = await configuration(str(api_server.facts.kubeconfig))
    async with Cluster(settings, lambda kind, verb: writes.append((kind, verb))) as api:
        yield api
        for body in (await api.list("Model", "default"))[0]:
            await api.set_finalizers("Model", body, [])
            await api.delete("Model", body)


@pytest.fixture
def calls(api: Cluster, writes: list[tuple[str, str]]) -> Calls:
    return Calls(api, writes)


class TestContract(ApiServerContract):
    """The real API server is one that the operator can rely on."""


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


async def test_the_author_of_a_spec_is_who_wrote_it_last(api: Cluster, calls: Calls) -> None:
    body = await calls.model("one")
    assert author_of(slim(body)) == FIELD_MANAGER
    body = await api.apply_status("Model", body, {"waiting": 1})
    scaled = [{"op": "add", "path": "/spec/scaling", "value": {"minReplicas": 0}}]
    body = await api.patch("Model", body, scaled, "key:ann")
    body = await api.apply_status("Model", body, {"waiting": 2})
    assert author_of(slim(body)) == "ann"


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


async def test_a_watch_brings_what_happens_after_a_version(api: Cluster, calls: Calls) -> None:
    await calls.model("before")
    _, version = await api.list("Model", "default")
    made = await calls.model("one", labels={"watched": "yes"})
    await calls.model("other")
    await api.delete("Model", made)
    seen = []
    async with aclosing(api.watch("Model", "default", "watched=yes", version)) as events:
        async for change, body in events:
            seen.append((change, body["metadata"]["name"]))
            if change == "DELETED":
                break
    assert seen == [("ADDED", "one"), ("DELETED", "one")]
    assert int(body["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])


async def test_a_watch_from_a_version_that_is_gone_says_so(api: Cluster) -> None:
    with pytest.raises(ApiExpired):
        async with aclosing(api.watch("Model", "default", "", 1)) as events:
            await anext(events)


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


async def test_one_leads_and_the_next_starts_at_once_when_it_ends(api: Cluster, quick_lease: None) -> None:
    log: list[str] = []
    begun, stop = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        log.append("first")
        begun.set()
        await stop.wait()

    async def second() -> None:
        log.append("second")

    client = api.client
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
    api: Cluster, quick_lease: None
) -> None:
    """As by a signal."""
    working, stopped = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        working.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    leading = asyncio.create_task(leader.lead(api.client, "cancelled", "default", "one", work))
    await asyncio.wait_for(working.wait(), 10)
    leading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leading
    assert stopped.is_set()
    meta = {"namespace": "default", "name": "cancelled"}
    lease = await api.read("Lease", {"metadata": meta})
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


async def test_what_the_work_raises_ends_the_leader(api: Cluster, quick_lease: None) -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await leader.lead(api.client, "raises", "default", "one", work)
