"""The chart as an API server takes it: every value set, Pod Security, rights, keys that stay, and its hooks.

No controller runs here, so nothing becomes ready; what the pods do is seen on the whole cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.cluster import CHART, Cluster, CommandFailed, Resource
from tests.integration.chart.rendered import VALUE_SETS, VALUES, pod_templates
from tidegate.control.resources import Model, Pool
from tidegate_operator.pod_template import RayDefaults
from tidegate_operator.ray_cluster import ray_cluster
from tidegate_operator.resolve_job import resolve_job

NAMESPACE = "chart"
OPERATOR = f"system:serviceaccount:{NAMESPACE}:tidegate-operator"
# Kinds of other projects, whose definitions are not here.
FOREIGN = ("monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1")
API = {"apiVersion": "tidegate.dev/v1alpha1"}
POOL = {**API, "kind": "Pool", "metadata": {"name": "default"}, "spec": {}}
MODEL: Resource = {
    **API,
    "kind": "Model",
    "metadata": {"name": "m", "finalizers": ["tidegate.dev/drain"]},
    "spec": {"source": {"uri": "hf://owner/name"}},
}
SMALL = ("--set=crds.install=false", "--no-hooks")


def rendered(api: Cluster, *arguments: str, release: str = "tidegate") -> list[Resource]:
    text = api.helm("template", release, str(CHART), "-n", NAMESPACE, *arguments)
    return [document for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="module")
def release(api_server: Cluster) -> Iterator[Cluster]:
    """Installed into a namespace that enforces Pod Security `restricted`."""
    for name in (NAMESPACE, "models-a", "models-b"):
        metadata = {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
        api_server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    api_server.helm("install", "tidegate", str(CHART), "-n", NAMESPACE, *SMALL)
    # Accounts are hooks, too, and no controller makes the namespace's own.
    accounts = [
        item
        for item in rendered(api_server)
        if item["metadata"]["name"] == "tidegate-uninstall" and item["kind"] != "Job"
    ]
    own = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    api_server.apply(*accounts, own, namespace=NAMESPACE)
    yield api_server
    api_server.helm("uninstall", "tidegate", "-n", NAMESPACE, "--no-hooks")


@pytest.mark.parametrize("values", VALUE_SETS)
def test_every_value_set_is_taken(release: Cluster, values: str) -> None:
    arguments = ("-f", str(VALUES / f"{values}.yaml"))
    # As another release: what is applied to the objects of this one would be merged with them.
    found = rendered(release, *arguments, release="another")
    documents = [item for item in found if item["apiVersion"] not in FOREIGN]
    release.kubectl(
        "apply",
        "--server-side",
        "--force-conflicts",
        "--dry-run=server",
        "--validate=strict",
        "-f",
        "-",
        stdin=yaml.safe_dump_all(documents),
    )


def made_by_the_operator() -> list[tuple[str, Resource]]:
    defaults = RayDefaults(image="ray:1", ray_version="2.60.0")
    pool, model = Pool.model_validate(POOL), Model.model_validate({**MODEL, "metadata": {"name": "m"}})
    spec = ray_cluster(pool, NAMESPACE, "0a1b2c3d", defaults)["spec"]
    job = resolve_job(model, "r1", pool, NAMESPACE, defaults)
    return [
        ("Ray head", spec["headGroupSpec"]["template"]),
        ("Ray worker", spec["workerGroupSpecs"][0]["template"]),
        ("resolve Job", job["spec"]["template"]),
    ]


def test_pods_meet_pod_security(release: Cluster) -> None:
    """The admission of the API server itself, on the pods and not on what makes them."""
    templates = [*pod_templates(rendered(release)), *made_by_the_operator()]
    assert len(templates) >= 8
    pods: list[Resource] = []
    for index, (_, template) in enumerate(templates):
        spec = {**template["spec"]}
        # A StatefulSet's controller adds the volume of a claim.
        mounted = {mount["name"] for item in spec["containers"] for mount in item.get("volumeMounts", [])}
        volumes = spec.get("volumes", [])
        volumes += [
            {"name": name, "emptyDir": {}} for name in mounted - {volume["name"] for volume in volumes}
        ]
        metadata = {"name": f"pod-{index}", "namespace": NAMESPACE}
        pods.append(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**spec, "volumes": volumes}}
        )
    release.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump_all(pods))
    refused = {**pods[0], "spec": {**pods[0]["spec"], "securityContext": {}}}
    with pytest.raises(CommandFailed, match="violates PodSecurity"):
        release.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(refused))


def may(api: Cluster, who: str, verb: str, what: str, *, where: str = NAMESPACE) -> bool:
    """`what` is RESOURCE[:SUBRESOURCE][.GROUP][/NAME]. The kind need not be served."""
    path, _, name = what.partition("/")
    path, _, group = path.partition(".")
    resource, _, subresource = path.partition(":")
    attributes = {"namespace": where, "verb": verb, "group": group, "resource": resource}
    attributes |= {"subresource": subresource, "name": name}
    with api.api() as http:
        answer = http.post(
            "/apis/authorization.k8s.io/v1/subjectaccessreviews",
            json={"spec": {"user": who, "resourceAttributes": attributes}},
        )
    answer.raise_for_status()
    return bool(answer.json()["status"]["allowed"])


def test_the_operator_may_do_its_work_and_no_more(release: Cluster) -> None:
    for verb, what in (
        ("watch", "models.tidegate.dev"),
        ("patch", "models.tidegate.dev"),
        ("patch", "models:status.tidegate.dev"),
        ("patch", "pools:status.tidegate.dev"),
        ("create", "rayclusters.ray.io"),
        ("delete", "rayclusters.ray.io"),
        ("create", "jobs.batch"),
        ("list", "pods"),
        ("list", "events"),
        ("create", "events.events.k8s.io"),
        ("create", "leases.coordination.k8s.io"),
        ("update", "leases.coordination.k8s.io/tidegate-operator"),
        ("list", "nodes"),
    ):
        assert may(release, OPERATOR, verb, what), (verb, what)
    for verb, what in (
        ("get", "secrets"),
        ("list", "secrets"),
        ("delete", "models.tidegate.dev"),
        ("create", "models.tidegate.dev"),
        ("create", "pods"),
        ("delete", "pods"),
        ("create", "pods:exec"),
        ("update", "leases.coordination.k8s.io/another"),
        ("patch", "deployments.apps/tidegate-operator"),
    ):
        assert not may(release, OPERATOR, verb, what), (verb, what)
    for verb, what in (("list", "models.tidegate.dev"), ("get", "secrets"), ("list", "pods")):
        assert not may(release, OPERATOR, verb, what, where="models-a"), (verb, what)


def test_secrets_stay_on_upgrade(release: Cluster) -> None:
    def secrets() -> dict[str, Any]:
        return {
            item["metadata"]["name"]: item["data"]
            for item in release.get_all("secret", NAMESPACE, "helm.sh/chart")
        }

    before = secrets()
    assert before.keys() == {"tidegate-admin-key", "tidegate-redis", "tidegate-gcs-redis"}
    release.helm("upgrade", "tidegate", str(CHART), "-n", NAMESPACE, *SMALL, "--set=gateway.replicas=3")
    assert secrets() == before
    key = release.secret("tidegate-admin-key", "key", NAMESPACE)
    assert len(key) == 46
    assert key.startswith("tg-")


@pytest.fixture
def as_uninstall(release: Cluster, tmp_path: Path) -> dict[str, str]:
    """An environment in which a program is the hook's account."""
    token = release.kubectl("create", "token", "tidegate-uninstall", "-n", NAMESPACE)
    config = yaml.safe_load(release.facts.kubeconfig.read_text(encoding="utf-8"))
    for user in config["users"]:
        user["user"] = {"token": token.strip()}
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return {**os.environ, "KUBECONFIG": str(file)}


