"""The RayCluster of a pool: what Ray's own autoscaler reads from it, and what makes a new generation."""

from __future__ import annotations

import copy
import json
import shlex
import warnings
from dataclasses import replace
from typing import Any

import pytest

from tidegate.control.resources import Pool, PoolSpec
from tidegate.control.serve_config import GROUP_UNIT, group_resource
from tidegate_operator.pod_template import RayDefaults, claim_folder, merged
from tidegate_operator.ray_cluster import (
    cluster_name,
    generation_of,
    groups_of,
    in_place_patch,
    ray_cluster,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

DEFAULTS = RayDefaults("tidegate-ray:1", "2.60.0", "redis://ray-redis:6379", ("ray-redis", "password"))
GPU_GROUP = {
    "name": "a100",
    "gpus": 2,
    "gpuMemory": "80Gi",
    "cpus": "7500m",
    "memory": "64Gi",
    "minWorkers": 1,
    "maxWorkers": 3,
    "nodeSelector": {"gpu": "a100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}


MINE = [{"name": "mine", "emptyDir": {}}]
MINE_AT = [{"name": "mine", "mountPath": "/mine"}]


def pool(name: str = "main", **spec: Any) -> Pool:
    return Pool.model_validate(
        {"apiVersion": "tidegate.dev/v1alpha1", "kind": "Pool", "metadata": {"name": name}, "spec": spec}
    )


def manifest(**spec: Any) -> dict[str, Any]:
    made = ray_cluster(pool(**spec), "apps", "12345678", DEFAULTS)
    found: dict[str, Any] = json.loads(json.dumps(made))  # whatever is made must be JSON
    return found


def container(made: dict[str, Any], group: int | None = None) -> dict[str, Any]:
    spec = made["spec"]["headGroupSpec"] if group is None else made["spec"]["workerGroupSpecs"][group]
    found: dict[str, Any] = spec["template"]["spec"]["containers"][0]
    return found


class TestManifest:
    def test_names_and_labels(self) -> None:
        made = manifest()
        assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayCluster")
        assert made["metadata"]["name"] == cluster_name("main", "12345678") == "main-12345678"
        for template in (
            made["spec"]["headGroupSpec"]["template"],
            made["spec"]["workerGroupSpecs"][0]["template"],
        ):
            assert template["metadata"]["labels"]["tidegate.dev/pool"] == "main"

    def test_rays_autoscaler_reads_what_the_packing_counts(self) -> None:
        """The real reader of the running Ray: a wrong word here and no worker would ever come."""
        spec = {"groups": [GPU_GROUP, {"name": "cpu", "cpus": "500m", "memory": "2Gi", "maxWorkers": 4}]}
        config = _derive_autoscaling_config_from_ray_cr(manifest(**spec))
        types = config["available_node_types"]
        for group in groups_of(PoolSpec.model_validate(spec)):
            read = types[group.name]
            assert (read["min_workers"], read["max_workers"]) == (group.min_workers, group.max_workers)
            assert read["resources"]["CPU"] == group.cpus
            assert read["resources"]["GPU"] == group.gpus_per_worker
            assert read["resources"]["memory"] == group.memory_bytes
            assert read["resources"][group_resource(group.name)] >= 1000 * GROUP_UNIT
        assert types["headgroup"]["resources"]["CPU"] == 0
        assert config["idle_timeout_minutes"] == 1.0

    def test_the_shell_that_starts_ray_keeps_the_resources_whole(self) -> None:
        parameters = manifest(groups=[GPU_GROUP])["spec"]["workerGroupSpecs"][0]["rayStartParams"]
        (argument,) = shlex.split(f"--resources={parameters['resources']}")
        assert json.loads(argument.partition("=")[2]) == {"tidegate-group-a100": 1}

    def test_workers_have_their_gpus_and_nodes(self) -> None:
        made = manifest(groups=[GPU_GROUP])
        resources = container(made, 0)["resources"]
        assert resources["limits"] == {"cpu": "7500m", "memory": "64Gi", "nvidia.com/gpu": "2"}
        pod = made["spec"]["workerGroupSpecs"][0]["template"]["spec"]
        assert pod["nodeSelector"] == {"gpu": "a100"}
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert made["spec"]["headGroupSpec"]["template"]["spec"]["enableServiceLinks"] is False

    def test_the_heads_state_lies_in_redis(self) -> None:
        options = manifest()["spec"]["gcsFaultToleranceOptions"]
        assert options == {
            "redisAddress": "redis://ray-redis:6379",
            "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "ray-redis", "key": "password"}}},
        }
        own = manifest(faultTolerance={"redisAddress": "redis:6379"})["spec"]["gcsFaultToleranceOptions"]
        assert own == {"redisAddress": "redis:6379"}, "the operator's password is not another Redis's"
        assert "gcsFaultToleranceOptions" not in manifest(faultTolerance={"enabled": False})["spec"]

    def test_pods_are_restricted(self) -> None:
        """Pod Security `restricted`, each container and the autoscaler's, which KubeRay adds."""
        made = manifest(weightCache={"claim": "weights"})
        pod = made["spec"]["headGroupSpec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in (container(made), container(made, 0), made["spec"]["autoscalerOptions"]):
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }

    @pytest.mark.parametrize(
        "spec",
        [
            {"weightCache": {"hostPath": "/srv/weights"}},
            {
                "volumes": [{"name": "venv", "hostPath": {"path": "/opt/venv"}}],
                "volumeMounts": [{"name": "venv", "mountPath": "/opt/venv", "readOnly": True}],
            },
        ],
    )
    def test_node_paths_keep_the_images_user(self, spec: dict[str, Any]) -> None:
        pod = manifest(**spec)["spec"]["headGroupSpec"]["template"]["spec"]
        assert "runAsUser" not in pod["securityContext"]

    def test_volumes_reach_every_container(self) -> None:
        mounts = [{"name": "venv", "mountPath": "/opt/venv", "readOnly": True}]
        made = manifest(
            volumes=[{"name": "venv", "hostPath": {"path": "/opt/venv"}}],
            volumeMounts=mounts,
            weightCache={"claim": "weights"},
            sharedMemory="1Gi",
        )
        for each in (container(made), container(made, 0)):
            paths = [mount["mountPath"] for mount in each["volumeMounts"]]
            assert paths == ["/var/lib/tidegate/weights", "/opt/venv", "/dev/shm"]
            assert {"name": "HF_HOME", "value": "/var/lib/tidegate/weights/huggingface"} in each["env"]
        # The autoscaler runs in the same image, so it needs the environment that is mounted into it.
        assert mounts[0] in made["spec"]["autoscalerOptions"]["volumeMounts"]

    def test_ray_asks_for_a_token(self) -> None:
        made = manifest(env=[{"name": "RAY_USAGE_STATS_ENABLED", "value": "1"}])
        assert made["spec"]["authOptions"] == {"mode": "token"}
        for each in (container(made), container(made, 0), made["spec"]["autoscalerOptions"]):
            values = {item["name"]: item["value"] for item in each["env"]}
            assert "RAY_AUTH_MODE" not in values, "KubeRay would leave it as it is"
            assert values["RAY_USAGE_STATS_ENABLED"] == "1", "the pool's own variables win"
            assert len(values) == len(each["env"])

    def test_overrides_meet_what_they_name(self) -> None:
        made = manifest(
            head={"podOverrides": {"priorityClassName": "high"}},
            groups=[
                {
                    "name": "cpu",
                    "podOverrides": {
                        "containers": [{"name": "ray-worker", "resources": {"limits": {"cpu": "9"}}}],
                        "securityContext": {"runAsUser": 5},
                    },
                }
            ],
        )
        assert made["spec"]["headGroupSpec"]["template"]["spec"]["priorityClassName"] == "high"
        worker = container(made, 0)
        assert worker["resources"]["limits"] == {"cpu": "9", "memory": "4Gi"}
        assert worker["image"] == "tidegate-ray:1"
        pod = made["spec"]["workerGroupSpecs"][0]["template"]["spec"]
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsNonRoot"]) == (5, True)


class TestGeneration:
    @pytest.mark.parametrize(
        "change",
        [
            {"image": "other:2"},
            {"rayVersion": "2.55.0"},
            {"sharedMemory": "1Gi"},
            {"env": [{"name": "A", "value": "b"}]},
            {"head": {"memory": "8Gi"}},
            {"groups": [{**GPU_GROUP, "cpus": "4"}]},
            {"groups": [{**GPU_GROUP, "name": "h100"}]},
            {"maxLiveRevisions": 3},  # a smaller head
        ],
    )
    def test_what_needs_new_pods_is_a_new_one(self, change: dict[str, Any]) -> None:
        before = generation_of(pool(groups=[GPU_GROUP]).spec, DEFAULTS)
        after = generation_of(pool(**{"groups": [GPU_GROUP], **change}).spec, DEFAULTS)
        assert before != after

    @pytest.mark.parametrize(
        "change",
        [
            {"maxLiveRevisions": 55},
            {"workerIdleSeconds": 9},
            {"upgrade": "Recreate"},
            {"groups": [{**GPU_GROUP, "minWorkers": 0, "maxWorkers": 9}]},
            {"groups": [{**GPU_GROUP, "gpuMemory": "40Gi"}]},
        ],
    )
    def test_what_changes_in_place_is_none(self, change: dict[str, Any]) -> None:
        before = generation_of(pool(groups=[GPU_GROUP]).spec, DEFAULTS)
        assert generation_of(pool(**{"groups": [GPU_GROUP], **change}).spec, DEFAULTS) == before

    def test_another_image_of_the_operator_is_a_new_one(self) -> None:
        spec = pool().spec
        assert generation_of(spec, DEFAULTS) != generation_of(spec, RayDefaults("tidegate-ray:2", "2.60.0"))


class TestPatch:
    def test_bounds_change_where_they_stand(self) -> None:
        live = manifest(groups=[GPU_GROUP])
        live["spec"]["workerGroupSpecs"][0] |= {"replicas": 2, "scaleStrategy": {"workersToDelete": ["x"]}}
        wanted = manifest(groups=[{**GPU_GROUP, "maxWorkers": 5}], workerIdleSeconds=9)
        operations = in_place_patch(live, wanted)
        assert operations == [
            {"op": "add", "path": "/spec/autoscalerOptions/idleTimeoutSeconds", "value": 9},
            {"op": "test", "path": "/spec/workerGroupSpecs/0/groupName", "value": "a100"},
            {"op": "add", "path": "/spec/workerGroupSpecs/0/maxReplicas", "value": 5},
        ]
        patched = copy.deepcopy(live)
        patched["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] = 9
        patched["spec"]["workerGroupSpecs"][0]["maxReplicas"] = 5
        assert in_place_patch(patched, wanted) == []

    def test_what_the_autoscaler_wrote_is_left_alone(self) -> None:
        live = manifest(groups=[GPU_GROUP])
        live["spec"]["workerGroupSpecs"][0]["replicas"] = 3
        assert in_place_patch(live, manifest(groups=[GPU_GROUP])) == []


def test_claims_are_found_where_they_are_mounted() -> None:
    spec = pool(
        weightCache={"claim": "weights"},
        volumes=[{"name": "more", "persistentVolumeClaim": {"claimName": "models"}}],
        volumeMounts=[{"name": "more", "mountPath": "/models"}],
    ).spec
    assert claim_folder(spec, "models") == "/models"
    assert claim_folder(spec, "weights") == "/var/lib/tidegate/weights"
    assert claim_folder(spec, "other") == ""


@pytest.mark.parametrize(
    ("queue", "url", "files"),
    [
        ({"queue_url": "redis://u@h/0"}, "redis://u@h/0", {}),
        ({"queue_url": "redis://h", "queue_password_secret": ("q", "pw")}, "redis://h", {"pw": "password"}),
        ({"queue_url_secret": ("q", "address")}, None, {"address": "url"}),
    ],
)
def test_every_ray_container_is_told_where_the_queue_is(
    queue: dict[str, Any], url: str | None, files: dict[str, str]
) -> None:
    defaults = replace(DEFAULTS, **queue)
    made = ray_cluster(
        pool(groups=[{"name": "a"}], volumes=MINE, volumeMounts=MINE_AT), "apps", "1", defaults
    )
    for group in (None, 0):
        found = container(made, group)
        variables = {item["name"]: item["value"] for item in found["env"]}
        assert variables.get("TG_REDIS_URL") == url
        assert ("TG_REDIS_FOLDER" in variables) is bool(files)
        part = made["spec"]["headGroupSpec"] if group is None else made["spec"]["workerGroupSpecs"][0]
        mounted = {
            item["key"]: item["path"]
            for volume in part["template"]["spec"]["volumes"]
            for source in volume.get("projected", {}).get("sources", [])
            for item in source["secret"]["items"]
        }
        assert mounted == files
        folders = {mount["name"]: mount["mountPath"] for mount in found["volumeMounts"]}
        assert folders.get("tidegate-queue") == variables.get("TG_REDIS_FOLDER")
    assert "tidegate-queue" not in [
        mount["name"] for mount in made["spec"]["autoscalerOptions"]["volumeMounts"]
    ]
    spec = pool(groups=[{"name": "a"}]).spec
    assert generation_of(spec, defaults) != generation_of(spec, DEFAULTS)


def test_merging_by_name() -> None:
    base = {"a": 1, "list": [{"name": "x", "v": 1}, {"name": "y"}], "plain": [1, 2], "deep": {"k": 1, "l": 2}}
    over = {"list": [{"name": "x", "w": 2}, {"name": "z"}], "plain": [3], "deep": {"k": 5}}
    assert merged(base, over) == {
        "a": 1,
        "list": [{"name": "x", "v": 1, "w": 2}, {"name": "y"}, {"name": "z"}],
        "plain": [3],
        "deep": {"k": 5, "l": 2},
    }
