"""Revisions of models, and the records of them that last from one decision to the next. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from tidegate.control.observed import RevisionKey, SourceState
from tidegate.control.packing import Placement
from tidegate.control.reasons import Reason
from tidegate.control.resources import FIRST_TASK, NO_ANSWERS, STORED, Model, ModelSpec
from tidegate.control.rollout_state import RolloutState
from tidegate.control.sizing import asked_task
from tidegate.messages.registry import RevisionReport
from tidegate.messages.rollouts import Action
from tidegate.replica_args import Probe
from tidegate.sources.facts import DecoderShape, StoredWeights, contradiction

REVISION_DIGITS = 10
UNCHANGED = "The source holds what it held."
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
    "chatTemplate",
)
# Those that came later are left out of the hash where they are at their default: an upgrade would restart
# every model.
LATER_FIELDS = ("chatTemplate",)


class RevisionRecord(msgspec.Struct, frozen=True):
    """One revision that was decided on. JSON in the host's store.

    `spec` as on the wire: it keeps an old revision alive after its file has changed. `attempt_at` is when
    the current try began (unix seconds; 0: none runs), `failures` counts tries that failed in a row,
    `retry_at` when the next may begin. `placement` is where its replicas run in a cluster; it stays there.
    `waits_since` is when a replica that it must have found no room (0: it does not wait). `spec_hash` is what
    its source was asked by; a record of the version before has none, and is named by it. `created` is unix
    seconds, `cause` what made it another one, `author` who did. `number` counts a model's from 1; 0: it is of
    the version before. `probes` are what its replicas must answer.
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
    spec_hash: str = ""
    commit: str = ""
    digest: str = ""
    created: float = 0.0
    cause: str = ""
    author: str = ""
    number: int = 0
    restarted: float = 0.0  # when fresh replicas were asked for
    probes: list[Probe] = []
    task: str = ""  # of its source

    @property
    def is_proved(self) -> bool:
        return self.proof is not None

    @property
    def group(self) -> str:
        """The group of workers that its replicas run in; empty on one machine, or without a place."""
        return self.placement.group if self.placement is not None else ""

    @property
    def gpus(self) -> float:
        """What one replica takes where it has a place, else what its spec asks for."""
        if self.placement is not None:
            return self.placement.gpus
        return float((self.spec.get("resources") or {}).get("gpus") or 0)

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
            commit=self.commit,
            digest=self.digest,
            task=self.task,
        )

    @property
    def is_named_by_content(self) -> bool:
        """False for one that the version before has named, and for one without a source."""
        return bool(self.digest) and self.spec_hash not in ("", self.revision)

    def is_of(self, spec_hash: str) -> bool:
        """Tell whether it was made from a spec of this hash."""
        return (self.spec_hash or self.revision) == spec_hash

    def with_source(self, found: SourceState) -> RevisionRecord:
        return replace(
            self,
            checkpoint=found.checkpoint,
            weights_bytes=found.weights_bytes,
            quantization=found.quantization,
            precision=found.precision,
            shape=found.shape,
            stored_weights=found.weights,
            commit=found.commit,
            digest=found.digest,
            task=found.task,
        )


class Pin(msgspec.Struct, frozen=True):
    """An undo: `revision` stands instead of what the spec asks for (`instead`), while that has this hash."""

    revision: str
    spec_hash: str
    instead: str = ""


class Look(msgspec.Struct, frozen=True):
    """A look at a source after its first: at what it holds now, or, with a `goal`, at whether it still holds
    what that revision was made from. It ends where the spec is of another hash than this.

    It goes on while `ended` is 0 (unix seconds, as `at`, when it began). `reason` says why it brought
    nothing; empty: it went well.
    """

    spec_hash: str
    at: float
    goal: RevisionRecord | None = None
    author: str = ""
    ended: float = 0.0
    reason: str = ""
    message: str = ""

    @property
    def is_news(self) -> bool:
        """Tell whether somebody waits for what it found, or should know: most that are due find nothing."""
        return bool(self.author or self.goal is not None or self.reason or self.message != UNCHANGED)

    @property
    def key(self) -> str:
        """The name of the question, in the place of a spec's hash."""
        return _digits(f"{self.spec_hash}\0{self.at}\0{self.goal.revision if self.goal is not None else ''}")


