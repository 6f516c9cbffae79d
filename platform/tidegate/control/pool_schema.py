"""`Pool`: the machines that run replicas. On a laptop the one local Ray, in a cluster one Ray cluster.

A field whose description begins with "Cluster:" is taken everywhere and acts in a cluster only.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from tidegate.control.schema_types import (
    LABEL,
    SERVICE_LABEL,
    SUBDOMAIN,
    Bytes,
    BytesOrEmpty,
    Cores,
    ObjectName,
    Open,
    PoolName,
    Rule,
    Strict,
    cpu_cores,
    keyed_by,
    refuse_repeats,
    rules,
    size_bytes,
)

DEFAULT_GROUP = "cpu"
MAX_GROUPS = 16
# Bounds keep a Pool far below what etcd takes and the API server's rules within their budget.
_LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
_RESOURCE = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_IMAGE = r"^([A-Za-z0-9][A-Za-z0-9._:/@-]*)?$"
_VERSION = r"^([0-9]{1,4}[.][0-9]{1,4}[.][0-9]{1,4})?$"
_NODE_PATH = r"^(/[A-Za-z0-9._/-]+)?$"
_REDIS_ADDRESS = r"^((rediss?://)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?:[0-9]{1,5})?$"
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"

LabelKey = Annotated[str, Field(pattern=_LABEL_KEY, max_length=317)]
LabelValue = Annotated[str, Field(pattern=_LABEL_VALUE, max_length=63)]
# Nothing here reads what an override says, so only its breadth can be bounded.
Overrides = Annotated[dict[str, Any], Field(max_length=64)]


class LocalReference(Strict):
    """Another object in the same namespace."""

    name: ObjectName = Field(description="Name of the object, in the same namespace.")


class Toleration(Strict):
    """A taint that pods of a group may ignore, as in a pod's own tolerations."""

    key: str = Field(
        default="", max_length=317, description="Key of the taint; empty, with operator Exists: every key."
    )
    operator: Literal["Equal", "Exists"] = Field(
        default="Equal", description="Equal compares the taint's value, Exists takes any."
    )
    value: LabelValue = Field(default="", description="Value of the taint, for operator Equal.")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        default="", description="Effect of the taint; empty: every effect."
    )
    toleration_seconds: int | None = Field(
        default=None,
        ge=0,
        le=1 << 31,
        description="Seconds that a pod stays after the taint came, for effect NoExecute; unset: for good.",
    )

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "self.key != '' || self.operator == 'Exists'",
                "a toleration without a key needs operator Exists",
                ".operator",
            ),
            Rule(
                "self.operator == 'Equal' || self.value == ''",
                "operator Exists takes no value",
                ".value",
            ),
        )
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.key and self.operator == "Equal":
            raise ValueError("operator: a toleration without a key needs operator Exists")
        if self.value and self.operator == "Exists":
            raise ValueError("value: operator Exists takes no value")
        return self


# A head's own processes; each application that Serve builds, in a process of its own; each that stands. Of
# a real head: 1 GB empty, 1.4 GB more with 60 that stand, 0.5 GB more while four of 40 were built at a time.
HEAD_BYTES = 1280 << 20
UNBUILT_BYTES = 256 << 20
REVISION_BYTES = 28 << 20


class Head(Strict):
    """The pod of the Ray head: Serve's controller and the Ray state. It runs no replicas."""

    cpus: Cores = Field(
        default="1",
        description="Cluster: CPU cores of the head's pod (a quantity: 2, 500m). Ray gives a head 30 seconds "
        "to start, of which it computes some 10: with less than 500m it may not come up on a full node.",
    )
    memory: BytesOrEmpty = Field(
        default="",
        description="Cluster: memory of the head's pod (a quantity); empty: what maxLiveRevisions and "
        "maxUnbuilt need, 4Gi by default.",
    )
    pod_overrides: Overrides = Field(
        default_factory=dict,
        description="Cluster: merged into the head pod's spec; unknown fields are Kubernetes' to refuse.",
    )

    @property
    def cpu_cores(self) -> float:
        return cpu_cores(self.cpus)

    @property
    def memory_bytes(self) -> int:
        """0: it follows from the Pool's bounds."""
        return size_bytes(self.memory)


