"""The KubeRay RayCluster of one generation of a Pool (`ray.io/v1`, KubeRay 1.5.1 to 1.7). Pure.

A generation is named by a hash over everything that needs new pods. What changes in place is left out of
it: bounds on workers, the time after which an idle one goes. Replicas run on workers only (the head has no
CPUs for them), each in the group that its placement names through a Ray resource of that name.

Whoever speaks to Ray may run code in its pods. KubeRay makes a token for each cluster, in a Secret of its
own, and tells it to all of Ray's containers (`authOptions`); the chart's NetworkPolicies are the second lock.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from tidegate.control.observed import Group
from tidegate.control.pool_schema import Pool, PoolSpec, WorkerGroup
from tidegate.control.serve_config import group_resource
from tidegate.replica_args import PASSWORD_FILE, REDIS_FOLDER_VARIABLE, REDIS_VARIABLE, URL_FILE
from tidegate_operator.pod_template import (
    GENERATION_LABEL,
    POOL_LABEL,
    QUEUE_FOLDER,
    QUEUE_VOLUME,
    SHARED_MEMORY_VOLUME,
    RayDefaults,
    common_labels,
    container_security,
    environment,
    image_of,
    merged,
    on_wire,
    pod_security,
    pull_secrets,
    volume_mounts,
    volumes,
    weights_environment,
)

API_VERSION = "ray.io/v1"
GENERATION_DIGITS = 8
# Serve's own messages are small and replicas exchange nothing; Ray refuses less than 75 MiB.
OBJECT_STORE_BYTES = 100_000_000
# Of a worker's memory, what Ray's own processes take: raylet, agents, a spare worker process.
RAY_PROCESSES_BYTES = 512 << 20
WORKER_UNITS = 1  # of the group's own resource, of which a replica takes `serve_config.GROUP_UNIT`
AUTOSCALER_RESOURCES = {
    "requests": {"cpu": "50m", "memory": "256Mi"},
    "limits": {"cpu": "500m", "memory": "512Mi"},
}
RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}


def cluster_name(pool: str, generation: str) -> str:
    return f"{pool}-{generation}"


def generation_of(spec: PoolSpec, defaults: RayDefaults) -> str:
    """Return eight hex digits over all that needs new pods; equal for two specs that differ only in what
    changes in place."""
    fixed = copy.deepcopy(_spec(spec, defaults, {}))
    fixed["autoscalerOptions"].pop("idleTimeoutSeconds")
    for group in fixed["workerGroupSpecs"]:
        for name in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(name)
    text = json.dumps(fixed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:GENERATION_DIGITS]


def ray_cluster(pool: Pool, namespace: str, generation: str, defaults: RayDefaults) -> dict[str, Any]:
    """Return the whole manifest; owner references are the caller's."""
    labels = {**common_labels("ray"), POOL_LABEL: pool.name, GENERATION_LABEL: generation}
    return {
        "apiVersion": API_VERSION,
        "kind": "RayCluster",
        "metadata": {
            "name": cluster_name(pool.name, generation),
            "namespace": namespace,
            "labels": labels,
        },
        "spec": _spec(pool.spec, defaults, labels),
    }