class ModelRecord(msgspec.Struct, frozen=True):
    """The record of one model. `weights` shares its traffic out among revisions; empty: none has proved
    itself yet. `revisions` stand in the order in which they became the target, the newest last. `rollout` is
    the one under way, or the last; `acted` the last action that was taken up, which is taken up once;
    `pinned` an undo."""

    name: str
    created: int
    weights: dict[str, int] = {}
    revisions: dict[str, RevisionRecord] = {}
    look: Look | None = None
    pinned: Pin | None = None
    rollout: RolloutState | None = None
    acted: Action | None = None

    @property
    def serving(self) -> tuple[RevisionRecord, ...]:
        """The revisions that take traffic, the largest share first."""
        shares = sorted(self.weights.items(), key=lambda item: -item[1])
        return tuple(self.revisions[name] for name, _ in shares if name in self.revisions)

    @property
    def lead(self) -> RevisionRecord | None:
        """The revision with the largest share, else the newest; None: none is recorded."""
        return next(iter(self.serving), None) or next(reversed(self.revisions.values()), None)

    @property
    def durable(self) -> ModelRecord:
        """It as it is worth storing."""
        return self if self.rollout is None else replace(self, rollout=self.rollout.durable)

    def with_revision(self, kept: RevisionRecord) -> ModelRecord:
        return replace(self, revisions={**self.revisions, kept.revision: kept})

    def with_target(self, kept: RevisionRecord) -> ModelRecord:
        others = {name: other for name, other in self.revisions.items() if name != kept.revision}
        return replace(self, revisions={**others, kept.revision: kept})


def traffic_of(stored: Mapping[str, Any]) -> dict[str, int]:
    """Return the traffic table of a stored record. The version before stored one name, `serving`, which took
    everything."""
    if (weights := stored.get("weights")) is not None:
        return dict(weights)
    return {stored["serving"]: WHOLE} if stored.get("serving") else {}


def revision_of(spec: ModelSpec) -> str:
    """Return the spec's hash: ten hex digits over what needs a new replica. Equal specs give equal hashes
    everywhere; a source is asked for by it, and a model without one has no other name for its revision."""
    return _digits(_content(spec))


def target_of(model: Model, record: ModelRecord, sources: Mapping[RevisionKey, SourceState]) -> str | None:
    """Return the revision that the spec asks for: its hash and the content of its source; None while nobody
    knows that content. What is recorded of this spec is not asked again, so it stays the target, also one
    that the version before has named."""
    spec_hash = revision_of(model.spec)
    recorded = [kept.revision for kept in record.revisions.values() if kept.is_of(spec_hash)]
    if recorded or model.spec.source is None:
        return recorded[-1] if recorded else spec_hash
    found = fitting(model.spec, sources.get((model.name, spec_hash)))
    return named(model.spec, found) if found is not None and found.state == "resolved" else None


def named(spec: ModelSpec, source: SourceState) -> str:
    """Return the name of the revision that this spec makes of this content."""
    return _digits(f"{_content(spec)}\0{source.digest}") if source.digest else revision_of(spec)


def fitting(spec: ModelSpec, source: SourceState | None) -> SourceState | None:
    """Refuse a checkpoint that cannot give what the spec asks of it: no replica need start to find out."""
    if source is None or source.state != "resolved":
        return source
    amiss = contradiction(
        source.shape,
        source.quantization,
        asked_context=spec.context_length,
        asked_quantization=spec.quantization,
        task=source.task,
        asked_task=spec.task,
    )
    if spec.rollout is not None and spec.rollout.probes and asked_task(spec, source) != "generate":
        amiss = amiss or f"The checkpoint is made to {source.task}: {NO_ANSWERS}."
    return SourceState("failed", reason=Reason.InvalidEngineArgs, message=amiss) if amiss else source


def spec_on_wire(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", by_alias=True)


def recorded_spec(record: RevisionRecord, current: ModelSpec | None) -> ModelSpec:
    """Return the spec that an application of this revision runs with: its own, with today's scaling, queue
    and rollout."""
    spec = ModelSpec.model_validate(record.spec, context=STORED)
    if current is None:
        return spec
    kept = {"scaling": current.scaling, "queue": current.queue, "rollout": current.rollout}
    return spec.model_copy(update=kept)


def _content(spec: ModelSpec) -> str:
    wire = spec_on_wire(spec)
    if spec.task == "auto":
        wire["task"] = FIRST_TASK
    if wire["source"] is not None:
        del wire["source"]["recheckSeconds"]  # when it is looked at, and not what it is
    found = {name: wire[name] for name in REVISION_FIELDS if wire[name] or name not in LATER_FIELDS}
    return json.dumps(found, sort_keys=True, separators=(",", ":"))


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:REVISION_DIGITS]
