"""The contents of the registry: models, statistics and proofs of replicas, keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from tidegate.messages.queue import QueueLimits


class ReplicaStats(msgspec.Struct, frozen=True):
    """A replica's statistics, published every second or two. JSON in the registry."""

    replica: str
    model: str
    revision: str
    pid: int
    node: str
    started: float
    updated: float
    slots: int
    running: int
    tokens_total: int
    tokens_per_second: float  # generated, over the last few seconds
    draining: bool = False
    idle_since: float = 0.0  # since when it has no request (unix seconds); 0: it has some


class RevisionReport(msgspec.Struct, frozen=True):
    """The outcome of a revision's newest replica start: its proof, or why there is none. JSON in the
    registry; the control loop turns it into conditions. `Ready` needs `proved`."""

    model: str
    revision: str
    at: float
    proved: bool
    reason: str = ""  # CamelCase, set where not proved: WeightsMissing, OutOfMemory, SelfCheckFailed, ...
    message: str = ""
    notes: list[str] = []  # what is worth knowing though it serves: fallbacks, unexpected weights
    load_seconds: float = 0.0
    weights_bytes: int = 0
    kv_bytes_per_token: int = 0
    slots: int = 0
    context_length: int = 0
    precision: str = ""
    device: str = ""
    process_seconds: float = 0.0  # from the start of the replica's process to that of the load


class Parked(msgspec.Struct, frozen=True):
    """Where the weights of a revision that sleeps are kept in host memory: `bytes` on `node`, by the process
    `pid`; 0 bytes: nowhere, and `message` says why. JSON in the registry, where it vanishes soon after its
    holder."""

    model: str
    revision: str
    node: str
    pid: int
    bytes: int
    message: str = ""


class Condition(msgspec.Struct, frozen=True):
    """metav1.Condition; times are RFC 3339 in UTC."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    observedGeneration: int = 0  # noqa: N815 - the Kubernetes name
    lastTransitionTime: str = ""  # noqa: N815


class ModelEntry(msgspec.Struct, frozen=True):
    """One model as gateways and the CLI see it. JSON in the registry, written by the host's reconcile only.

    `revisions` maps revision to traffic weight; empty: nothing can serve yet. During a rollout its target
    stands first. `accepts` False: new requests are refused (503) with `reason` and `message`.

    `cohort` is the label of requests that are admitted now; `shadow` the revision that also gets a copy of
    `shadow_share` of 100 of them.
    """

    name: str
    created: int
    task: str
    engine: str
    precision: str
    quantization: str
    revisions: dict[str, int]
    accepts: bool
    ready: bool
    reason: str
    message: str
    context_length: int = 0
    limits: QueueLimits = QueueLimits()
    replicas_ready: int = 0
    replicas_wanted: int = 0
    weights_bytes: int = 0
    wake_seconds: float = 0.0  # from the decision to wake to a loaded replica, as last measured; 0: not known
    slots: int = 0  # of one replica; 0: not known yet
    conditions: list[Condition] = []
    parks: list[str] = []  # revisions whose weights stay in host memory while they sleep
    # While a revision is rolled out:
    cohort: str = ""  # on all requests that are admitted now (`messages.outcomes`)
    shadow: str = ""  # the revision that gets copies of requests
    shadow_share: int = 0  # of so many in a hundred calls


# inference: ask models at a gateway. admin: the control API, all of it. read: its GETs.
Scope = Literal["inference", "admin", "read"]


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as stored: never the secret itself. One stored before there were scopes asks models."""

    id: str
    name: str
    tenant: str
    created: float
    revoked: float | None = None
    prefix: str = ""  # first characters of the secret, to recognise it by
    scopes: tuple[Scope, ...] = ("inference",)