class WorkerGroup(Strict):
    """Like workers: one machine type, one accelerator. The autoscaler moves their number within bounds."""

    name: str = Field(
        pattern=SERVICE_LABEL,
        min_length=1,
        max_length=30,
        description="What spec.resources.accelerator of a Model says: a letter, then lower-case letters, "
        "digits and '-'.",
    )
    gpus: int = Field(default=0, ge=0, le=16, description="Cluster: GPUs of each worker.")
    gpu_memory: BytesOrEmpty = Field(
        default="",
        description="Cluster: memory of one GPU (a quantity: 80Gi), by which replicas are packed; "
        "needed with gpus.",
    )
    gpu_resource: str = Field(
        default="nvidia.com/gpu",
        pattern=_RESOURCE,
        max_length=317,
        description="Cluster: the resource under which the nodes' device plugin offers the GPUs.",
    )
    cpus: Cores = Field(default="1", description="Cluster: CPU cores of each worker (a quantity: 2, 500m).")
    memory: Bytes = Field(default="4Gi", description="Cluster: host memory of each worker (a quantity).")
    min_workers: int = Field(
        default=0, ge=0, le=1000, description="Cluster: workers kept also without replicas."
    )
    max_workers: int = Field(default=1, ge=1, le=1000, description="Cluster: workers at most.")
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] = Field(
        default_factory=dict,
        description="Cluster: labels of the nodes that may hold these workers.",
        json_schema_extra=rules(
            Rule(
                f"self.all(key, key.matches('{_LABEL_KEY}'))",
                "nodeSelector has a key that is no label name",
            )
        ),
    )
    tolerations: tuple[Toleration, ...] = Field(
        default=(), max_length=16, description="Cluster: taints that these workers tolerate."
    )
    pod_overrides: Overrides = Field(
        default_factory=dict,
        description="Cluster: merged into the worker pod's spec; unknown fields are Kubernetes' to refuse.",
    )

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule("self.minWorkers <= self.maxWorkers", "minWorkers is above maxWorkers", ".minWorkers"),
            Rule(
                "self.gpus == 0 || self.gpuMemory != ''",
                "gpuMemory is missing; a group with gpus needs it, replicas are packed by it",
                ".gpuMemory",
            ),
            Rule(
                "self.gpus > 0 || self.gpuMemory == ''",
                "gpuMemory says nothing for a group without gpus; remove it or set gpus",
                ".gpuMemory",
            ),
        )
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"minWorkers ({self.min_workers}) is above maxWorkers ({self.max_workers})")
        if self.gpus and not self.gpu_memory:
            raise ValueError("gpuMemory is missing; a group with gpus needs it, replicas are packed by it")
        if self.gpu_memory and not self.gpus:
            raise ValueError("gpuMemory says nothing for a group without gpus; remove it or set gpus")
        return self

    @property
    def gpu_memory_bytes(self) -> int:
        return size_bytes(self.gpu_memory)

    @property
    def cpu_cores(self) -> float:
        return cpu_cores(self.cpus)

    @property
    def memory_bytes(self) -> int:
        return size_bytes(self.memory)


class WeightCache(Strict):
    """The place where downloaded checkpoints stay, for every pod of the Pool."""

    claim: str = Field(
        default="",
        pattern=f"{SUBDOMAIN[:-1]}$|^$",
        max_length=253,
        description="Cluster: a PersistentVolumeClaim in the Pool's namespace.",
    )
    host_path: str = Field(
        default="",
        pattern=_NODE_PATH,
        max_length=1024,
        description="Cluster: a folder of each node. Pod Security 'restricted' forbids it: such a Pool needs "
        "a namespace of its own.",
        json_schema_extra=rules(
            Rule("!self.contains('..')", "hostPath has '..'; write the folder's own path")
        ),
    )

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule("(self.claim == '') != (self.hostPath == '')", "weightCache needs one of claim and hostPath")
        )
    )

    @field_validator("host_path")
    @classmethod
    def _no_way_up(cls, path: str) -> str:
        if ".." in path:
            raise ValueError("hostPath has '..'; write the folder's own path")
        return path

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.claim) == bool(self.host_path):
            raise ValueError("weightCache needs one of claim and hostPath")
        return self


class Volume(Open):
    """A volume as in a pod's spec."""

    name: str = Field(
        pattern=LABEL, min_length=1, max_length=63, description="What volumeMounts call this volume."
    )


class VolumeMount(Open):
    """A volume's place in the containers, as in a container's spec."""

    name: str = Field(
        pattern=LABEL, min_length=1, max_length=63, description="Which of spec.volumes is mounted."
    )
    mount_path: str = Field(
        pattern=r"^/[^:]*$", max_length=1024, description="Folder in the containers of every Ray pod."
    )


class Variable(Strict):
    """An environment variable of every Ray container."""

    name: str = Field(
        pattern=_VARIABLE,
        min_length=1,
        max_length=128,
        description="Name of the variable: letters, digits and '_'.",
    )
    value: str = Field(
        default="",
        max_length=4096,
        description="Its value, as it stands. Secrets belong into a Model's spec.source.secretRef.",
    )


class FaultTolerance(Strict):
    """Ray's own state in a Redis, so that workers and replicas live on while the head is away."""

    enabled: bool = Field(
        default=True,
        description="Cluster: keep Ray's state in a Redis. Without it a lost head takes its workers along.",
    )
    redis_address: str = Field(
        default="",
        pattern=_REDIS_ADDRESS,
        max_length=300,
        description="Cluster: host:port, redis://host:port or rediss://host:port of that Redis, which must "
        "not be the queue's; empty: the operator's.",
    )


