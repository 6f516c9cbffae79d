"""The whole operator: a process beside a real API server and a real Redis, with a simulated Serve.

No controller and no kubelet runs here: what they would do (pods, the end of a Job) the tests do.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.cluster import Cluster as ApiServer
from tests.cluster.operator_process import OperatorProcess, World, running
from tests.cluster.simulated_serve import simulated_serve
from tests.redis_server import RedisServer
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry
from tidegate_operator.cluster import ApiGone, Cluster, Object, configuration
from tidegate_operator.pod_template import GENERATION_LABEL

PREFIX = "tidegate"
OTHER = "other"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer(durable=True)
    server.start()
    yield server
    server.close()


@pytest.fixture
async def registry(redis: RedisServer) -> AsyncIterator[Registry]:
    async with Connection(redis.url) as connection:
        yield Registry(connection, key_prefix=PREFIX)


def kuberay_definition(api_server: ApiServer) -> str:
    return str(api_server.facts.programs / "kuberay-config" / "crd" / "bases" / "ray.io_rayclusters.yaml")


@pytest.fixture(scope="module")
def kuberay(api_server: ApiServer) -> None:
    """KubeRay's definition, without its operator."""
    api_server.kubectl("apply", "--server-side", "-f", kuberay_definition(api_server))
    api_server.wait_for("RayClusters", lambda: api_server.kubectl("get", "--raw", "/apis/ray.io/v1"))
    if not api_server.get("namespace", OTHER):
        api_server.kubectl("create", "namespace", OTHER)
    # As a controller makes for every namespace: without it no pod is taken.
    if not api_server.get("serviceaccount", "default"):
        api_server.kubectl("create", "serviceaccount", "default")


@pytest.fixture
async def world(
    api_server: ApiServer, redis: RedisServer, kuberay: None, tmp_path: Path
) -> AsyncIterator[World]:
    """A running operator; what a failed test leaves of its log is shown."""
    log = tmp_path / "operator.log"
    settings = await configuration(str(api_server.facts.kubeconfig))
    async with simulated_serve(redis.url, PREFIX) as serve, Cluster(settings, lambda *_: None) as api:
        await clean(api)
        operator = OperatorProcess(
            {
                "KUBECONFIG": str(api_server.facts.kubeconfig),
                "REDIS_URL": redis.url,
                "TIDEGATE_KEY_PREFIX": PREFIX,
                "TIDEGATE_NAMESPACES": f"default,{OTHER}",
                "TIDEGATE_POD_NAMESPACE": "default",
                "TIDEGATE_RAY_IMAGE": "localhost/tidegate/ray:1",
                "TIDEGATE_RAY_VERSION": "2.60.0",
                "TIDEGATE_SERVE_URL_TEMPLATE": serve.url,
                "TIDEGATE_LOG_FORMAT": "console",
            },
            log,
        )
        try:
            async with running(operator):
                made = World(api, serve, operator)
                # How long it takes to start, on a machine that also runs the whole cluster, is no test's.
                await made.wait_for("the operator leads", operator.leads)
                yield made
        finally:
            print(log.read_text())
        await clean(api)


async def clean(api: Cluster) -> None:
    for namespace in ("default", OTHER):
        for kind in ("Model", "Pool", "RayCluster", "Job", "Pod"):
            with contextlib.suppress(ApiGone):
                for body in (await api.list(kind, namespace))[0]:
                    if body["metadata"].get("finalizers"):
                        body = await api.set_finalizers(kind, body, [])
                    await api.delete(kind, body)


async def clusters(world: World) -> list[Object]:
    found, _ = await world.api.list("RayCluster", "default")
    return sorted(found, key=lambda body: str(body["metadata"]["creationTimestamp"]))


async def only_cluster(world: World) -> str:
    (body,) = await world.wait_for("a RayCluster", lambda: clusters(world))
    return str(body["metadata"]["name"])


async def test_a_pool_and_its_models_come_up_and_then_nothing_is_written(
    world: World, registry: Registry
) -> None:
    pool = await world.pool()
    await world.model("one")
    await world.model("two", scaling={"minReplicas": 0})
    await world.wait_for_condition("one", "Ready", "True", "Serving")
    await world.wait_for_condition("two", "Ready", "True", "Asleep")
    await world.wait_for_condition("default", "Ready", "True", "ClusterReady", kind="Pool")

    (ray,) = await clusters(world)
    assert ray["metadata"]["ownerReferences"][0]["uid"] == pool["metadata"]["uid"]
    body = await world.get("Model", "one")
    assert body is not None
    assert body["metadata"]["finalizers"] == ["tidegate.dev/drain"]
    status = body["status"]
    assert (status["pool"], status["accelerator"], status["replicaSummary"]) == ("default", "cpu", "1/1")
    assert status["observedGeneration"] == 1
    assert (await registry.read_models())["one"].revisions == {status["revision"]: 100}
    events, _ = await world.api.list("Event", "default", field_selector="regarding.name=one")
    assert {"Serving"} <= {event["reason"] for event in events}

    first = await world.settled()
    assert first[("RayCluster", "apply")] == 1
    await world.operator.stop()
    await world.operator.start()
    await world.wait_for("the new process leads", world.operator.leads)
    assert await world.settled() == {}
    puts = world.serve.puts[ray["metadata"]["name"]]
    assert sorted(puts[-1]) == world.serve.standing(ray["metadata"]["name"])


