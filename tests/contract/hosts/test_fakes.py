"""The fake world is held to the real one: the registry on a real Redis, Serve's client over HTTP. The real
API server is in tests/cluster, and Ray's own Serve in tests/integration/serving."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from tests.cluster.simulated_serve import simulated_serve
from tests.contract.hosts.api_server_contract import ApiServerContract, Calls
from tests.contract.hosts.fake_api_server import FakeApiServer
from tests.contract.hosts.fake_serve import Board, FakeServe, Faults
from tests.contract.hosts.fake_store import FakeStore
from tests.unit.control.builders import NOW, REPLICAS, model
from tidegate.control.serve_config import Application, application_configs
from tidegate.control_round import Depths, Registry, Serve
from tidegate.messages.registry import ModelEntry, Parked, ReplicaStats, RevisionReport
from tidegate.replica_args import DEFAULT_TIMES
from tidegate.serve_api import ServeApi, ServeRejected, ServeUnavailable
from tidegate.serve_writer import ServeWriter
from tidegate.store.connection import Connection
from tidegate.store.depths import QueueDepths
from tidegate.store.registry import Registry as RedisRegistry

# The API server --------------------------------------------------------------------------------------------


class TestFakeApiServer(ApiServerContract):
    @pytest.fixture
    def calls(self) -> Calls:
        api = FakeApiServer(lambda: NOW)
        return Calls(api, api.counted)


# The registry and the queues -------------------------------------------------------------------------------


@dataclass
class Store:
    registry: Registry
    depths: Depths
    replicas: Replicas


class Replicas(Board, Protocol):
    async def park(self, parked: Parked) -> None: ...

    async def gone(self, stats: ReplicaStats) -> None: ...


@pytest.fixture(params=["fake", "redis"])
async def store(
    request: pytest.FixtureRequest, connection: Connection, key_prefix: str
) -> AsyncIterator[Store]:
    if request.param == "fake":
        fake = FakeStore(time.time)
        yield Store(fake, fake, fake)
        return
    real = RedisRegistry(connection, key_prefix=key_prefix, times=DEFAULT_TIMES)
    yield Store(real, QueueDepths(connection, key_prefix=key_prefix), real)


def an_entry(name: str, *revisions: str) -> ModelEntry:
    return ModelEntry(
        name, 1, "chat", "simulated", "", "none", dict.fromkeys(revisions, 50), True, True, "", ""
    )


def a_report(model: str, revision: str) -> RevisionReport:
    return RevisionReport(model, revision, at=1.0, proved=True)


async def test_entries_are_read_as_they_were_put(store: Store) -> None:
    one, two = an_entry("one", "a"), an_entry("two", "b")
    await store.registry.put_model(one)
    await store.registry.put_model(two)
    assert await store.registry.read_models() == {"one": one, "two": two}
    assert await store.registry.read_models({"two", "three"}) == {"two": two}
    changed = an_entry("two", "c")
    await store.registry.put_model(changed)
    assert await store.registry.read_models() == {"one": one, "two": changed}


async def test_reports_are_those_that_are_wanted(store: Store) -> None:
    for name in ("one", "two"):
        await store.replicas.report(a_report(name, "a"))
    found = await store.registry.reports([("one", "a"), ("one", "b")])
    assert found == {("one", "a"): a_report("one", "a")}
    assert await store.registry.reports([]) == {}


async def test_what_is_parked_goes_with_its_revision(store: Store) -> None:
    assert await store.registry.parked([("one", "a")]) == {}
    held = [Parked("one", name, "node", 1, 5) for name in ("a", "b")]
    for each in held:
        await store.replicas.park(each)
    assert await store.registry.parked([("one", "a"), ("two", "a")]) == {("one", "a"): held[0]}
    assert await store.registry.parked([]) == {}
    await store.registry.drop_revision("one", "a", "It has drained.")
    assert await store.registry.parked([("one", "a"), ("one", "b")]) == {("one", "b"): held[1]}


async def test_a_dropped_revision_leaves_no_report(store: Store) -> None:
    for revision in ("a", "b"):
        await store.replicas.report(a_report("one", revision))
    await store.registry.drop_revision("one", "a", "It has drained.")
    await store.registry.drop_revision("one", "a", "It has drained.")
    assert set(await store.registry.reports([("one", "a"), ("one", "b")])) == {("one", "b")}


async def test_a_deleted_model_leaves_nothing(store: Store) -> None:
    await store.registry.put_model(an_entry("one", "a"))
    await store.replicas.report(a_report("one", "a"))
    await store.replicas.report(a_report("one", "b"))
    await store.replicas.report(a_report("other", "a"))
    await store.registry.delete_model("one")
    await store.registry.delete_model("one")
    assert await store.registry.read_models() == {}
    wanted = [("one", "a"), ("one", "b"), ("other", "a")]
    assert set(await store.registry.reports(wanted)) == {("other", "a")}


async def test_replicas_are_those_that_beat(store: Store) -> None:
    first = ReplicaStats("r1", "one", "a", 1, "n", 1.0, 1.0, 4, 0, 0, 0.0)
    second = ReplicaStats("r2", "one", "a", 1, "n", 1.0, 1.0, 4, 0, 0, 0.0)
    await store.replicas.beat(second)
    await store.replicas.beat(first)
    assert await store.registry.replicas() == [first, second]
    await store.replicas.gone(second)
    assert await store.registry.replicas() == [first]


async def test_a_queue_that_nobody_used_is_empty_and_known(store: Store) -> None:
    found = await store.depths.poll([("one", "a")], timeout_seconds=2.0)
    depth = found[("one", "a")]
    assert (depth.waiting, depth.running) == (0, 0)
    assert await store.depths.poll([], timeout_seconds=2.0) == {}


async def test_queues_that_nobody_used_have_no_outcomes_and_nothing_to_move(store: Store) -> None:
    queues = [("one", "a"), ("one", "b")]
    assert await store.registry.outcomes.read(queues) == {queue: {} for queue in queues}
    assert await store.registry.outcomes.read([]) == {}
    assert await store.registry.move_revision("one", "a", "b", False) == 0
    await store.registry.outcomes.forget(queues, "65f0")


# Serve -----------------------------------------------------------------------------------------------------


@dataclass
class Standing:
    serve: Serve
    faults: Faults


@pytest.fixture(params=["fake", "http"])
async def standing(
    request: pytest.FixtureRequest, redis_url: str, key_prefix: str
) -> AsyncIterator[Standing]:
    if request.param == "fake":
        faults = Faults()
        yield Standing(FakeServe(FakeStore(time.time), faults, time.time), faults)
        return
    async with (
        simulated_serve(redis_url, key_prefix) as serve,
        ServeApi(serve.url.format(cluster="ray")) as api,
    ):
        yield Standing(api, serve)


def configs(*names: str) -> dict[str, Mapping[str, Any]]:
    wanted = [Application(name, "a", model(name).spec, "", keep_awake=False) for name in names]
    return application_configs(wanted, REPLICAS)


async def test_serve_holds_what_it_was_given_and_says_so(standing: Standing) -> None:
    writer = ServeWriter()
    assert await writer.write(standing.serve, configs("one", "two"), await standing.serve.get())
    state = await standing.serve.get()
    assert {name: item.status for name, item in state.applications.items()} == {
        "one--a": "RUNNING",
        "two--a": "RUNNING",
    }
    assert state.applications["one--a"].ready_replicas == 1
    assert not await writer.write(standing.serve, configs("one", "two"), state)
    assert await writer.write(standing.serve, configs("two"), state)
    assert set((await standing.serve.get()).applications) == {"two--a"}


async def test_serve_refuses_a_config_whole(standing: Standing) -> None:
    standing.faults.refused.add("bad")
    body = {"applications": [*configs("one", "bad").values()]}
    with pytest.raises(ServeRejected, match="not one that can be imported"):
        await standing.serve.put(body)
    assert (await standing.serve.get()).applications == {}


async def test_a_serve_that_is_away_answers_nothing(standing: Standing) -> None:
    if isinstance(standing.serve, FakeServe):
        standing.serve.is_away = True
    else:
        standing.faults.away_by_default = True  # type: ignore[attr-defined]
    with pytest.raises(ServeUnavailable):
        await standing.serve.get()
    with pytest.raises(ServeUnavailable):
        await standing.serve.put({"applications": []})