def uninstall(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "tidegate_operator.uninstall", f"--namespaces={NAMESPACE}"]
    command += [f"--operator-namespace={NAMESPACE}", "--operator-lease=tidegate-operator"]
    command += ["--operator-selector=app.kubernetes.io/component=operator"]
    done = subprocess.run(
        [*command, "--timeout-seconds=6", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_uninstalling_with_kept_models(release: Cluster, as_uninstall: dict[str, str]) -> None:
    release.apply(POOL, MODEL, namespace=NAMESPACE)
    uninstall(as_uninstall, "--keep-models")
    deployment = release.get("deployment", "tidegate-operator", NAMESPACE)
    assert deployment is not None
    assert deployment["spec"]["replicas"] == 0
    model = release.get("model", "m", NAMESPACE)
    assert model is not None
    assert "finalizers" not in model["metadata"]
    assert release.get("pool", "default", NAMESPACE)


def test_uninstalling_with_nobody_to_drain(release: Cluster, as_uninstall: dict[str, str]) -> None:
    """The operator does not run, so what waits for it is let go when time is up."""
    release.apply(POOL, MODEL, namespace=NAMESPACE)
    said = uninstall(as_uninstall)
    assert "out of time" in said
    assert release.get("model", "m", NAMESPACE) is None
    assert release.get("pool", "default", NAMESPACE) is None


def test_the_values_pools_are_applied(release: Cluster, tmp_path: Path) -> None:
    """As the administrator: that the hook's account may is a matter of its Role, which is rendered."""
    (tmp_path / "values.yaml").write_text(
        yaml.safe_dump({"pools": [{"name": "seeded", "spec": {"workerIdleSeconds": 90}}]})
    )
    (text,) = [
        item["data"]["pools.yaml"]
        for item in rendered(release, "-f", str(tmp_path / "values.yaml"))
        if item["kind"] == "ConfigMap" and item["metadata"]["name"] == "tidegate-pools"
    ]
    (tmp_path / "pools.yaml").write_text(text)
    command = [sys.executable, "-m", "tidegate_operator.seed", str(tmp_path / "pools.yaml")]
    for _ in range(2):
        subprocess.run(command, env=release.environment, check=True, capture_output=True, timeout=60)
    pool = release.get("pool", "seeded", NAMESPACE)
    assert pool is not None
    assert pool["spec"]["workerIdleSeconds"] == 90
    release.delete("pool", "seeded", NAMESPACE)
