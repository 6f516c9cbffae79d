"""Plain values that a host gathers before each decision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from tidegate.messages.outcomes import Outcomes
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ModelEntry, Parked, ReplicaStats, RevisionReport
from tidegate.sources.facts import DecoderShape, StoredWeights

# Once Serve says one of these, the process that built the application is gone.
BUILT_STATUSES = frozenset({"RUNNING", "DEPLOY_FAILED", "UNHEALTHY"})

RevisionKey = tuple[str, str]  # (model, revision)


def application_name(model: str, revision: str) -> str:
    """Return the name of a revision's application in Serve."""
    return f"{model}--{revision}"


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
    """Serve's report. `controller` is empty while no Serve controller runs."""

    controller: str = ""
    applications: Mapping[str, ApplicationState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceState:
    """One source as far as it is resolved. `checkpoint` is a folder where replicas run; `weights_bytes` as
    on disk, `weights` as loaded; `precision` is what `precision: auto` computes in."""

    state: Literal["resolving", "resolved", "failed"]
    checkpoint: str = ""
    weights_bytes: int = 0
    quantization: str = ""
    precision: str = ""
    reason: str = ""
    message: str = ""
    shape: DecoderShape = field(default_factory=DecoderShape)
    weights: StoredWeights = field(default_factory=StoredWeights)
    commit: str = ""
    digest: str = ""
    is_unasked: bool = False  # nobody looks at it: to be asked again
    task: str = ""  # that the checkpoint is for; empty: of a record of the version before


@dataclass(frozen=True, slots=True)
class Capacity:
    """The capacity of the pool's largest machine. 0 bytes of memory: not known."""

    cpus: float
    gpus: float
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """One group of like workers of a cluster, as Ray counts what they have. `max_workers` times all of it
    is what models can ever be given. `cpus` and `memory_bytes` are one worker's; 0 bytes: not counted."""

    name: str
    gpus_per_worker: int = 0
    gpu_memory_bytes: int = 0
    max_workers: int = 1
    min_workers: int = 0
    cpus: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PodProblem:
    """The reason why a pod does not run, in a sentence with its remedy. `reason` is one of `reasons.Reason`.

    `group` is the worker group that it is in (empty: the head, which concerns every model of the pool);
    `container` is empty where the whole pod is concerned, `pod` where it could not even be made.
    `may_be_idle`: the end of a worker that Ray's autoscaler takes away looks the same.
    """

    pod: str
    container: str
    reason: str
    message: str
    group: str = ""
    may_be_idle: bool = False


@dataclass(frozen=True, slots=True)
class Worker:
    """A pod with workers of a group, by the address that Ray knows it by."""

    pod: str
    address: str
    group: str


@dataclass(frozen=True)
class Observation:
    """One snapshot. `serve` is None while Serve does not answer, `serve_problem` says why. Depths are given
    for every revision that is recorded; one that is missing is not known.

    `groups` are a cluster's; without any (on one machine) `capacity` alone decides what fits. `rejected`
    maps the names of applications that Serve refused last to its words (`ServeWriter.rejected`). `outcomes`
    are read of revisions that a rollout compares.
    """

    serve: ServeState | None
    serve_problem: tuple[str, str] | None = None  # (reason, sentence)
    sources: Mapping[RevisionKey, SourceState] = field(default_factory=dict)
    reports: Mapping[RevisionKey, RevisionReport] = field(default_factory=dict)
    parked: Mapping[RevisionKey, Parked] = field(default_factory=dict)
    replicas: tuple[ReplicaStats, ...] = ()
    depths: Mapping[RevisionKey, Depth] = field(default_factory=dict)
    entries: Mapping[str, ModelEntry] = field(default_factory=dict)  # as last published
    capacity: Capacity = Capacity(cpus=1024, gpus=64)
    groups: tuple[Group, ...] = ()
    workers: tuple[Worker, ...] = ()
    pod_problems: tuple[PodProblem, ...] = ()
    rejected: Mapping[str, str] = field(default_factory=dict)  # by application name
    outcomes: Mapping[RevisionKey, Outcomes] = field(default_factory=dict)

    def application(self, model: str, revision: str) -> ApplicationState | None:
        """Return the revision's application; None where it does not stand, or Serve does not answer."""
        if self.serve is None:
            return None
        return self.serve.applications.get(application_name(model, revision))

    def of_model(self, model: str) -> Sequence[ApplicationState]:
        """Return all applications of a model that stand or go, also those of which nothing is recorded."""
        return self._of_model[model]

    def refusal(self, model: str, revision: str) -> str | None:
        """Return Serve's words where it refused the revision's application last."""
        return self.rejected.get(application_name(model, revision))

    def ready_replicas(self, model: str, revision: str) -> int:
        """Count the replicas that take requests."""
        return len(self.beating(model, revision))

    def beating(self, model: str, revision: str) -> Sequence[ReplicaStats]:
        """Return the statistics of the replicas that take requests."""
        return self._beating[model, revision]

    def unfinished(self, model: str, revisions: Iterable[str]) -> int | None:
        """Count the requests that wait or run; None where one queue's depth is not known."""
        depths = [self.depths.get((model, revision)) for revision in revisions]
        known = [depth.waiting + depth.running for depth in depths if depth is not None]
        return sum(known) if len(known) == len(depths) else None

    @cached_property
    def short_groups(self) -> frozenset[str]:
        """The groups whose next worker finds no node: the workers that run are all their room."""
        return frozenset(item.group for item in self.pod_problems if item.reason == "Unschedulable")

    @cached_property
    def _of_model(self) -> Mapping[str, Sequence[ApplicationState]]:
        found: defaultdict[str, list[ApplicationState]] = defaultdict(list)
        for name, state in (self.serve.applications if self.serve is not None else {}).items():
            found[name.rpartition("--")[0]].append(state)
        return found

    @cached_property
    def _beating(self) -> Mapping[RevisionKey, Sequence[ReplicaStats]]:
        found: defaultdict[RevisionKey, list[ReplicaStats]] = defaultdict(list)
        for stats in self.replicas:
            if not stats.draining:
                found[stats.model, stats.revision].append(stats)
        return found
