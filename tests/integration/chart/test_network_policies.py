"""Which ways the NetworkPolicies leave open. Nothing enforces them here: they are read as Kubernetes defines
them, with the labels that the pods really have."""

from __future__ import annotations

import pytest

from tests.integration.chart.policies import OUTSIDE, Endpoint, Policy, endpoint, is_allowed
from tests.integration.chart.rendered import NAMESPACE, Helm, Object, pod_templates
from tidegate.control.looks import Question
from tidegate.control.resources import Model, Pool
from tidegate_operator.pod_template import RayDefaults
from tidegate_operator.ray_cluster import ray_cluster
from tidegate_operator.resolve_job import resolve_job

DEFAULTS = RayDefaults(image="ray:1", ray_version="2.60.0")
API = {"apiVersion": "tidegate.dev/v1alpha1"}
WATCHED = "models-a"  # of the value set "everything"
OUT = endpoint(OUTSIDE)
CLIENT = endpoint("apps", {"app": "chat"})
PROMETHEUS = endpoint("monitoring", {"app": "prometheus"})


def ray_pod(namespace: str, kind: str) -> Endpoint:
    """With our labels and those that KubeRay adds (`utils.RayClusterLabelKey` and others)."""
    pool = Pool.model_validate({**API, "kind": "Pool", "metadata": {"name": "default"}, "spec": {}})
    spec = ray_cluster(pool, namespace, "0a1b2c3d", DEFAULTS)["spec"]
    group = spec["headGroupSpec"] if kind != "worker" else spec["workerGroupSpecs"][0]
    kuberay = {"ray.io/cluster": "default-0a1b2c3d", "ray.io/node-type": kind}
    return endpoint(namespace, {**group["template"]["metadata"]["labels"], **kuberay})


def resolve_pod(namespace: str) -> Endpoint:
    model = Model.model_validate(
        {**API, "kind": "Model", "metadata": {"name": "m"}, "spec": {"source": {"uri": "hf://a/b"}}}
    )
    pool = Pool.model_validate({**API, "kind": "Pool", "metadata": {"name": "default"}, "spec": {}})
    job = resolve_job(Question(model), "r1", pool, namespace, DEFAULTS)
    return endpoint(namespace, job["spec"]["template"]["metadata"]["labels"])


class Rendered:
    def __init__(self, objects: list[Object]) -> None:
        self.policies: list[Policy] = [item for item in objects if item["kind"] == "NetworkPolicy"]
        self.pods = {
            template["metadata"]["labels"]["app.kubernetes.io/component"]: endpoint(
                NAMESPACE,
                template["metadata"]["labels"],
                **{
                    port["name"]: port["containerPort"]
                    for port in template["spec"]["containers"][0].get("ports", [])
                },
            )
            for _, template in pod_templates(objects)
        }

    def allows(self, source: Endpoint | str, target: Endpoint | str, port: int) -> bool:
        one, two = (self.pods[end] if isinstance(end, str) else end for end in (source, target))
        return is_allowed(self.policies, one, two, port)


@pytest.fixture(scope="module")
def plain(helm: Helm) -> Rendered:
    return Rendered(helm.objects("defaults"))


@pytest.fixture(scope="module")
def full(helm: Helm) -> Rendered:
    return Rendered(helm.objects("everything"))


def test_the_ways_that_there_are(plain: Rendered) -> None:
    head, worker = ray_pod(NAMESPACE, "head"), ray_pod(NAMESPACE, "worker")
    clean_up, resolve = ray_pod(NAMESPACE, "redis-cleanup"), resolve_pod(NAMESPACE)
    for source, target, port in (
        (CLIENT, "gateway", 8000),
        (OUT, "gateway", 8000),
        ("gateway", "redis", 6379),
        ("operator", "redis", 6379),
        ("operator", head, 8265),
        ("operator", OUT, 6443),
        ("uninstall", OUT, 443),
        ("test", "gateway", 8000),
        (head, worker, 10002),
        (worker, head, 6379),
        (head, "gcs-redis", 6379),
        (clean_up, "gcs-redis", 6379),
        (worker, "redis", 6379),
        (head, OUT, 443),
        (worker, OUT, 443),
        (resolve, OUT, 443),
    ):
        assert plain.allows(source, target, port), (source, target, port)
    for source in ("gateway", "operator", "uninstall", head, worker, resolve):
        assert plain.allows(source, OUT, 53), source


