"""Before the operator goes: drained and deleted, or kept and let go; in any case it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tidegate_operator.cluster import ApiConflict, ApiError, ApiGone, ApiUnavailable, Object
from tidegate_operator.kinds import Kind
from tidegate_operator.uninstall import NotUninstalling, Options, Uninstall, UninstallFailed, parse

DRAIN = "tidegate.dev/drain"
CLEAN_UP = "ray.io/gcs-ft-redis-cleanup-finalizer"


def thing(
    name: str, *finalizers: str, namespace: str = "models", labels: dict[str, str] | None = None
) -> Object:
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "finalizers": list(finalizers),
            "labels": labels or {},
        }
    }


class FakeCluster:
    """The API server's rules for deletion, and an operator that drains while it runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.things: dict[Kind, list[Object]] = {}
        self.log: list[str] = []
        self.is_operator_alive = True
        self.failures: list[Exception] = []
        self.missing: set[Kind] = set()

    async def list(self, kind: Kind, namespace: str, selector: str = "") -> tuple[list[Object], int]:
        if self.failures:
            raise self.failures.pop(0)
        if kind in self.missing:
            raise ApiGone(f"no {kind}")
        found = [
            body
            for body in self.things.get(kind, [])
            if body["metadata"]["namespace"] == namespace
            and (not selector or selector.partition("=")[0] in body["metadata"]["labels"])
        ]
        return found, 1

    async def read(self, kind: Kind, body: Mapping[str, Any]) -> Object:
        if self.failures:
            raise self.failures.pop(0)
        wanted = body["metadata"]
        for found in self.things.get(kind, []):
            meta = found["metadata"]
            if (meta["name"], meta["namespace"]) == (wanted["name"], wanted["namespace"]):
                return found
        raise ApiGone(f"no {kind} {wanted['name']}")

    async def delete(self, kind: Kind, body: Mapping[str, Any]) -> None:
        self.log.append(f"delete {kind} {body['metadata']['name']}")
        if kind == "Lease":
            assert not self.is_operator_alive, "it would make another"
            return
        if body["metadata"]["finalizers"]:
            body["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            self.things[kind].remove(dict(body))

    async def set_finalizers(self, kind: Kind, body: Mapping[str, Any], finalizers: Sequence[str]) -> Object:
        self.log.append(f"finalizers {kind} {body['metadata']['name']} {list(finalizers)}")
        body["metadata"]["finalizers"] = list(finalizers)
        if not finalizers and "deletionTimestamp" in body["metadata"]:
            self.things[kind].remove(dict(body))
        return dict(body)

    async def patch(
        self, kind: Kind, body: Mapping[str, Any], operations: Sequence[Mapping[str, Any]]
    ) -> Object:
        self.log.append(f"patch {kind} {body['metadata']['name']}")
        assert operations == [{"op": "replace", "path": "/spec/replicas", "value": 0}]
        body["spec"]["replicas"] = 0
        self.things["Pod"] = []
        self.is_operator_alive = False
        return dict(body)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.is_operator_alive:
            for body in list(self.things.get("Model", [])):
                if "deletionTimestamp" in body["metadata"]:
                    self.things["Model"].remove(body)


def uninstall(
    cluster: FakeCluster, *, keep: bool = False, namespaces: tuple[str, ...] = ("models",)
) -> Uninstall:
    options = Options(namespaces, "system", "app=operator", "op", keep, 60.0)
    return Uninstall(cluster, options, clock=lambda: cluster.now, sleep=cluster.sleep)


def a_cluster() -> FakeCluster:
    cluster = FakeCluster()
    cluster.things = {
        "Model": [thing("m1", DRAIN), thing("m2", DRAIN, namespace="other")],
        "Pool": [thing("p")],
        "RayCluster": [thing("p-1", labels={"tidegate.dev/pool": "p"}), thing("somebody-elses")],
        "Job": [thing("m1-r1", labels={"tidegate.dev/model": "m1"})],
        "Deployment": [
            thing("op", namespace="system", labels={"app": "operator"}) | {"spec": {"replicas": 2}}
        ],
        "Pod": [thing("op-1", namespace="system", labels={"app": "operator"})],
    }
    return cluster


async def test_models_drain_before_pools_and_ray_clusters_go() -> None:
    cluster = a_cluster()
    await uninstall(cluster, namespaces=("models", "other")).run()
    assert cluster.log == [
        "delete Model m1",
        "delete Model m2",
        "delete Pool p",
        "delete RayCluster p-1",
        "patch Deployment op",
        "delete Lease op",
    ]
    assert cluster.things["Model"] == cluster.things["Pool"] == []
    assert [body["metadata"]["name"] for body in cluster.things["RayCluster"]] == ["somebody-elses"]


async def test_other_namespaces_are_left_alone() -> None:
    cluster = a_cluster()
    await uninstall(cluster).run()
    assert [body["metadata"]["name"] for body in cluster.things["Model"]] == ["m2"]


async def test_without_an_operator_the_finalizer_goes_when_time_is_up() -> None:
    cluster = a_cluster()
    cluster.is_operator_alive = False
    await uninstall(cluster).run()
    assert "finalizers Model m1 []" in cluster.log
    assert 40 <= cluster.now < 60, "the rest of the time is for the Ray clusters"


async def test_a_ray_cluster_whose_redis_is_gone_is_let_go() -> None:
    cluster = a_cluster()
    cluster.things["RayCluster"] = [thing("p-1", CLEAN_UP, labels={"tidegate.dev/pool": "p"})]
    await uninstall(cluster).run()
    assert "finalizers RayCluster p-1 []" in cluster.log
    assert cluster.things["RayCluster"] == []


async def test_a_strangers_finalizer_is_named_and_not_taken() -> None:
    cluster = a_cluster()
    cluster.is_operator_alive = False
    cluster.things["Model"][0]["metadata"]["finalizers"].append("example.com/backup")
    with pytest.raises(UninstallFailed, match=r"models/m1 cannot be deleted; held by example.com/backup"):
        await uninstall(cluster).run()


async def test_kept_models_lose_their_finalizer_after_the_operator_has_stopped() -> None:
    cluster = a_cluster()
    cluster.things["Model"].append(thing("m3", "example.com/backup", DRAIN))
    await uninstall(cluster, keep=True).run()
    assert cluster.log == [
        "patch Deployment op",
        "finalizers Model m1 []",
        "finalizers Model m3 ['example.com/backup']",
        "delete Job m1-r1",
        "delete RayCluster p-1",
        "delete Lease op",
    ]
    assert [body["metadata"]["name"] for body in cluster.things["Model"]] == ["m1", "m2", "m3"]
    assert len(cluster.things["Pool"]) == 1


async def test_conflicts_and_outages_are_tried_again() -> None:
    cluster = a_cluster()
    cluster.failures = [ApiUnavailable("away"), ApiConflict("changed"), ApiUnavailable("away")]
    await uninstall(cluster).run()
    assert cluster.things["Pool"] == []


async def test_an_api_server_that_stays_away_is_the_error() -> None:
    cluster = a_cluster()
    cluster.failures = [ApiUnavailable("away")] * 1000
    with pytest.raises(ApiUnavailable):
        await uninstall(cluster).run()


async def test_a_refusal_ends_it_at_once() -> None:
    cluster = a_cluster()
    cluster.failures = [ApiError("forbidden")]
    with pytest.raises(ApiError, match="forbidden"):
        await uninstall(cluster).run()
    assert cluster.now == 0


async def test_a_cluster_without_kuberay_has_no_ray_clusters() -> None:
    cluster = a_cluster()
    cluster.missing = {"RayCluster"}
    await uninstall(cluster).run()
    assert cluster.things["Pool"] == []


def test_the_command_line() -> None:
    where = ["--operator-namespace=s", "--operator-selector=x=y", "--operator-lease=op"]
    options = parse(["--namespaces=a,b", *where, "--keep-models"])
    assert options == Options(("a", "b"), "s", "x=y", "op", keep_models=True, timeout_seconds=240.0)


class TestOnlyHelmUninstalls:
    """The Job of `helm template | kubectl apply` is like any other; only Helm's record tells them apart."""

    @staticmethod
    def record(revision: int, status: str, *, name: str = "tidegate", owner: str = "helm") -> Object:
        labels = {"owner": owner, "name": name, "status": status, "version": str(revision)}
        return thing(f"sh.helm.release.v1.tidegate.v{revision}", namespace="system", labels=labels)

    @staticmethod
    def hook(cluster: FakeCluster, revision: int = 1) -> Uninstall:
        options = parse(
            [
                "--namespaces=models",
                "--operator-namespace=system",
                "--operator-selector=app=operator",
                "--operator-lease=op",
                "--keep-models",
                "--helm-release=tidegate",
                f"--helm-revision={revision}",
            ]
        )
        return Uninstall(cluster, options, clock=lambda: cluster.now, sleep=cluster.sleep)

    @pytest.mark.parametrize("kind", ["Secret", "ConfigMap"])
    async def test_it_acts_while_helm_uninstalls(self, kind: Kind) -> None:
        cluster = a_cluster()
        cluster.things[kind] = [self.record(1, "superseded"), self.record(2, "uninstalling")]
        await self.hook(cluster, 2).run()
        assert "patch Deployment op" in cluster.log

    async def test_a_rollback_brings_back_an_older_hook(self) -> None:
        cluster = a_cluster()
        cluster.things["Secret"] = [self.record(7, "superseded"), self.record(9, "uninstalling")]
        await self.hook(cluster, 2).run()
        assert "delete Lease op" in cluster.log

    @pytest.mark.parametrize(
        "records",
        [
            [],
            [("deployed", {})],
            [("superseded", {}), ("deployed", {})],
            [("pending-upgrade", {})],
            [("uninstalled", {})],
            [("uninstalling", {"name": "another"})],
            [("uninstalling", {"owner": "somebody"})],
        ],
    )
    async def test_it_touches_nothing_otherwise(self, records: list[tuple[str, dict[str, str]]]) -> None:
        cluster = a_cluster()
        cluster.things["Secret"] = [
            self.record(number, status, **others) for number, (status, others) in enumerate(records, 1)
        ]
        with pytest.raises(NotUninstalling, match=r"nothing was stopped or deleted.*uninstall\.onlyWithHelm"):
            await self.hook(cluster).run()
        assert cluster.log == []
        assert cluster.is_operator_alive

    async def test_an_api_server_that_is_away_for_a_moment_is_asked_again(self) -> None:
        cluster = a_cluster()
        cluster.failures = [ApiUnavailable("away")]
        cluster.things["Secret"] = [self.record(1, "uninstalling")]
        await self.hook(cluster).run()
        assert "patch Deployment op" in cluster.log

    async def test_who_may_not_look_touches_nothing(self) -> None:
        cluster = a_cluster()
        cluster.failures = [ApiError("forbidden")]
        with pytest.raises(ApiError, match="forbidden"):
            await self.hook(cluster).run()
        assert cluster.log == []
