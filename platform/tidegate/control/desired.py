"""Revisions of models, and the records of them that last from one decision to the next. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from tidegate.control.observed import SourceState
from tidegate.control.packing import Placement
from tidegate.control.resources import ModelSpec
from tidegate.control.rollout_state import Pin, RolloutState
from tidegate.messages.registry import RevisionReport
from tidegate.messages.rollouts import Action
from tidegate.sources.facts import DecoderShape, StoredWeights

REVISION_DIGITS = 10
WHOLE = 100  # the shares of a model's traffic sum to it
# The fields of a spec that need a new replica. All others change in place.
REVISION_FIELDS = (
    "source",
    "task",
    "engine",
    "precision",
    "quantization",
    "contextLength",
    "device",
    "resources",
)


class RevisionRecord(msgspec.Struct, frozen=True):
    """One revision that was decided on. JSON in the host's store.

    `spec` as on the wire: it keeps an old revision alive after its file has changed. `attempt_at` is when
    the current try began (unix seconds; 0: none runs), `failures` counts tries that failed in a row,
    `retry_at` when the next may begin. `placement` is where its replicas run in a cluster; it stays there.
    `waits_since` is when a replica that it must have found no room (0: it does not wait).
    """

    revision: str
    spec: dict[str, Any]
    checkpoint: str = ""
    weights_bytes: int = 0
    quantization: str = ""
    precision: str = ""
    proof: RevisionReport | None = None
    attempt_at: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    reason: str = ""  # of the last failure
    message: str = ""
    retired_at: float = 0.0  # when another revision took its traffic
    shape: DecoderShape = DecoderShape()
    stored_weights: StoredWeights = StoredWeights()
    placement: Placement | None = None
    waits_since: float = 0.0

    @property
    def is_proved(self) -> bool:
        return self.proof is not None

    @property
    def group(self) -> str:
        """The group of workers that its replicas run in; empty on one machine, or without a place."""
        return self.placement.group if self.placement is not None else ""

    @property
    def source(self) -> SourceState:
        """The resolved source."""
        return SourceState(
            "resolved",
            self.checkpoint,
            self.weights_bytes,
            self.quantization,
            self.precision,
            shape=self.shape,
            weights=self.stored_weights,
        )


class ModelRecord(msgspec.Struct, frozen=True):
    """The record of one model. `weights` shares its traffic out among revisions; empty: none has proved
    itself yet. `rollout` is the one under way, or the last; `acted` the last action that was taken up, which
    is taken up once; `pinned` an undo."""

    name: str
    created: int
    weights: dict[str, int] = {}
    revisions: dict[str, RevisionRecord] = {}
    rollout: RolloutState | None = None
    acted: Action | None = None
    pinned: Pin | None = None

    @property
    def serving(self) -> tuple[RevisionRecord, ...]:
        """The revisions that take traffic, the largest share first."""
        shares = sorted(self.weights.items(), key=lambda item: -item[1])
        return tuple(self.revisions[name] for name, _ in shares if name in self.revisions)

    @property
    def lead(self) -> RevisionRecord | None:
        """The revision with the largest share, else the newest; None: none is recorded."""
        return next(iter(self.serving), None) or next(reversed(self.revisions.values()), None)

    def with_revision(self, kept: RevisionRecord) -> ModelRecord:
        return replace(self, revisions={**self.revisions, kept.revision: kept})


def traffic_of(stored: Mapping[str, Any]) -> dict[str, int]:
    """Return the traffic table of a stored record. The version before stored one name, `serving`, which took
    everything."""
    if (weights := stored.get("weights")) is not None:
        return dict(weights)
    return {stored["serving"]: WHOLE} if stored.get("serving") else {}


def revision_of(spec: ModelSpec) -> str:
    """Ten hex digits over what needs a new replica; equal specs give equal revisions everywhere."""
    wire = spec.model_dump(mode="json", by_alias=True)
    chosen = {name: wire[name] for name in REVISION_FIELDS}
    text = json.dumps(chosen, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:REVISION_DIGITS]


def spec_on_wire(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", by_alias=True)


def recorded_spec(record: RevisionRecord, current: ModelSpec | None) -> ModelSpec:
    """Return the spec that an application of this revision runs with: its own, with today's scaling and
    queue."""
    spec = ModelSpec.model_validate(record.spec)
    if current is None:
        return spec
    return spec.model_copy(update={"scaling": current.scaling, "queue": current.queue})
