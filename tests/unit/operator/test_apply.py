"""What the operator does when the API server refuses or drops a write."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tidegate_operator.subjects import Subject

from tests.unit.control.builders import World, model
from tests.unit.operator.bodies import NOW, cluster_body, model_body
from tidegate_operator.apply import FINALIZER, WRITES_AT_ONCE, Applier
from tidegate_operator.cache import Cache
from tidegate_operator.cluster import ApiConflict, ApiGone, ApiUnavailable, Kind, Object
from tidegate_operator.pod_template import RayDefaults


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


class NoRegistry:
    async def put_model(self, entry: Any) -> None:
        raise AssertionError(entry)

    async def delete_model(self, name: str) -> None:
        raise AssertionError(name)

    async def drop_revision(self, model: str, revision: str, message: str) -> None:
        raise AssertionError((model, revision, message))


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


DEFAULTS = RayDefaults(image="ray", ray_version="2.60.0")


def applier(cache: Cache, newest: Object | None) -> Applier:
    return Applier(Behind(newest), cache, NoRegistry(), DEFAULTS, "operator-0")


async def write_all(cluster: Taking, names: Sequence[str]) -> None:
    models = [model(name) for name in names]
    world = World(*models)
    bodies = [model_body(name) for name in names]
    subjects = [Subject(body, each, None) for body, each in zip(bodies, models, strict=True)]
    one = Applier(cluster, Cache(), NoRegistry(), DEFAULTS, "operator-0")
    await one.statuses(world.plan(), subjects, world.seen, "default", NOW)


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


@pytest.mark.parametrize("write", ["status", "finalizer"])
async def test_after_a_conflict_the_next_look_sees_what_stands_now(write: str) -> None:
    """Also where the watch is late: without it the same look would conflict until a listing."""
    cache = Cache()
    old = model_body(finalizers=[FINALIZER])
    cache.put("Model", old)
    newest = model_body(finalizers=[FINALIZER], resourceVersion="2", generation=2)
    with pytest.raises(ApiConflict):
        if write == "status":
            await applier(cache, newest).status("Model", old, {"observedGeneration": 1})
        else:
            await applier(cache, newest).release(old)
    assert cache.get("Model", "models", "one") == newest


async def test_a_conflict_about_a_ray_cluster_is_read_again_too() -> None:
    cache, newest = Cache(), cluster_body("g1", resourceVersion="2")
    with pytest.raises(ApiConflict):
        await applier(cache, newest).in_place(cluster_body("g1"), [{"op": "remove", "path": "/spec/x"}])
    assert cache.get("RayCluster", "models", "default-g1") == newest


async def test_what_is_gone_by_then_is_left_to_the_watch() -> None:
    cache, old = Cache(), model_body()
    cache.put("Model", old)
    with pytest.raises(ApiConflict):
        await applier(cache, None).status("Model", old, {"observedGeneration": 1})
    assert cache.get("Model", "models", "one") == old