def test_the_ways_that_there_are_not(plain: Rendered) -> None:
    head, worker, resolve = ray_pod(NAMESPACE, "head"), ray_pod(NAMESPACE, "worker"), resolve_pod(NAMESPACE)
    neighbour = endpoint(NAMESPACE, {"app": "neighbour"})
    for source, target, port in (
        (neighbour, "redis", 6379),
        (neighbour, "gcs-redis", 6379),
        (neighbour, head, 8265),
        (neighbour, worker, 10002),
        (CLIENT, head, 8265),
        (CLIENT, "operator", 8080),
        (CLIENT, "operator", 8090),
        ("gateway", "operator", 8090),
        ("gateway", "gcs-redis", 6379),
        ("gateway", head, 8265),
        ("gateway", OUT, 443),
        ("operator", "gcs-redis", 6379),
        ("operator", worker, 10002),
        ("redis", OUT, 443),
        ("redis", "gateway", 8000),
        ("gcs-redis", head, 6379),
        ("uninstall", "redis", 6379),
        ("test", "redis", 6379),
        ("test", OUT, 443),
        ("test", head, 8265),
        (resolve, "redis", 6379),
        (resolve, head, 8265),
        (head, resolve, 80),
        (ray_pod("elsewhere", "worker"), "redis", 6379),
    ):
        assert not plain.allows(source, target, port), (source, target, port)


def test_neighbours_in_the_namespace_are_left_alone(plain: Rendered) -> None:
    neighbour = endpoint(NAMESPACE, {"app": "neighbour"})
    assert plain.allows(neighbour, OUT, 443)
    assert plain.allows(CLIENT, neighbour, 80)


def test_watched_namespaces_reach_the_release(full: Rendered) -> None:
    head, worker = ray_pod(WATCHED, "head"), ray_pod(WATCHED, "worker")
    assert full.allows("operator", head, 8265)
    assert full.allows(worker, "redis", 6379)
    assert full.allows(head, "gcs-redis", 6379)
    assert full.allows(head, OUT, 9000)
    assert full.allows("pools", OUT, 443)
    # Two namespaces of one operator do not meet.
    assert not full.allows(ray_pod("models-b", "worker"), head, 6379)


def test_administrators_alone_reach_the_control_api(full: Rendered) -> None:
    assert full.allows(endpoint("apps", {"app": "ci"}), "operator", 8090)
    for other in (CLIENT, PROMETHEUS, "gateway", ray_pod(WATCHED, "head")):
        assert not full.allows(other, "operator", 8090)
    assert not full.allows(endpoint("apps", {"app": "ci"}), "operator", 8080)


def test_named_clients_and_prometheus_only(full: Rendered) -> None:
    head = ray_pod(WATCHED, "head")
    assert full.allows(CLIENT, "gateway", 8000)
    assert full.allows("test", "gateway", 8000)
    assert not full.allows(endpoint("other"), "gateway", 8000)
    for target, port in (("gateway", 8000), ("operator", 8080), (head, 8080)):
        assert full.allows(PROMETHEUS, target, port)
    assert not full.allows(PROMETHEUS, head, 8265)
    kuberay = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/instance": "kuberay-operator"}
    assert full.allows(endpoint("kuberay-system", kuberay), head, 8265)
    assert not full.allows(endpoint("kuberay-system", {"app": "neighbour"}), head, 8265)
    assert not full.allows(endpoint("kuberay-system"), head, 8265)
    assert not full.allows(endpoint("elsewhere", kuberay), head, 8265)


def test_an_external_redis_is_reached(helm: Helm) -> None:
    rendered = Rendered(helm.objects("external-redis"))
    assert rendered.allows("gateway", OUT, 6380)
    assert rendered.allows("operator", OUT, 6380)
    assert rendered.allows(ray_pod(NAMESPACE, "worker"), OUT, 6380)
    assert rendered.allows(ray_pod(NAMESPACE, "head"), OUT, 6379)


def test_sentinels_are_reached_and_the_server_that_they_name(helm: Helm) -> None:
    rendered = Rendered(helm.objects("external-redis-sentinel"))
    worker = ray_pod(NAMESPACE, "worker")
    for source in ("gateway", "operator", worker):
        assert rendered.allows(source, OUT, 26379)
        assert rendered.allows(source, OUT, 6379)
    assert not Rendered(helm.objects("external-redis")).allows("gateway", OUT, 26379)
    assert Rendered(helm.objects("external-redis-url")).allows("gateway", OUT, 26379)


def test_they_can_be_left_out(helm: Helm) -> None:
    assert not Rendered(helm.objects("small")).policies
