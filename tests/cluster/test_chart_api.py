"""The chart as an API server takes it: every value set, Pod Security, rights, keys that stay, and its hooks.

No controller runs here, so nothing becomes ready; what the pods do is seen on the whole cluster.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.cluster import CHART, Cluster, CommandFailed, Resource, manifest
from tests.integration.chart.rendered import VALUE_SETS, VALUES, pod_templates
from tidegate.control.looks import Question
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
# The hook that stops the operator owns its replicas from then on, as whoever scales it by hand.
FORCED = "--force-conflicts"
SMALL = ("--set=crds.install=false", "--no-hooks")


def rendered(api: Cluster, *arguments: str, release: str = "tidegate") -> list[Resource]:
    # As `helm install` finds it; `helm template` asks no API server.
    policies = "--api-versions=admissionregistration.k8s.io/v1/MutatingAdmissionPolicy"
    text = api.helm("template", release, str(CHART), "-n", NAMESPACE, policies, *arguments)
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
        stdin=manifest(*documents),
    )


def made_by_the_operator() -> list[tuple[str, Resource]]:
    defaults = RayDefaults(image="ray:1", ray_version="2.60.0")
    pool, model = Pool.model_validate(POOL), Model.model_validate({**MODEL, "metadata": {"name": "m"}})
    spec = ray_cluster(pool, NAMESPACE, "0a1b2c3d", defaults)["spec"]
    job = resolve_job(Question(model), "r1", pool, NAMESPACE, defaults)
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
    release.kubectl("create", "--dry-run=server", "-f", "-", stdin=manifest(*pods))
    refused = {**pods[0], "spec": {**pods[0]["spec"], "securityContext": {}}}
    with pytest.raises(CommandFailed, match="violates PodSecurity"):
        release.kubectl("create", "--dry-run=server", "-f", "-", stdin=manifest(refused))


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
        ("get", "secrets"),  # tokens of Ray clusters
    ):
        assert may(release, OPERATOR, verb, what), (verb, what)
    for verb, what in (
        ("list", "secrets"),
        ("watch", "secrets"),
        ("create", "secrets"),
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
    assert before.keys() == {
        "tidegate-admin-key",
        "tidegate-control-key",
        "tidegate-redis",
        "tidegate-gcs-redis",
    }
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


def test_the_job_of_plain_objects_takes_nothing_down(release: Cluster, as_uninstall: dict[str, str]) -> None:
    """With the rights and the command that the chart renders, beside a release that Helm says is deployed."""
    (job,) = [item for item in rendered(release) if item["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = [sys.executable, *container["command"][1:], "--timeout-seconds=6"]
    release.kubectl("scale", "deployment/tidegate-operator", "-n", NAMESPACE, "--replicas=2")
    release.apply(POOL, MODEL, namespace=NAMESPACE)

    def run() -> str:
        done = subprocess.run(
            command, env=as_uninstall, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    def operators() -> int:
        deployment = release.get("deployment", "tidegate-operator", NAMESPACE)
        assert deployment is not None
        return int(deployment["spec"]["replicas"])

    assert "nothing was stopped or deleted" in run()
    assert operators() == 2
    model = release.get("model", "m", NAMESPACE)
    assert model is not None
    assert model["metadata"]["finalizers"] == ["tidegate.dev/drain"]
    # What Helm does before it creates its first pre-delete hook.
    newest = max(
        release.get_all("secret", NAMESPACE, "owner=helm,name=tidegate"),
        key=lambda item: int(item["metadata"]["labels"]["version"]),
    )
    name, status = newest["metadata"]["name"], newest["metadata"]["labels"]["status"]
    release.kubectl("label", "secret", name, "-n", NAMESPACE, "--overwrite", "status=uninstalling")
    try:
        assert "nothing was stopped" not in run()
        assert operators() == 0
    finally:
        release.kubectl("label", "secret", name, "-n", NAMESPACE, "--overwrite", f"status={status}")
        release.delete("model", "m", NAMESPACE)
        release.delete("pool", "default", NAMESPACE)


def test_helm_itself_says_that_it_uninstalls_before_a_hook_runs(release: Cluster) -> None:
    """No controller runs a Job here, so Helm waits in vain, and its record can be read meanwhile."""
    namespace = "going"
    release.kubectl("create", "namespace", namespace)
    options = ("-n", namespace, "--set=crds.install=false,fullnameOverride=going")
    release.helm("install", "going", str(CHART), *options, "--no-hooks")
    with pytest.raises(CommandFailed):
        release.helm("uninstall", "going", "-n", namespace, "--timeout", "3s")
    (record,) = release.get_all("secret", namespace, "owner=helm,name=going")
    assert record["metadata"]["labels"]["status"] == "uninstalling"
    assert record["metadata"]["name"] == "sh.helm.release.v1.going.v1"
    release.helm("uninstall", "going", "-n", namespace, "--no-hooks")


def refusal(api: Cluster, *arguments: str) -> str:
    with pytest.raises(CommandFailed) as caught:
        api.helm("upgrade", "tidegate", str(CHART), "-n", NAMESPACE, *SMALL, *arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("operator.namespaces={models-a,nowhere}",),
            ("no namespace nowhere", "kubectl create namespace nowhere"),
        ),
        (("redis.persistence.enabled=false",), ("redis.persistence.enabled", "with a volume", "runbooks.md")),
        (("gcsRedis.persistence.enabled=false",), ("gcsRedis.persistence.enabled", "with a volume")),
        (("redis.persistence.size=9Gi",), ("redis.persistence.size", "asks for 8Gi", "to 9Gi")),
        (("gcsRedis.persistence.size=2Gi",), ("gcsRedis.persistence.size", "asks for 1Gi")),
        (("redis.persistence.storageClass=fast",), ("redis.persistence.storageClass", '"fast"')),
        (("nameOverride=tide", "fullnameOverride=tidegate"), ("nameOverride", "cannot change")),
    ],
)
def test_what_cannot_change_is_refused_before_anything_does(
    release: Cluster, arguments: tuple[str, ...], says: tuple[str, ...]
) -> None:
    before = release.get_all("secret", NAMESPACE, "owner=helm")
    said = refusal(release, *[f"--set={argument}" for argument in arguments])
    for part in says:
        assert part in said
    assert len(release.get_all("secret", NAMESPACE, "owner=helm")) == len(before), "no revision was begun"


def test_a_deployment_that_others_scale_is_told_before_half_is_upgraded(release: Cluster) -> None:
    scale = ("scale", "-n", NAMESPACE, "deployment/tidegate-operator")
    release.kubectl(*scale, "--replicas=1")
    said = refusal(release)
    assert "operator.replicas: tidegate-operator was scaled to 1" in said
    assert "--replicas=2" in said
    upgrade = ("upgrade", "tidegate", str(CHART), "-n", NAMESPACE, *SMALL)
    release.helm(*upgrade, "--set=operator.replicas=1")
    release.kubectl(*scale, "--replicas=2")
    release.helm(*upgrade)


def test_what_means_the_same_is_no_change(release: Cluster) -> None:
    for argument in ("redis.persistence.size=8192Mi", "redis.persistence.retain=true"):
        release.helm("upgrade", "tidegate", str(CHART), "-n", NAMESPACE, *SMALL, FORCED, f"--set={argument}")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"other": b"x"}, ('nothing under the key "password"', "only other")),
        ({"password": b"two\nlines"}, ("control character",)),
    ],
)
def test_a_secret_that_cannot_be_meant_is_named(
    release: Cluster, data: dict[str, bytes], says: tuple[str, ...]
) -> None:
    encoded = {name: base64.b64encode(value).decode() for name, value in data.items()}
    metadata = {"name": "login"}
    release.delete("secret", "login", NAMESPACE)
    release.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": encoded}, namespace=NAMESPACE
    )
    for setting in ("redis.auth", "gcsRedis.auth", "externalRedis"):
        arguments = [f"--set={setting}.existingSecret=login"]
        if setting == "externalRedis":
            arguments += ["--set=redis.enabled=false", "--set=externalRedis.host=redis.example"]
        said = refusal(release, *arguments)
        for part in (f"{setting}.existingSecret: the Secret login", *says):
            assert part in said


def test_a_line_break_at_the_end_is_named_where_it_is_not_cut(release: Cluster) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "broken"}}
    release.apply({**secret, "stringData": {"password": "s3cret\n"}}, namespace=NAMESPACE)
    said = refusal(release, "--set=gcsRedis.auth.existingSecret=broken")
    assert "gcsRedis.auth.existingSecret: the Secret broken" in said
    assert "ends with a line break" in said
    release.helm(
        "upgrade",
        "tidegate",
        str(CHART),
        "-n",
        NAMESPACE,
        *SMALL,
        FORCED,
        "--dry-run=server",
        "--set=redis.auth.existingSecret=broken",
    )


def test_a_secret_that_rays_pods_would_miss_is_named(release: Cluster) -> None:
    """Told before anything changes, not by pods that cannot start."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models-c"}}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "mine"}}
    release.apply(namespace)
    release.apply({**secret, "stringData": {"password": "s3cret"}}, namespace=NAMESPACE)
    said = refusal(
        release, "--set=redis.auth.existingSecret=mine", f"--set=operator.namespaces={{{NAMESPACE},models-c}}"
    )
    assert "no Secret mine in the namespace models-c" in said