async def test_a_change_is_taken_in_and_writes_of_that_model_only(world: World) -> None:
    await world.pool()
    for name in ("one", "two", "three"):
        await world.model(name)
    for name in ("one", "two", "three"):
        await world.wait_for_condition(name, "Ready", "True", "Serving")
    await world.settled()
    others = [await world.get("Model", name) for name in ("one", "three")]
    changed = await world.model("two", contextLength=64)
    generation = changed["metadata"]["generation"]

    async def is_taken_in() -> bool:
        body = await world.get("Model", "two")
        return bool(body and body["status"]["observedGeneration"] == generation)

    began = time.monotonic()
    await world.wait_for("the change is in the status", is_taken_in, timeout=10)
    assert time.monotonic() - began < 5
    await world.wait_for_condition("two", "Progressing", "False", "Settled")
    await world.settled()
    assert [await world.get("Model", name) for name in ("one", "three")] == others
    body = await world.get("Model", "two")
    assert body is not None
    assert [item["revision"] for item in body["status"]["revisions"]] == [body["status"]["revision"]]


async def test_a_refused_application_is_told_to_its_model_and_hurts_no_other(world: World) -> None:
    world.serve.refused.add("bad")
    await world.pool()
    await world.model("bad")
    await world.model("good")
    await world.wait_for_condition("good", "Ready", "True", "Serving")
    found = await world.wait_for_condition("bad", "Ready", "False", "RevisionFailed")
    assert "import_path: not one that can be imported" in found["message"]
    assert "import_path" in (await world.condition("bad", "Degraded"))["message"]


async def test_an_invalid_model_says_why_while_what_ran_goes_on(world: World) -> None:
    await world.pool()
    await world.model("one")
    await world.wait_for_condition("one", "Ready", "True", "Serving")
    before = world.serve.standing(await only_cluster(world))
    # The definition of the API server cannot say that a list is no argument.
    await world.model("one", engine={"name": "simulated", "args": {"speed": []}})
    await world.model("never", engine={"name": "simulated", "args": {"speed": []}})
    found = await world.wait_for_condition("one", "ConfigValid", "False", "InvalidConfig", timeout=10)
    assert "spec.engine.args.speed" in found["message"]
    assert "use text, a number, true or false" in found["message"]
    assert (await world.condition("one", "Ready"))["status"] == "True"
    await world.wait_for_condition("never", "Ready", "False", "InvalidConfig")
    assert world.serve.standing(await only_cluster(world)) == before
    await world.settled()
    await world.model("one")
    await world.wait_for_condition("one", "ConfigValid", "True", timeout=10)


async def test_of_two_models_of_one_name_the_older_has_it_until_it_goes(
    world: World, registry: Registry
) -> None:
    await world.pool()
    await world.pool(namespace=OTHER)
    first = await world.model("same")
    await asyncio.sleep(1.1)  # creation times have whole seconds
    await world.model("same", OTHER, contextLength=64)
    await world.wait_for_condition("same", "Ready", "True", "Serving")
    found = await world.wait_for_condition("same", "ConfigValid", "False", "NameTaken", namespace=OTHER)
    assert "'default'" in found["message"]
    await world.api.delete("Model", first)
    await world.wait_for_condition("same", "Ready", "True", "Serving", namespace=OTHER)
    assert (await registry.read_models())["same"].context_length == 64


async def test_a_deleted_model_is_refused_drained_and_gone(world: World, registry: Registry) -> None:
    await world.pool()
    body = await world.model("one")
    await world.model("two")
    await world.wait_for_condition("one", "Ready", "True", "Serving")
    await world.wait_for_condition("two", "Ready", "True", "Serving")
    await world.api.delete("Model", body)
    await world.wait_for_condition("one", "Ready", "False", "Deleting", timeout=5)

    async def is_refused() -> bool:
        entry = (await registry.read_models()).get("one")
        return entry is None or not entry.accepts

    await world.wait_for("new requests are refused", is_refused)  # told to the gateways beside the status

    async def is_gone() -> bool:
        return await world.get("Model", "one") is None

    await world.wait_for("the Model is gone", is_gone)
    assert set(await registry.read_models()) == {"two"}
    (left,) = world.serve.standing(await only_cluster(world))
    assert left.startswith("two--")


