"""The pods of a pool have this in common: image, volumes, environment, rights. Pure.

Ray's pods and the Jobs that resolve sources are made of the same parts, so that a checkpoint lies at the same
path wherever it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tidegate.control.pool_schema import PoolSpec

WEIGHTS_FOLDER = "/var/lib/tidegate/weights"
WEIGHTS_VOLUME = "tidegate-weights"
QUEUE_FOLDER = "/etc/tidegate/queue"
QUEUE_VOLUME = "tidegate-queue"
SHARED_MEMORY_VOLUME = "tidegate-shared-memory"
USER_ID = 1000  # of the Ray image; also the group that a claim's files are given to

POOL_LABEL = "tidegate.dev/pool"
GENERATION_LABEL = "tidegate.dev/generation"
MODEL_LABEL = "tidegate.dev/model"
REVISION_LABEL = "tidegate.dev/revision"


@dataclass(frozen=True, slots=True)
class RayDefaults:
    """Defaults of what a Pool leaves open. `redis_address` is that of the Redis in which Ray's head keeps its
    state ("redis://host:6379"; empty: none), `redis_password` the (Secret, key) of its password, where it has
    one. `queue_url` is where replicas find the queue, without a password; that, or the whole URL, is in a
    (Secret, key).
    """

    image: str
    ray_version: str
    redis_address: str = ""
    redis_password: tuple[str, str] | None = None
    queue_url: str = ""
    queue_url_secret: tuple[str, str] | None = None
    queue_password_secret: tuple[str, str] | None = None


def common_labels(component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "tidegate",
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/managed-by": "tidegate-operator",
    }


def image_of(spec: PoolSpec, defaults: RayDefaults) -> dict[str, str]:
    """Return the image fields of a container."""
    return {"image": spec.image or defaults.image, "imagePullPolicy": spec.image_pull_policy}


def pull_secrets(spec: PoolSpec) -> dict[str, Any]:
    """Return the pod's fields for pulling its image."""
    names = [{"name": secret.name} for secret in spec.image_pull_secrets]
    return {"imagePullSecrets": names} if names else {}


def weights_environment(spec: PoolSpec) -> list[dict[str, str]]:
    """Say where huggingface_hub keeps its files, and what a person set beside it."""
    ours = {"PYTHONDONTWRITEBYTECODE": "1"}
    if spec.weight_cache is not None:
        ours["HF_HOME"] = f"{WEIGHTS_FOLDER}/huggingface"
    return environment(spec, ours)


def environment(spec: PoolSpec, ours: Mapping[str, str]) -> list[dict[str, str]]:
    """`ours`, with the Pool's own variables over it."""
    return [
        {"name": name, "value": value}
        for name, value in {**ours, **{item.name: item.value for item in spec.env}}.items()
    ]


def volumes(spec: PoolSpec) -> list[dict[str, Any]]:
    return [*_weight_volume(spec), *(on_wire(volume) for volume in spec.volumes)]


def volume_mounts(spec: PoolSpec) -> list[dict[str, Any]]:
    ours = [{"name": WEIGHTS_VOLUME, "mountPath": WEIGHTS_FOLDER}] if spec.weight_cache is not None else []
    return [*ours, *(on_wire(mount) for mount in spec.volume_mounts)]


def uses_node_paths(spec: PoolSpec) -> bool:
    """Tell whether pods mount folders of their node, which Pod Security `restricted` refuses in any case."""
    return any("hostPath" in volume for volume in volumes(spec))


def pod_security(spec: PoolSpec) -> dict[str, Any]:
    """A pod's `securityContext`. With node paths the image's own user stays: only it may know who owns what
    lies there."""
    profile = {"seccompProfile": {"type": "RuntimeDefault"}}
    if uses_node_paths(spec):
        return profile
    return {
        **profile,
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
    }


def container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def claim_folder(spec: PoolSpec, claim: str) -> str:
    """Return where the pool's pods mount this PersistentVolumeClaim; empty where they do not."""
    named = {
        volume["name"]: volume["persistentVolumeClaim"].get("claimName")
        for volume in volumes(spec)
        if "persistentVolumeClaim" in volume
    }
    for mount in volume_mounts(spec):
        if named.get(mount["name"]) == claim:
            return str(mount["mountPath"])
    return ""


def merged(base: Any, over: Any) -> Any:
    """`over` laid onto `base`: mappings key by key, lists of named things name by name, all else replaced."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {
            **base,
            **{key: merged(base[key], value) if key in base else value for key, value in over.items()},
        }
    if _are_named(base) and _are_named(over):
        by_name = {item["name"]: item for item in base}
        for item in over:
            by_name[item["name"]] = merged(by_name.get(item["name"], {}), item)
        return list(by_name.values())
    return over


def on_wire(part: BaseModel) -> dict[str, Any]:
    """Return a part of a pod as Kubernetes takes it, without what is empty, whether it was written or not."""
    written = part.model_dump(mode="json", by_alias=True)
    return {name: value for name, value in written.items() if value not in (None, "")}


def _weight_volume(spec: PoolSpec) -> list[dict[str, Any]]:
    cache = spec.weight_cache
    if cache is None:
        return []
    if cache.claim:
        return [{"name": WEIGHTS_VOLUME, "persistentVolumeClaim": {"claimName": cache.claim}}]
    node_path = {"path": cache.host_path, "type": "DirectoryOrCreate"}
    return [{"name": WEIGHTS_VOLUME, "hostPath": node_path}]


def _are_named(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and "name" in item for item in value)
    )
