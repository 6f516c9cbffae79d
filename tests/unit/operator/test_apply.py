"""What the operator does when the API server refuses or drops a write."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.control_api import MemoryAudit
from tests.unit.operator.bodies import NOW, cluster_body, model_body
from tidegate_operator.apply import WRITES_AT_ONCE, Applier
from tidegate_operator.cache import Cache
from tidegate_operator.cluster import ApiConflict, ApiEnding, ApiGone, ApiUnavailable, Object
from tidegate_operator.decision import FINALIZER, Decision, ObjectWrite
from tidegate_operator.kinds import Kind


class Behind:
    """A cluster in which another has just written the object: every write conflicts. `newest` is what stands
    there now; None: it was deleted."""

    def __init__(self, newest: Object | None) -> None:
        self._newest = newest

    async def read(self, kind: Kind, body: Mapping[str, Any]) -> Object:
        if self._newest is None:
            raise ApiGone(f"{kind} {body['metadata']['name']}")
        return self._newest

    async def apply(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        raise ApiConflict(kind)

    async def apply_status(self, kind: Kind, body: Mapping[str, Any], status: Mapping[str, Any]) -> Object:
        raise ApiConflict(f"{kind} {body['metadata']['name']} {status}")

    async def set_finalizers(self, kind: Kind, body: Mapping[str, Any], finalizers: Sequence[str]) -> Object:
        raise ApiConflict(f"{kind} {body['metadata']['name']} {finalizers}")

    async def patch(
        self, kind: Kind, body: Mapping[str, Any], operations: Sequence[Mapping[str, Any]]
    ) -> Object:
        raise ApiConflict(f"{kind} {body['metadata']['name']} {operations}")

    async def create(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        raise ApiConflict(f"{kind} {manifest}")

    async def delete(self, kind: Kind, body: Mapping[str, Any]) -> None:
        raise ApiConflict(f"{kind} {body['metadata']['name']}")


class Holding(Behind):
    """A cluster that takes finalizers and statuses. `versions` are those that writes named."""

    def __init__(self) -> None:
        super().__init__(None)
        self.versions: list[str] = []

    async def set_finalizers(self, kind: Kind, body: Mapping[str, Any], finalizers: Sequence[str]) -> Object:
        return self._next(body)

    async def apply_status(self, kind: Kind, body: Mapping[str, Any], status: Mapping[str, Any]) -> Object:
        return self._next(body)

    def _next(self, body: Mapping[str, Any]) -> Object:
        version = body["metadata"]["resourceVersion"]
        self.versions.append(version)
        return {**body, "metadata": {**body["metadata"], "resourceVersion": str(int(version) + 1)}}


class Taking(Behind):
    """A cluster that takes statuses, but fails those of the Models in `failing`."""

    def __init__(self, failing: Mapping[str, Exception]) -> None:
        super().__init__(None)
        self._failing = failing
        self.written: list[str] = []
        self.asked: list[str] = []

    async def apply_status(self, kind: Kind, body: Mapping[str, Any], status: Mapping[str, Any]) -> Object:
        name = body["metadata"]["name"]
        self.asked.append(name)
        await asyncio.sleep(0)  # others come in between
        if name in self._failing:
            raise self._failing[name]
        self.written.append(name)
        return {**body, "status": dict(status)}


def applier(cluster: Behind, cache: Cache | None = None) -> Applier:
    """One that has no registry and no Serve: nothing may be asked of them here."""
    return Applier(cluster, cache or Cache(), None, None, "operator-0", "system", MemoryAudit())  # type: ignore[arg-type]


async def apply(cluster: Behind, cache: Cache, **decision: Any) -> None:
    await applier(cluster, cache).apply(Decision(**decision), {})


async def write_all(cluster: Taking, names: Sequence[str]) -> None:
    writes = [ObjectWrite("Model", model_body(name), {"observedGeneration": 1}) for name in names]
    await apply(cluster, Cache(), objects=tuple(writes))


async def test_a_models_conflict_does_not_hold_up_the_others_status() -> None:
    names = [f"m{number}" for number in range(3 * WRITES_AT_ONCE)]
    cluster = Taking({"m1": ApiConflict("m1")})
    with pytest.raises(ApiConflict, match="m1"):
        await write_all(cluster, names)
    assert sorted(cluster.written) == sorted(set(names) - {"m1"})


async def test_an_api_server_that_is_away_is_not_asked_for_every_model() -> None:
    names = [f"m{number}" for number in range(3 * WRITES_AT_ONCE)]
    cluster = Taking({"m0": ApiConflict("m0"), **{name: ApiUnavailable("away") for name in names[1:]}})
    with pytest.raises(ApiUnavailable, match="away"):
        await write_all(cluster, names)
    assert len(cluster.asked) <= 2 * WRITES_AT_ONCE < len(names)


async def test_a_write_that_fails_once_does_not_hold_up_the_others_either() -> None:
    names = [f"m{number}" for number in range(3 * WRITES_AT_ONCE)]
    cluster = Taking({"m0": ApiUnavailable("too many requests")})
    with pytest.raises(ApiUnavailable, match="too many"):
        await write_all(cluster, names)
    assert sorted(cluster.written) == sorted(names[1:])


@pytest.mark.parametrize(
    "decision",
    [
        {"objects": (ObjectWrite("Model", model_body(), {"observedGeneration": 1}),)},
        {"objects": (ObjectWrite("Model", model_body(), finalizers=[FINALIZER]),)},
        {"released": (ObjectWrite("Model", model_body(), finalizers=[]),)},
    ],
)
async def test_after_a_conflict_the_next_decision_sees_what_stands_now(decision: dict[str, Any]) -> None:
    """Also where the watch is late: without it the same write would conflict until a listing."""
    cache = Cache()
    cache.put("Model", model_body())
    newest = model_body(finalizers=[FINALIZER], resourceVersion="2", generation=2)
    with pytest.raises(ApiConflict):
        await apply(Behind(newest), cache, **decision)
    assert cache.get("Model", "models", "one") == newest


async def test_a_conflict_about_a_ray_cluster_is_read_again_too() -> None:
    cache, newest = Cache(), cluster_body("g1", resourceVersion="2")
    with pytest.raises(ApiConflict):
        await apply(Behind(newest), cache, patches=((cluster_body("g1"), [{"op": "remove", "path": "/x"}]),))
    assert cache.get("RayCluster", "models", "default-g1") == newest


async def test_what_is_gone_by_then_is_left_to_the_watch() -> None:
    cache, old = Cache(), model_body()
    cache.put("Model", old)
    with pytest.raises(ApiConflict):
        await apply(Behind(None), cache, objects=(ObjectWrite("Model", old, {"observedGeneration": 1}),))
    assert cache.get("Model", "models", "one") == old


async def test_nothing_follows_a_status_that_was_not_written() -> None:
    """Its records are what a later step relies on."""
    objects = (ObjectWrite("Model", model_body(), {"observedGeneration": 1}),)
    with pytest.raises(ApiConflict):
        await apply(Behind(None), Cache(), objects=objects, new_clusters=(cluster_body("g1"),))


async def test_a_status_lands_on_the_version_that_its_finalizer_made() -> None:
    cluster = Holding()
    await apply(cluster, Cache(), objects=(ObjectWrite("Model", model_body(), {"waiting": 1}, [FINALIZER]),))
    assert cluster.versions == ["1", "2"]


async def test_the_age_of_a_status_counts_from_its_write() -> None:
    clock = [100.0]
    one = Applier(Taking({}), Cache(), None, None, "o", "system", MemoryAudit(), lambda: clock[0])  # type: ignore[arg-type]
    await one.apply(Decision(objects=(ObjectWrite("Model", model_body(), {"waiting": 1}),)), {})
    clock[0] += 3
    assert one.since_write() == {"uid-models-one": 3.0}
    one.forget(frozenset())
    assert one.since_write() == {}


class Ending(Taking):
    """A cluster one of whose namespaces is being deleted. `events` are those that were taken."""

    def __init__(self, namespace: str) -> None:
        super().__init__({})
        self.namespace = namespace
        self.events: list[Object] = []

    async def create(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        if manifest["metadata"]["namespace"] == self.namespace:
            raise ApiEnding(f"unable to create new content in namespace {self.namespace}")
        self.events.append(dict(manifest))
        return dict(manifest)


async def test_a_namespace_that_ends_is_told_once_where_it_can_be() -> None:
    body = model_body("one")
    namespace = body["metadata"]["namespace"]
    cluster = Ending(namespace)
    one = Applier(cluster, Cache(), None, None, "operator-0", "system", MemoryAudit(), now=lambda: NOW)  # type: ignore[arg-type]
    ready = {"type": "Ready", "reason": "Serving", "message": "", "lastTransitionTime": ""}
    for status in ("True", "False", "True"):
        write = ObjectWrite("Model", body, {"conditions": [{**ready, "status": status}]})
        await one.apply(Decision(objects=(write,)), {})
    assert one.ends(namespace, [body])
    (event,) = cluster.events
    assert (event["metadata"]["namespace"], event["reason"], event["type"]) == (
        "system",
        "NamespaceEnding",
        "Warning",
    )
    assert event["regarding"]["name"] == "operator-0"
    assert namespace in event["note"]
    newer = model_body("two")
    newer["metadata"]["creationTimestamp"] = "2999-01-01T00:00:00Z"
    assert one.ends(namespace, [])
    assert not one.ends(namespace, [body, newer]), "it is another of that name"
    assert not one.ends("another", [])