async def test_a_changed_pool_moves_its_models_to_a_second_cluster(world: World) -> None:
    await world.pool()
    await world.model("one")
    await world.model("asleep", scaling={"minReplicas": 0})
    await world.wait_for_condition("one", "Ready", "True", "Serving")
    await world.wait_for_condition("asleep", "Ready", "True", "Asleep")
    old = await only_cluster(world)
    puts = len(world.serve.puts[old])
    await world.pool(image="localhost/tidegate/ray:2")

    async def has_moved() -> str | None:
        found = [body["metadata"]["name"] for body in await clusters(world)]
        return found[0] if len(found) == 1 and found[0] != old else None

    new = await world.wait_for("only the new cluster stands", has_moved)
    assert len(world.serve.standing(new)) == 2
    assert world.serve.standing(old) == []  # drained before it went
    assert len(world.serve.puts[old]) > puts
    assert (await world.condition("one", "Ready"))["status"] == "True"
    await world.settled()
    pool = await world.get("Pool", "default")
    assert pool is not None
    assert pool["status"]["rayCluster"] == new


async def test_the_old_cluster_stays_while_the_new_one_does_not_answer(world: World) -> None:
    await world.pool()
    await world.model("one")
    await world.wait_for_condition("one", "Ready", "True", "Serving")
    old = await only_cluster(world)
    (body,) = await clusters(world)
    world.serve.away_by_default = True
    await world.pool(image="localhost/tidegate/ray:2")

    async def two() -> bool:
        return len(await clusters(world)) == 2

    await world.wait_for("the second cluster is made", two)
    await asyncio.sleep(3)
    assert await two()
    assert len(world.serve.standing(old)) == 1
    await world.model("late")  # changes go on meanwhile, on the cluster that serves
    await world.wait_for_condition("late", "Ready", "True", "Serving")
    assert len(world.serve.standing(old)) == 2
    await world.pool()  # the change is taken back
    only = await world.wait_for("the new one goes", lambda: _one(world))
    assert only["metadata"]["uid"] == body["metadata"]["uid"]


async def _one(world: World) -> Object | None:
    found = await clusters(world)
    return found[0] if len(found) == 1 else None


async def test_bounds_of_workers_change_in_place(world: World) -> None:
    await world.pool(groups=[{"name": "cpu", "maxWorkers": 2}])
    before = await only_cluster(world)
    (body,) = await clusters(world)
    # As Ray's autoscaler does.
    scale = {"op": "add", "path": "/spec/workerGroupSpecs/0/replicas", "value": 2}
    await world.api.patch("RayCluster", body, [scale])
    await world.pool(groups=[{"name": "cpu", "maxWorkers": 5}])

    async def group() -> Any:
        (body,) = await clusters(world)
        found = body["spec"]["workerGroupSpecs"][0]
        return found if found["maxReplicas"] == 5 else None

    found = await world.wait_for("the new bound", group)
    assert found["replicas"] == 2
    assert await only_cluster(world) == before


async def test_with_recreate_the_old_cluster_goes_first(world: World) -> None:
    await world.pool(upgrade="Recreate")
    await world.model("one")
    await world.wait_for_condition("one", "Ready", "True", "Serving")
    old = await only_cluster(world)
    seen: list[int] = []
    await world.pool(upgrade="Recreate", image="localhost/tidegate/ray:2")

    async def is_new() -> bool:
        found = [body["metadata"]["name"] for body in await clusters(world)]
        seen.append(len(found))
        return bool(found) and found != [old] and len(world.serve.standing(found[0])) == 1

    await world.wait_for("the new cluster serves", is_new)
    assert max(seen) == 1


async def test_without_redis_the_status_says_so_and_recovery_is_by_itself(
    world: World, redis: RedisServer
) -> None:
    await world.pool()
    await world.model("one")
    await world.wait_for_condition("one", "Ready", "True", "Serving")
    redis.kill()
    await world.wait_for_condition("one", "Ready", "False", "RedisUnreachable", timeout=10)
    await world.wait_for_condition("default", "Ready", "False", "RedisUnreachable", kind="Pool", timeout=10)
    redis.start()
    await world.wait_for_condition("one", "Ready", "True", "Serving")


async def test_a_model_whose_pool_does_not_exist_says_so_until_it_does(world: World) -> None:
    await world.model("one", pool="later")
    await world.wait_for_condition("one", "Scheduled", "False", "NoSuchPool", timeout=10)
    await world.pool("later")
    await world.wait_for_condition("one", "Ready", "True", "Serving")