def test_pods_restart_when_a_secret_changes_and_not_otherwise(release: Cluster) -> None:
    def annotations() -> dict[str, str]:
        return {
            item["metadata"]["name"]: item["spec"]["template"]["metadata"]["annotations"][
                "tidegate.dev/secrets"
            ]
            for kind in ("deployment", "statefulset")
            for item in release.get_all(kind, NAMESPACE, "app.kubernetes.io/instance=tidegate")
        }

    def upgraded() -> dict[str, str]:
        release.helm("upgrade", "tidegate", str(CHART), "-n", NAMESPACE, *SMALL, FORCED)
        return annotations()

    before = annotations()
    assert len(before) == 4
    assert upgraded() == before
    release.kubectl(
        "patch", "secret", "tidegate-redis", "-n", NAMESPACE, "-p", '{"stringData": {"password": "another"}}'
    )
    after = upgraded()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"tidegate-gateway", "tidegate-operator", "tidegate-redis"}
    assert release.secret("tidegate-redis", "password", NAMESPACE) == "another"


def test_people_with_view_and_edit(release: Cluster) -> None:
    """The aggregation is a controller's work; the roles themselves are bound here."""
    for role in ("view", "edit"):
        name = f"{NAMESPACE}-tidegate-{role}"
        release.kubectl(
            "create", "rolebinding", role, "-n", NAMESPACE, f"--clusterrole={name}", f"--user={role}"
        )
    for verb, what, who in (
        ("get", "models.tidegate.dev", "view"),
        ("list", "pools.tidegate.dev", "view"),
        ("create", "models.tidegate.dev", "edit"),
        ("delete", "pools.tidegate.dev", "edit"),
        ("patch", "models:scale.tidegate.dev", "edit"),
    ):
        assert may(release, who, verb, what), (verb, what, who)
    for verb, what, who in (
        ("create", "models.tidegate.dev", "view"),
        ("patch", "models:status.tidegate.dev", "edit"),
        ("get", "models.tidegate.dev", "somebody"),
    ):
        assert not may(release, who, verb, what), (verb, what, who)


