"""Models on shares of a GPU. The node only says that it has one, and the engines are simulated: tested is who
is placed, who is refused, and that workers come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import GPU_RESOURCE, Cluster, Resource
from tests.cluster.conftest import NAMESPACES
from tests.cluster.release import Release, resource

POOL = "packing"
WORKERS = f"tidegate.dev/pool={POOL},ray.io/node-type=worker"
# The memory of Qwen2.5-7B-Instruct with 8k of context, in 4 bits and in fp16, on a GPU of 24 GiB.
GPTQ, FP16 = "gptq-sized", "fp16-sized"
WANTED = {GPTQ: "7Gi", FP16: "16Gi"}
SHARES = {GPTQ: 0.3, FP16: 0.67}
START_SECONDS = 180  # a Ray head, a worker and two replicas on a busy machine
IDLE_SECONDS = 5

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def namespace(shared_release: Release) -> str:
    return shared_release.namespace


@pytest.fixture
def one_gpu(cluster: Cluster) -> Iterator[None]:
    with cluster.offering_gpus(1):
        yield


@pytest.fixture
def pool(cluster: Cluster, namespace: str, one_gpu: None) -> Iterator[None]:
    spec = {
        "head": {"cpus": "500m", "memory": "3Gi"},
        "groups": [{"name": "gpu", "gpus": 1, "gpuMemory": "24Gi", "memory": "3Gi"}],
        "workerIdleSeconds": IDLE_SECONDS,
        "faultTolerance": {"enabled": False},
    }
    cluster.apply(resource("Pool", POOL, spec), namespace=namespace)
    try:
        yield
    finally:
        for name in (*WANTED, "third"):
            cluster.delete("model", name, namespace)
        cluster.delete("pool", POOL, namespace)


def model(name: str, gpu_memory: str, min_replicas: int = 1) -> Resource:
    return resource(
        "Model",
        name,
        {
            "engine": {"name": "simulated"},
            "resources": {"gpuMemory": gpu_memory},
            "scaling": {"minReplicas": min_replicas, "idleSeconds": IDLE_SECONDS},
            "pool": POOL,
        },
    )


def workers(cluster: Cluster, namespace: str) -> list[str]:
    pods = cluster.get_all("pods", namespace, WORKERS)
    return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def warnings(cluster: Cluster, namespace: str) -> set[str]:
    """Reasons of the Events that warn about the Pool."""
    uid = (cluster.get("pool", POOL, namespace) or {})["metadata"]["uid"]
    return {
        event["reason"]
        for event in cluster.get_all("events.events.k8s.io", namespace)
        if event["type"] == "Warning" and event["regarding"].get("uid") == uid
    }


def test_two_models_share_a_gpu_a_third_is_refused_and_the_group_goes_up_and_down(
    cluster: Cluster, namespace: str, pool: None, request: pytest.FixtureRequest
) -> None:
    request.node.stash[NAMESPACES] = [namespace]
    cluster.wait_for_condition("pool", POOL, "Ready", namespace, timeout=START_SECONDS)
    assert workers(cluster, namespace) == []

    for name, gpu_memory in WANTED.items():
        cluster.apply(model(name, gpu_memory), namespace=namespace)
    for name in WANTED:
        cluster.wait_for_condition("model", name, "Ready", namespace, reason="Serving", timeout=START_SECONDS)
    (worker,) = workers(cluster, namespace)
    found = cluster.get("pod", worker, namespace)
    assert found is not None
    assert found["spec"]["containers"][0]["resources"]["limits"][GPU_RESOURCE] == "1"
    for name, share in SHARES.items():
        status = (cluster.get("model", name, namespace) or {})["status"]
        assert (status["accelerator"], status["gpuShare"], status["replicas"]) == ("gpu", share, 1)

    cluster.apply(model("third", "2Gi"), namespace=namespace)
    refused = cluster.wait_for_condition(
        "model", "third", "Scheduled", namespace, status="False", reason="GpusTaken", timeout=10
    )
    assert refused["message"] == (
        "The replica needs 0.09 GPU of group gpu (resources.gpuMemory 2.00 GiB; a GPU has 24.00 GiB), and "
        f"of its 1 GPU 0.97 are taken ({FP16} 0.67, {GPTQ} 0.3): raise maxWorkers of the group, or shrink or "
        f"delete a model of the pool '{POOL}'."
    )
    assert cluster.condition("model", "third", "Ready", namespace)["reason"] == "GpusTaken"
    assert workers(cluster, namespace) == [worker]
    cluster.delete("model", "third", namespace)

    for name, gpu_memory in WANTED.items():
        cluster.apply(model(name, gpu_memory, min_replicas=0), namespace=namespace)
    cluster.wait_for("the group has no worker", lambda: not workers(cluster, namespace), timeout=180)
    for name in WANTED:
        cluster.wait_for_condition("model", name, "Ready", namespace, reason="Asleep", timeout=10)
    assert warnings(cluster, namespace) == set(), "a worker that was idle is no trouble"