async def test_a_look_at_a_source_is_a_job_of_the_models_own(world: World) -> None:
    await world.pool(weightCache={"hostPath": "/weights"})
    body = await world.model(
        "one",
        engine={"name": "transformers"},
        source={"uri": "hf://owner/name", "secretRef": {"name": "token"}},
    )

    async def jobs() -> list[Object]:
        return (await world.api.list("Job", "default"))[0]

    await world.wait_for_condition("one", "WeightsAvailable", "Unknown", "Resolving")
    assert (await world.condition("one", "Scheduled"))["status"] == "Unknown"
    (job,) = await world.wait_for("a Job", jobs)
    assert job["metadata"]["ownerReferences"][0]["uid"] == body["metadata"]["uid"]
    refusal = '{"error": {"reason": "Unauthorized", "message": "The hub wants a token."}}'
    pod = await end_job(world, job, refusal)
    found = await world.wait_for_condition("one", "WeightsAvailable", "False", "Unauthorized", timeout=10)
    assert found["message"] == "The hub wants a token."

    await world.api.delete("Pod", pod)
    await world.api.delete("Job", job)  # its time is over; another is made
    await world.wait_for_condition("one", "WeightsAvailable", "Unknown", "Resolving", timeout=10)
    (job,) = await world.wait_for("a second Job", jobs)
    pod = await end_job(
        world,
        job,
        '{"path": "/weights/x", "weights_bytes": 5, "quantization": "none", "precision": "float32"}',
    )
    await world.wait_for_condition("one", "Ready", "True", "Serving")
    await world.settled()
    await world.api.delete("Pod", pod)
    await world.api.delete("Job", job)
    before = await world.operator.writes()
    await asyncio.sleep(4)
    assert await world.operator.writes() == before  # the answer is remembered


async def end_job(world: World, job: Object, answer: str) -> Object:
    """Do what kubelet and the Job controller do."""
    name = job["metadata"]["name"]
    pod = await world.api.create(
        "Pod",
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{name}-x",
                "namespace": "default",
                "labels": {**job["spec"]["template"]["metadata"]["labels"], "job-name": name},
            },
            "spec": {"restartPolicy": "Never", "containers": [{"name": "resolve", "image": "x"}]},
        },
    )
    ended = {"terminated": {"exitCode": 0, "message": answer}}
    container = {"name": "resolve", "image": "x", "imageID": "", "restartCount": 0, "ready": False}
    return await world.api.apply_status(
        "Pod", pod, {"phase": "Succeeded", "containerStatuses": [{**container, "state": ended}]}
    )


async def test_a_standby_takes_over_when_the_leader_is_killed(world: World, tmp_path: Path) -> None:
    await world.pool()
    await world.model("one")
    await world.wait_for_condition("one", "Ready", "True", "Serving")
    await world.settled()
    standby = OperatorProcess(world.operator._environment, tmp_path / "standby.log")
    async with running(standby):
        await asyncio.sleep(3)
        assert not await standby.leads()
        await world.operator.stop(signal.SIGKILL)
        await world.wait_for("the standby leads", standby.leads, timeout=40)
        await asyncio.sleep(4)
        assert await standby.writes() == {}


async def test_the_process_stays_small_with_fifty_models(world: World) -> None:
    await world.pool(maxLiveRevisions=60, groups=[{"name": "cpu", "maxWorkers": 20, "cpus": "4"}])
    for number in range(50):
        await world.model(f"m{number}")
    for number in range(50):
        await world.wait_for_condition(f"m{number}", "Ready", "True", "Serving", timeout=90)
    await world.settled(timeout=90)
    assert psutil.Process(world.operator.pid).memory_info().rss < 150e6


async def test_without_kuberay_the_status_says_so_and_its_coming_is_noticed(
    world: World, api_server: ApiServer
) -> None:
    definition = kuberay_definition(api_server)
    await world.operator.stop()
    api_server.kubectl("delete", "-f", definition, "--wait=true")
    try:
        await world.operator.start()
        await world.pool()
        await world.model("one")
        await world.wait_for_condition("default", "Ready", "False", "KubeRayMissing", kind="Pool", timeout=25)
        await world.wait_for_condition("one", "Ready", "False", "KubeRayMissing")
    finally:
        api_server.kubectl("apply", "--server-side", "-f", definition)
    pid = world.operator.pid
    await world.wait_for_condition("one", "Ready", "True", "Serving", timeout=40)
    assert psutil.Process(pid).is_running()  # the same process has noticed it
    assert GENERATION_LABEL in (await clusters(world))[0]["metadata"]["labels"]