def test_the_guides_way_to_take_finalizers_away(release: Cluster) -> None:
    """In each namespace its own Models, as they stand on the page."""
    page = (CHART.parents[1] / "platform/docs/guides/kubernetes.md").read_text(encoding="utf-8")
    command = page[page.index("    for namespace in") :]
    command = re.sub(r"(?m)^    ", "", command[: command.index("\n\n")])
    assert "for namespace in tidegate; do" in command
    for namespace in ("models-a", "models-b"):
        release.apply(MODEL, namespace=namespace)
    command = command.replace("in tidegate;", "in models-a models-b;")
    subprocess.run(["bash", "-euc", command], env=release.environment, check=True, timeout=60)
    for namespace in ("models-a", "models-b"):
        model = release.get("model", "m", namespace)
        assert model is not None
        assert "finalizers" not in model["metadata"]
        release.delete("model", "m", namespace)


def test_the_guides_policy_holds_models_to_source_secrets(release: Cluster) -> None:
    page = (CHART.parents[1] / "platform/docs/guides/security.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?s)```yaml\n(.*?)```", page)
    objects = [
        item
        for block in blocks
        for item in yaml.safe_load_all(block)
        if item.get("kind", "").startswith("ValidatingAdmissionPolicy")
    ]
    assert len(objects) == 2
    # Other tests share this API server.
    only_here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "models-a"}}}
    objects[1]["spec"]["matchResources"] = only_here

    def model(secret: str) -> str:
        source = {"uri": "hf://owner/name", "secretRef": {"name": secret}}
        return manifest({**MODEL, "spec": {"source": source}})

    command = ("create", "--dry-run=server", "-n", "models-a", "-f", "-")

    def is_refused() -> bool:
        try:
            release.kubectl(*command, stdin=model("the-admins"))
        except CommandFailed as refused:
            assert "only Secrets that begin with source-" in str(refused)
            return True
        return False

    release.apply(*objects)
    try:
        release.wait_for("the policy", is_refused, 60)
        release.kubectl(*command, stdin=model("source-hub"))
        release.kubectl(*command, stdin=manifest(MODEL))
        without_source = {**MODEL, "spec": {"engine": {"name": "simulated"}}}
        release.kubectl(*command, stdin=manifest(without_source))
    finally:
        for item in objects:
            release.delete(item["kind"], item["metadata"]["name"])
    # The API server forgets a policy a moment after it is gone.
    release.wait_for("the policy to go", lambda: not is_refused(), 60)