class PoolSpec(Strict):
    max_live_revisions: int = Field(
        default=60, ge=1, le=200, description="Model revisions that may stand at once, old and new together."
    )
    max_unbuilt: int = Field(
        default=4,
        ge=1,
        le=4,
        description="Applications that Ray Serve builds at once; each takes a process and memory meanwhile.",
    )
    image: str = Field(
        default="",
        pattern=_IMAGE,
        max_length=512,
        description="Cluster: image of every Ray pod; it holds Ray and tidegate. Empty: the operator's.",
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="Cluster: when nodes pull the image."
    )
    image_pull_secrets: tuple[LocalReference, ...] = Field(
        default=(),
        max_length=8,
        description="Cluster: Secrets with which nodes pull the image.",
        json_schema_extra=keyed_by("name"),
    )
    ray_version: str = Field(
        default="",
        pattern=_VERSION,
        max_length=14,
        description="Cluster: the Ray version in the image, for KubeRay; empty: the operator's.",
    )
    head: Head = Field(default=Head(), description="Cluster: the Ray head's pod.")
    groups: tuple[WorkerGroup, ...] = Field(
        default=(WorkerGroup.model_validate({"name": DEFAULT_GROUP, "maxWorkers": 4}),),
        min_length=1,
        max_length=MAX_GROUPS,
        description="Cluster: worker groups, one per machine type; each replica runs in one of them.",
        json_schema_extra=keyed_by("name"),
    )
    shared_memory: Bytes = Field(
        default="512Mi",
        description="Cluster: /dev/shm of every Ray pod (a quantity), for Ray's object store. It counts as "
        "the pod's memory.",
    )
    weight_cache: WeightCache | None = Field(
        default=None,
        description="Cluster: where downloaded checkpoints stay; hf://, s3:// and gs:// sources need one.",
    )
    volumes: tuple[Volume, ...] = Field(
        default=(),
        max_length=16,
        description="Cluster: volumes of every Ray pod, as in a pod's spec.",
        json_schema_extra=keyed_by("name"),
    )
    volume_mounts: tuple[VolumeMount, ...] = Field(
        default=(),
        max_length=16,
        description="Cluster: where the volumes lie in every Ray container, as in a container's spec.",
        json_schema_extra=keyed_by("mountPath"),
    )
    env: tuple[Variable, ...] = Field(
        default=(),
        max_length=64,
        description="Cluster: environment variables of every Ray container.",
        json_schema_extra=keyed_by("name"),
    )
    worker_idle_seconds: int = Field(
        default=60, ge=1, le=86_400, description="Cluster: seconds without a replica before a worker goes."
    )
    upgrade: Literal["Surge", "Recreate"] = Field(
        default="Surge",
        description="Cluster: how a change that needs new pods comes. Surge: a second Ray cluster beside the "
        "first, Models move over. Recreate: the first goes before, requests wait meanwhile.",
    )
    fault_tolerance: FaultTolerance = Field(
        default=FaultTolerance(), description="Cluster: whether Ray outlives the loss of its head."
    )

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.volumeMounts) || self.volumeMounts.all(mount, has(self.volumes) && "
                "self.volumes.exists(volume, volume.name == mount.name))",
                "volumeMounts names a volume that volumes does not have",
                ".volumeMounts",
            )
        )
    )

    @field_validator("groups")
    @classmethod
    def _groups_differ(cls, groups: tuple[WorkerGroup, ...]) -> tuple[WorkerGroup, ...]:
        refuse_repeats([group.name for group in groups], "group name")
        return groups

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        refuse_repeats([secret.name for secret in self.image_pull_secrets], "imagePullSecrets name")
        refuse_repeats([volume.name for volume in self.volumes], "volumes name")
        refuse_repeats([mount.mount_path for mount in self.volume_mounts], "volumeMounts mountPath")
        refuse_repeats([variable.name for variable in self.env], "env name")
        unknown = {mount.name for mount in self.volume_mounts} - {volume.name for volume in self.volumes}
        if unknown:
            raise ValueError(f"volumeMounts names {sorted(unknown)}, which volumes does not have")
        return self

    @property
    def head_memory(self) -> str:
        """The quantity that the head's pod gets. Whole GiB, so that few changes of a bound need a new pod."""
        if self.head.memory:
            return self.head.memory
        size = HEAD_BYTES + self.max_unbuilt * UNBUILT_BYTES + self.max_live_revisions * REVISION_BYTES
        return f"{math.ceil(size / 2**30)}Gi"


class PoolMetadata(Strict):
    name: PoolName


class Pool(Strict):
    """The machines, in a cluster one Ray cluster, that run replicas of models."""

    api_version: Literal["tidegate.dev/v1alpha1"]
    kind: Literal["Pool"]
    metadata: PoolMetadata
    spec: PoolSpec = Field(default=PoolSpec(), description="What the Pool should be.")

    @property
    def name(self) -> str:
        return self.metadata.name
