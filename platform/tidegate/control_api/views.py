"""What the control API says and is told, as JSON. Names are snake_case; a spec is as resources write it."""

from __future__ import annotations

from typing import Any

import msgspec

from tidegate.messages.administration import AuditEntry
from tidegate.messages.registry import Condition, Key, ModelEntry, ReplicaStats, Scope
from tidegate.messages.rollouts import Action, RevisionView, RolloutView, Verb


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body of a call."""


class SpecBody(Body, frozen=True):
    """The whole spec that a Model should have, decided on while it was at `resource_version`."""

    spec: dict[str, Any]
    resource_version: str


class ActionBody(Body, frozen=True):
    """`revision` is undo's goal; empty: the one before."""

    verb: Verb
    revision: str = ""


class ScaleBody(Body, frozen=True):
    """The bounds to change. Without `resource_version` those of the Model as it is now."""

    min_replicas: int | None = None
    max_replicas: int | None = None
    resource_version: str = ""


class DrainBody(Body, frozen=True):
    """`drain` False ends it."""

    drain: bool = True


class KeyBody(Body, frozen=True):
    name: str
    tenant: str = "default"
    scopes: tuple[Scope, ...] = ("inference",)


class ModelView(msgspec.Struct, frozen=True):
    """A Model as it should be (`spec`) and as gateways read it (`entry`; None: not yet).

    `is_observed`: the controller has decided on this spec, so what `entry` and `rollout` say is of it.
    `is_overlaid`: on a laptop the spec is not the file's, because of what was asked here. `action` has not
    been acted on yet. `drains`: it takes no new requests. `pinned`: the revision that an undo put in the
    place of the spec's, until the spec is another.
    """

    name: str
    namespace: str  # empty on a laptop
    pool: str
    resource_version: str
    spec: dict[str, Any]
    is_observed: bool = False
    is_overlaid: bool = False
    drains: bool = False
    pinned: str = ""
    entry: ModelEntry | None = None
    waiting: int = 0
    running: int = 0
    tokens_per_second: float = 0.0
    replicas: list[ReplicaStats] = []
    rollout: RolloutView | None = None
    action: Action | None = None


class PoolView(msgspec.Struct, frozen=True):
    name: str
    namespace: str  # empty on a laptop
    resource_version: str
    spec: dict[str, Any]
    models: list[str]
    conditions: list[Condition] = []


class RolloutAnswer(msgspec.Struct, frozen=True):
    """The rollout under way, or the last one; None: there was none."""

    rollout: RolloutView | None = None


class PlanView(msgspec.Struct, frozen=True):
    """What the controller would do first, decided by the same function on what stands now.

    `actions` are sentences in their order; none: nothing changes. `refusal` says why the action is not taken
    up. Replicas and GPUs are those of the model
    that stand now, and the most that stand at once by this plan. `conditions` are those that would follow.
    `ends_at` is predicted (unix seconds; 0: nothing can be said).
    """

    model: str
    actions: list[str]
    replicas_now: int
    replicas_peak: int
    gpus_now: float
    gpus_peak: float
    conditions: list[Condition] = []
    rollout: RolloutView | None = None
    refusal: str = ""
    ends_at: float = 0.0


class NewKey(msgspec.Struct, frozen=True):
    """A key and its secret, which nothing can show again."""

    key: Key
    secret: str


class ModelList(msgspec.Struct, frozen=True):
    items: list[ModelView]


class PoolList(msgspec.Struct, frozen=True):
    items: list[PoolView]


class RevisionList(msgspec.Struct, frozen=True):
    """Newest first."""

    items: list[RevisionView]


class KeyList(msgspec.Struct, frozen=True):
    items: list[Key]


class AuditPage(msgspec.Struct, frozen=True):
    """Newest first. `next` is the `before` of the page that follows; empty: there is none."""

    items: list[AuditEntry]
    next: str = ""
