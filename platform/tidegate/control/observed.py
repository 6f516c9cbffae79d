"""What the control loop sees: plain values that its host gathers before each decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tidegate.messages import ModelEntry, ReplicaStats, RevisionReport

# Once Serve says one of these, the process that built the application is gone.
BUILT_STATUSES = frozenset({"RUNNING", "DEPLOY_FAILED", "UNHEALTHY"})

RevisionKey = tuple[str, str]  # (model, revision)


@dataclass(frozen=True, slots=True)
class ReplicaState:
    replica: str
    state: str  # STARTING, UPDATING, RUNNING, STOPPING, PENDING_MIGRATION
    pid: int | None
    node: str


@dataclass(frozen=True, slots=True)
class ApplicationState:
    """One application as Serve reports it. `config` is the part of the last PUT that describes it."""

    name: str
    status: str  # NOT_STARTED, DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED, DELETING
    message: str = ""
    config: Mapping[str, Any] | None = None
    wanted_replicas: int = 0
    replicas: tuple[ReplicaState, ...] = ()
    deployment_message: str = ""

    @property
    def is_built(self) -> bool:
        return self.status in BUILT_STATUSES

    @property
    def ready_replicas(self) -> int:
        return sum(replica.state == "RUNNING" for replica in self.replicas)


@dataclass(frozen=True, slots=True)
class ServeState:
    """What Serve reports. `controller` is empty while no Serve controller runs."""

    controller: str = ""
    applications: Mapping[str, ApplicationState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceState:
    """How far the look at one source is. `checkpoint` is a local folder; `weights_bytes` as on disk."""

    state: Literal["resolving", "resolved", "failed"]
    checkpoint: str = ""
    weights_bytes: int = 0
    quantization: str = ""
    precision: str = ""
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the pool's largest machine has. 0 bytes of memory: not known."""

    cpus: float
    gpus: float
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class QueueDepth:
    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class Observation:
    """One snapshot. `serve` is None while Serve does not answer, `serve_problem` says why or what it
    refused. Depths are given for every revision that is recorded; one that is missing is not known."""

    serve: ServeState | None
    serve_problem: tuple[str, str] | None = None  # (reason, sentence)
    sources: Mapping[str, SourceState] = field(default_factory=dict)  # by URI
    reports: Mapping[RevisionKey, RevisionReport] = field(default_factory=dict)
    replicas: tuple[ReplicaStats, ...] = ()
    depths: Mapping[RevisionKey, QueueDepth] = field(default_factory=dict)
    entries: Mapping[str, ModelEntry] = field(default_factory=dict)  # as last published
    capacity: Capacity = Capacity(cpus=1024, gpus=64)