def in_place_patch(live: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """JSON patch (RFC 6902) that gives a standing cluster the wanted worker bounds and idle time; empty
    where it has them.

    A patch and not an apply: the list of groups is one atomic value in KubeRay's schema, in which Ray's
    autoscaler writes `replicas` and `scaleStrategy` all the time. Each group's `test` makes the API server
    refuse the patch where another group stands at its place.
    """
    operations: list[dict[str, Any]] = []
    path = "/spec/autoscalerOptions/idleTimeoutSeconds"
    idle = wanted["spec"]["autoscalerOptions"]["idleTimeoutSeconds"]
    if (live["spec"].get("autoscalerOptions") or {}).get("idleTimeoutSeconds") != idle:
        operations.append({"op": "add", "path": path, "value": idle})
    bounds = {group["groupName"]: group for group in wanted["spec"]["workerGroupSpecs"]}
    for index, group in enumerate(live["spec"].get("workerGroupSpecs") or []):
        target = bounds.get(group["groupName"])
        if target is None:
            continue
        base = f"/spec/workerGroupSpecs/{index}"
        changes = [
            {"op": "add", "path": f"{base}/{name}", "value": target[name]}
            for name in ("minReplicas", "maxReplicas")
            if group.get(name) != target[name]
        ]
        if changes:
            operations += [
                {"op": "test", "path": f"{base}/groupName", "value": group["groupName"]},
                *changes,
            ]
    return operations


def groups_of(spec: PoolSpec) -> tuple[Group, ...]:
    """Return the groups as Ray counts what their workers have."""
    return tuple(
        Group(
            name=group.name,
            gpus_per_worker=group.gpus,
            gpu_memory_bytes=group.gpu_memory_bytes,
            max_workers=group.max_workers,
            min_workers=group.min_workers,
            cpus=_ray_cpus(group),
            memory_bytes=_ray_memory(group),
        )
        for group in spec.groups
    )


def _spec(spec: PoolSpec, defaults: RayDefaults, labels: Mapping[str, str]) -> dict[str, Any]:
    return {
        "rayVersion": spec.ray_version or defaults.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": _autoscaler(spec, defaults),
        **_fault_tolerance(spec, defaults),
        "headGroupSpec": _head(spec, defaults, labels),
        "workerGroupSpecs": [_workers(group, spec, defaults, labels) for group in spec.groups],
    }


def _autoscaler(spec: PoolSpec, defaults: RayDefaults) -> dict[str, Any]:
    """It runs in the head's pod and image, but gets only what is said here."""
    mounts = volume_mounts(spec)
    return {
        "version": "v2",
        "idleTimeoutSeconds": spec.worker_idle_seconds,
        "imagePullPolicy": image_of(spec, defaults)["imagePullPolicy"],
        "resources": AUTOSCALER_RESOURCES,
        "env": environment(spec, {**RAY_ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}),
        "securityContext": container_security(),
        **({"volumeMounts": mounts} if mounts else {}),
    }


def _fault_tolerance(spec: PoolSpec, defaults: RayDefaults) -> dict[str, Any]:
    address = spec.fault_tolerance.redis_address or defaults.redis_address
    if not spec.fault_tolerance.enabled or not address:
        return {}
    options: dict[str, Any] = {"redisAddress": address}
    if defaults.redis_password is not None and not spec.fault_tolerance.redis_address:
        name, key = defaults.redis_password
        options["redisPassword"] = {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
    return {"gcsFaultToleranceOptions": options}


def _head(spec: PoolSpec, defaults: RayDefaults, labels: Mapping[str, str]) -> dict[str, Any]:
    head = spec.head
    # No limit on its CPU: it is idle but for the moments in which it builds applications.
    resources = {
        "requests": {"cpu": head.cpus, "memory": spec.head_memory},
        "limits": {"memory": spec.head_memory},
    }
    pod = _pod("ray-head", resources, spec, defaults)
    return {
        "rayStartParams": {
            "num-cpus": "0",
            "dashboard-host": "0.0.0.0",  # noqa: S104 - the operator calls it from another pod
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "template": _template(merged(pod, head.pod_overrides), labels),
    }


def _workers(
    group: WorkerGroup, spec: PoolSpec, defaults: RayDefaults, labels: Mapping[str, str]
) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": group.cpus, "memory": group.memory}
    if group.gpus:
        amounts[group.gpu_resource] = str(group.gpus)
    pod = _pod("ray-worker", {"requests": amounts, "limits": amounts}, spec, defaults)
    pod["automountServiceAccountToken"] = False
    if group.node_selector:
        pod["nodeSelector"] = dict(group.node_selector)
    if group.tolerations:
        pod["tolerations"] = [on_wire(toleration) for toleration in group.tolerations]
    parameters = {
        "num-cpus": str(_ray_cpus(group)),
        "num-gpus": str(group.gpus),
        "memory": str(_ray_memory(group)),
        "object-store-memory": str(OBJECT_STORE_BYTES),
        # KubeRay passes it through a shell; Ray's autoscaler takes the outer quotes and backslashes off.
        "resources": '"' + json.dumps({group_resource(group.name): WORKER_UNITS}).replace('"', '\\"') + '"',
    }
    return {
        "groupName": group.name,
        "replicas": group.min_workers,
        "minReplicas": group.min_workers,
        "maxReplicas": group.max_workers,
        "rayStartParams": parameters,
        "template": _template(merged(pod, group.pod_overrides), labels),
    }


def _template(pod: dict[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    return {**({"metadata": {"labels": dict(labels)}} if labels else {}), "spec": pod}


def _pod(
    container: str, resources: Mapping[str, Any], spec: PoolSpec, defaults: RayDefaults
) -> dict[str, Any]:
    """Return the pod's spec. Ray's container is the first, as KubeRay wants it."""
    variables = {
        **RAY_ENVIRONMENT,
        **_queue_variables(defaults),
        **{item["name"]: item["value"] for item in weights_environment(spec)},
    }
    all_volumes, mounts = [*volumes(spec), *_queue_volume(defaults)], volume_mounts(spec)
    if _queue_volume(defaults):
        mounts.append({"name": QUEUE_VOLUME, "mountPath": QUEUE_FOLDER, "readOnly": True})
    if spec.shared_memory:
        shared = {"medium": "Memory", "sizeLimit": spec.shared_memory}
        all_volumes.append({"name": SHARED_MEMORY_VOLUME, "emptyDir": shared})
        mounts.append({"name": SHARED_MEMORY_VOLUME, "mountPath": "/dev/shm"})  # noqa: S108
    return {
        **pull_secrets(spec),
        "enableServiceLinks": False,
        "securityContext": pod_security(spec),
        "containers": [
            {
                "name": container,
                **image_of(spec, defaults),
                "env": [{"name": name, "value": value} for name, value in variables.items()],
                "resources": dict(resources),
                "securityContext": container_security(),
                # KubeRay deletes a head that ended, and its log with it: the Pool's status is where it stays.
                "terminationMessagePolicy": "FallbackToLogsOnError",
                **({"volumeMounts": mounts} if mounts else {}),
            }
        ],
        **({"volumes": all_volumes} if all_volumes else {}),
    }


def _queue_variables(defaults: RayDefaults) -> dict[str, str]:
    """Say where the queue is: what Serve stores then names only the variable. The head needs it too: Serve's
    controller asks for the queue's depths."""
    url = {REDIS_VARIABLE: defaults.queue_url} if defaults.queue_url else {}
    return url | ({REDIS_FOLDER_VARIABLE: QUEUE_FOLDER} if _queue_volume(defaults) else {})


def _queue_volume(defaults: RayDefaults) -> list[dict[str, Any]]:
    """The queue's password, or whole URL, as a file: the kubelet writes a changed Secret into it, and whoever
    connects anew reads it. No pod is restarted for that."""
    held = {URL_FILE: defaults.queue_url_secret, PASSWORD_FILE: defaults.queue_password_secret}
    sources = [
        {"secret": {"name": found[0], "items": [{"key": found[1], "path": path}]}}
        for path, found in held.items()
        if found is not None
    ]
    return [{"name": QUEUE_VOLUME, "projected": {"sources": sources}}] if sources else []


def _ray_cpus(group: WorkerGroup) -> int:
    """Ray and its autoscaler count whole CPUs."""
    return max(1, math.floor(group.cpu_cores))


def _ray_memory(group: WorkerGroup) -> int:
    """Return the bytes of a worker's memory that replicas may reserve."""
    size = group.memory_bytes
    return max(size // 2, size - RAY_PROCESSES_BYTES - OBJECT_STORE_BYTES)