def test_the_api_server_stamps_who_asked(release: Cluster) -> None:
    """A person by their name, whatever they write themselves; the control API by its key's."""
    chosen = ("--set=controlApi.stampAuthors=true", "--set=operator.namespaces={models-b}")
    objects = rendered(release, *chosen, "--show-only=templates/operator/authors.yaml")
    assert len(objects) == 2
    verbs = {"apiGroups": ["tidegate.dev"], "resources": ["models"], "verbs": ["get", "patch"]}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role"}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "askers"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "askers"},
        "subjects": [{"kind": "User", "name": name} for name in ("anna", OPERATOR)],
    }
    model = {**MODEL, "metadata": {"name": "asked"}}
    release.apply(
        model, {**role, "metadata": {"name": "askers"}, "rules": [verbs]}, binding, namespace="models-b"
    )

    def author(*annotations: str, user: str = "anna") -> str:
        """What stands in the answer to a dry run."""
        names = [f"tidegate.dev/{each}" for each in annotations]
        command = ("annotate", "--overwrite", "--dry-run=server", "-n", "models-b", f"--as={user}")
        answer = release.kubectl(*command, "model", "asked", *names, "-o", "yaml")
        found = yaml.safe_load(answer)["metadata"].get("annotations") or {}
        return str(found.get("tidegate.dev/rollout-author", ""))

    release.apply(*objects)
    try:
        release.wait_for("the policy", lambda: author("rollout=pause") == "anna", 60)
        assert author("rollout=pause", "rollout-author=somebody") == "anna"
        assert author("other=x") == ""
        assert author("rollout=pause", "rollout-author=ci", user=OPERATOR) == "ci"
    finally:
        for item in objects:
            release.delete(item["kind"], item["metadata"]["name"])
        release.delete("model", "asked", "models-b")
