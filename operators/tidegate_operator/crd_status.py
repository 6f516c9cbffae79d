"""The status of `Model` and `Pool` as a cluster shows it. The operator writes it, nobody else.

Nothing has a default: what the operator did not write is not shown. Bounds are far above what it writes.
`ModelStatus.revisions` mirrors the records of `control.desired`, so that an operator that starts anew forgets
nothing; its schema follows from those classes. `serving` stays in the schema, though nothing writes it any
more: the API server drops a stored field that the schema does not name before an operator could read it.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal, Union

import msgspec
from pydantic import Field, WithJsonSchema
from pydantic.alias_generators import to_camel

from tidegate.control.desired import RevisionRecord
from tidegate.control.schema_types import Strict, keyed_by

MAX_TEXT = 32_768
MAX_REVISIONS = 200

Count = Annotated[int, Field(ge=0)]
Short = Annotated[str, Field(max_length=1024)]


class StatusCondition(Strict):
    """One aspect of the state, as metav1.Condition."""

    type: str = Field(
        pattern=r"^[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?$", max_length=316, description="Which aspect."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    observed_generation: Count | None = Field(
        default=None, description="The metadata.generation that this was said of."
    )
    last_transition_time: Annotated[
        str, WithJsonSchema({"type": "string", "format": "date-time", "maxLength": 64})
    ] = Field(description="When the status last changed.")
    reason: str = Field(
        pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        min_length=1,
        max_length=1024,
        description="Why, in one word of a documented list.",
    )
    message: str = Field(max_length=MAX_TEXT, description="Why, in a sentence that says what to do.")


Conditions = Annotated[
    tuple[StatusCondition, ...],
    Field(
        max_length=16,
        json_schema_extra=keyed_by("type"),
    ),
]


class ModelStatus(Strict):
    """The findings and the last actions of the operator."""

    observed_generation: Count | None = Field(
        default=None, description="The metadata.generation that this status was made from."
    )
    conditions: Conditions | None = Field(
        default=None, description="Ready sums up the others; each says why."
    )
    revision: Short | None = Field(
        default=None,
        description="The revision that takes the traffic, or several; empty: none has proved itself yet.",
    )
    task: Short | None = Field(
        default=None, description="What it does, as its spec or its checkpoint's files say."
    )
    format: Short | None = Field(
        default=None, description="How the weights are stored: gptq, another method, or a number format."
    )
    precision: Short | None = Field(default=None, description="Number format that the replicas compute in.")
    pool: Short | None = Field(default=None, description="The Pool that runs the replicas.")
    replicas: Count | None = Field(default=None, description="Replicas that answer requests.")
    wanted_replicas: Count | None = Field(default=None, description="Replicas that scaling wants.")
    replica_summary: Short | None = Field(
        default=None, description="Replicas as ready/wanted, for people to read."
    )
    waiting: Count | None = Field(default=None, description="Requests that wait in the queue.")
    selector: Annotated[str, Field(max_length=4096)] | None = Field(
        default=None,
        description="Label selector of the scale subresource; empty: replicas are no pods of their own.",
    )
    accelerator: Short | None = Field(default=None, description="The Pool's group that runs the replicas.")
    gpu_share: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="GPUs that one replica takes; below 1 it shares one."
    )
    created: Count | None = Field(
        default=None, description="When the operator first saw the Model (unix seconds)."
    )
    weights: Annotated[dict[str, Count], Field(max_length=MAX_REVISIONS)] | None = Field(
        default=None, description="The share of the traffic that each revision takes, of 100."
    )
    serving: Short | None = Field(
        default=None, description="Written by the version before: the revision that takes all traffic."
    )
    revisions: Annotated[list[Any], Field(max_length=MAX_REVISIONS)] | None = Field(
        default=None,
        description="The operator's record of each revision that stands.",
        json_schema_extra=keyed_by("revision"),
    )
    look: dict[str, Any] | None = Field(
        default=None, description="The last look at the source after the first, or the one that goes on."
    )
    pinned: dict[str, Any] | None = Field(
        default=None, description="The revision that an undo holds, until the spec changes."
    )
    rollout: dict[str, Any] | None = Field(
        default=None, description="The rollout that is under way, or the last one, for people to read."
    )
    step: Short | None = Field(default=None, description="The rollout's step, of how many.")
    rollout_state: dict[str, Any] | None = Field(
        default=None, description="What the operator remembers of the rollout."
    )
    acted: dict[str, Any] | None = Field(
        default=None, description="The action on the rollout that was taken up last, while it is still asked."
    )


class PoolStatus(Strict):
    """The findings and the last actions of the operator."""

    observed_generation: Count | None = Field(
        default=None, description="The metadata.generation that this status was made from."
    )
    conditions: Conditions | None = Field(
        default=None, description="Ready sums up the others; each says why."
    )
    ray_cluster: Short | None = Field(default=None, description="Name of the RayCluster that takes Models.")
    generation: Short | None = Field(
        default=None, description="Digest of what that RayCluster was made from; another one needs new pods."
    )
    workers: Count | None = Field(default=None, description="Workers that are ready.")
    wanted_workers: Count | None = Field(default=None, description="Workers that Ray's autoscaler wants.")
    revisions: Count | None = Field(default=None, description="Model revisions that stand in Ray Serve.")
    ray_version: Short | None = Field(default=None, description="The Ray version that runs.")
    kube_ray: Short | None = Field(default=None, description="The KubeRay version that was found.")


def revision_schema() -> dict[str, Any]:
    """The schema of one item of `ModelStatus.revisions`."""
    return mirrored(RevisionRecord) | {"required": ["revision"]}


def mirrored(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """A struct with its fields' names in camelCase. A field without a meaning below stops the generation."""
    hints = typing.get_type_hints(kind)
    properties = {}
    for field in msgspec.structs.fields(kind):
        meaning = MEANINGS[f"{kind.__name__}.{field.name}"]
        properties[to_camel(field.name)] = {"description": meaning, **_value(hints[field.name])}
    return {"type": "object", "properties": properties}


def _value(annotation: Any) -> dict[str, Any]:
    if typing.get_origin(annotation) is Literal:
        return dict(_PLAIN[str])
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        (annotation,) = (option for option in arguments if option is not types.NoneType)
        return _value(annotation)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return mirrored(annotation)
    if origin is dict:
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    if origin in (list, tuple):
        return {"type": "array", "maxItems": 256, "items": _value(arguments[0])}
    return dict(_PLAIN[annotation])


_PLAIN: dict[type, dict[str, Any]] = {
    str: {"type": "string", "maxLength": MAX_TEXT},
    int: {"type": "integer", "format": "int64"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
}

MEANINGS = {
    "RevisionRecord.revision": "Ten hex digits over the fields of the spec that need a new replica, and the "
    "content of the source.",
    "RevisionRecord.spec": "The spec that this revision was made from.",
    "RevisionRecord.checkpoint": "Where the replicas read the checkpoint.",
    "RevisionRecord.weights_bytes": "Size of the checkpoint's weights.",
    "RevisionRecord.quantization": "How the checkpoint's weights are stored.",
    "RevisionRecord.precision": "Number format that precision auto computes in.",
    "RevisionRecord.proof": "What the first replica found; without it the revision takes no traffic.",
    "RevisionRecord.attempt_at": "When the current try began (unix seconds; 0: none runs).",
    "RevisionRecord.failures": "Tries that failed in a row.",
    "RevisionRecord.retry_at": "When the next try may begin (unix seconds).",
    "RevisionRecord.reason": "Why the last try failed, in one word.",
    "RevisionRecord.message": "Why the last try failed.",
    "RevisionRecord.retired_at": "When another revision took the traffic (unix seconds; 0: it did not).",
    "RevisionRecord.shape": "What the checkpoint's config says of its size.",
    "RevisionRecord.stored_weights": "What of the checkpoint is loaded.",
    "RevisionRecord.placement": "Where the replicas run.",
    "RevisionRecord.waits_since": "When a replica found no room (unix seconds; 0: none waits).",
    "RevisionRecord.spec_hash": "Ten hex digits over those fields alone, by which the source was asked for.",
    "RevisionRecord.commit": "The commit of the hub or of the bucket.",
    "RevisionRecord.digest": "Checksum over what is loaded of the source.",
    "RevisionRecord.created": "When the revision was first asked for (unix seconds).",
    "RevisionRecord.cause": "What made it another revision.",
    "RevisionRecord.author": "Who changed the spec.",
    "RevisionRecord.restarted": "When fresh replicas were asked for (unix seconds).",
    "RevisionRecord.number": "The revision's place in the Model's history: 1, 2, 3, ...",
    "Look.spec_hash": "The hash of the spec that it was asked for.",
    "Look.at": "When it began (unix seconds).",
    "Look.goal": "The revision of the history whose content is looked for; without: what is there now.",
    "Look.author": "Who asked for it.",
    "Look.ended": "When it ended (unix seconds; 0: it goes on).",
    "Look.reason": "Why it brought nothing, in one word.",
    "Look.message": "What it found.",
    "Pin.revision": "The revision that stands.",
    "Pin.instead": "The revision that the spec asks for.",
    "Pin.spec_hash": "The hash of the spec that it stands instead of.",
    "RevisionRecord.task": "What the checkpoint is for.",
    "RevisionRecord.probes": "What each replica must answer before it takes requests.",
    "Probe.prompt": "Text to go on with.",
    "Probe.messages": "A chat to answer.",
    "Probe.expect": "Text that the answer must contain.",
    "Probe.pattern": "Regular expression that must be found in the answer.",
    "Probe.max_tokens": "Tokens of the answer at most.",
    "RolloutView.model": "The Model.",
    "RolloutView.id": "Name of the rollout; it is the label of the requests that are compared.",
    "RolloutView.undo": "Of an undo asked for since: LookedAt while its source is looked at, Refused where "
    "that has not the content any more.",
    "RolloutView.strategy": "How it goes: Canary, BlueGreen, Recreate, or AllAtOnce without spec.rollout.",
    "RolloutView.phase": "Queued, Warming, Shadow, Progressing, Paused, Completed or Aborted.",
    "RolloutView.stable": "The revision that had the traffic when it began.",
    "RolloutView.target": "The revision that takes it over.",
    "RolloutView.weight": "The target's share of the requests, of 100.",
    "RolloutView.step": "Number of the step from 0; -1: before the first.",
    "RolloutView.steps": "The steps, as the spec had them when the rollout began.",
    "RolloutView.reason": "The last decision, in one word.",
    "RolloutView.message": "The last decision, or what is waited for.",
    "RolloutView.gates": "What judges the target, with its numbers.",
    "RolloutView.clean_requests": "The target's requests that ended well.",
    "RolloutView.needed_requests": "How many of them a step needs.",
    "RolloutView.started": "When it began (unix seconds).",
    "RolloutView.step_since": "When the step began (unix seconds).",
    "RolloutView.ended": "When it ended (unix seconds; 0: it has not).",
    "RolloutView.ends_at": "When it is expected to end (unix seconds; 0: nobody knows).",
    "RolloutView.position": "Its place in the Pool's line of rollouts; 0: it does not wait.",
    "RolloutView.replicas": "Replicas of each revision as ready/wanted.",
    "StepView.weight": "The target's share of the requests, of 100.",
    "StepView.hold_seconds": "How long the step is held at least.",
    "StepView.pause": "Whether a person ends it.",
    "GateView.name": "The gate.",
    "GateView.state": "passes, waits or fails.",
    "GateView.message": "Its judgement with the numbers.",
    "GateView.evidence": "E-value: how strongly the requests speak against the target.",
    "GateView.needed": "E-value at which it aborts alone; 0: it needs no statistics.",
    "GateView.stable_failures": "Requests of the stable that failed by it.",
    "GateView.stable_requests": "Requests of the stable that it has seen.",
    "GateView.target_failures": "Requests of the target that failed by it.",
    "GateView.target_requests": "Requests of the target that it has seen.",
    "RolloutState.id": "Name of the rollout.",
    "RolloutState.target": "The revision that takes over.",
    "RolloutState.stable": "The revision that had the traffic; empty: the target is the first.",
    "RolloutState.strategy": "How it goes.",
    "RolloutState.phase": "Where it is.",
    "RolloutState.started": "When it began (unix seconds).",
    "RolloutState.steps": "Its steps.",
    "RolloutState.step": "The step it is in; -1: before the first.",
    "RolloutState.step_since": "When that began (unix seconds).",
    "RolloutState.ended": "When it ended (unix seconds; 0: it has not).",
    "RolloutState.weight": "The target's share, of 100.",
    "RolloutState.ready_for": "The share for which replicas are made ready.",
    "RolloutState.size": "Replicas that the stable had.",
    "RolloutState.is_paused": "Whether a person has paused it.",
    "RolloutState.released": "The step whose pause a person has ended.",
    "RolloutState.skipped": "The step whose waiting a person has ended.",
    "RolloutState.is_refused": "Whether the target was given up.",
    "RolloutState.thresholds": "The stable's latencies when it began.",
    "RolloutState.leaving": "Revisions whose queues are emptied.",
    "RolloutState.reason": "The last decision, in one word.",
    "RolloutState.message": "How it ended.",
    "RolloutState.note": "Why the last action was refused.",
    "RolloutState.author": "Who asked for it.",
    "RolloutState.gates": "The last judgement.",
    "RolloutState.clean_requests": "The target's requests that ended well.",
    "RolloutState.needed_requests": "How many of them the step needs.",
    "RolloutState.looked_at": "When the stable's requests were first counted (unix seconds).",
    "RolloutState.looked_ended": "How many had ended by then.",
    "Thresholds.per_second": "Its requests a second.",
    "Thresholds.first_token": "Buckets of the time to first token.",
    "Thresholds.between_tokens": "Buckets of the time between tokens.",
    "Action.verb": "What was asked.",
    "Action.revision": "The revision that it names.",
    "Action.author": "Who asked.",
    "Action.at": "When it was asked (unix seconds).",
    "DecoderShape.layers": "Decoder layers.",
    "DecoderShape.kv_heads": "Heads of keys and values per layer.",
    "DecoderShape.head_dim": "Width of one head.",
    "DecoderShape.hidden": "Width between layers.",
    "DecoderShape.vocab": "Tokens of the vocabulary.",
    "DecoderShape.positions": "Longest context that the checkpoint was trained for.",
    "DecoderShape.longest": "Longest context that its positions cover, where that is more.",
    "DecoderShape.has_encoder": "Whether an encoder reads the prompt.",
    "DecoderShape.without_kv": "Layers without keys and values, which recurrent ones are.",
    "DecoderShape.state": "Numbers that recurrent layers keep of a request.",
    "DecoderShape.latent": "Numbers that a layer keeps of a token in the place of keys and values of heads.",
    "StoredWeights.float_values": "Numbers that are loaded in the format that is computed in.",
    "StoredWeights.fixed_bytes": "Bytes that stay as they are stored.",
    "StoredWeights.packed_values": "Numbers that are stored packed, in those bytes.",
    "Placement.group": "The Pool's group.",
    "Placement.gpus": "GPUs of one replica; below 1 it shares one.",
    "Placement.memory_cap_bytes": "Memory that one replica's engine may take; 0: no bound.",
    "Placement.memory_bytes": "Host memory that Ray reserves for one replica.",
    "RevisionReport.model": "The Model.",
    "RevisionReport.revision": "The revision.",
    "RevisionReport.at": "When it was found (unix seconds).",
    "RevisionReport.proved": "Whether the replica loaded and answered.",
    "RevisionReport.reason": "Why it did not, in one word.",
    "RevisionReport.message": "Why it did not.",
    "RevisionReport.notes": "What is worth knowing though it serves.",
    "RevisionReport.load_seconds": "How long loading took.",
    "RevisionReport.weights_bytes": "Memory that the weights take.",
    "RevisionReport.kv_bytes_per_token": "Memory that one token's keys and values take.",
    "RevisionReport.slots": "Requests that one replica runs at once.",
    "RevisionReport.context_length": "Tokens of prompt and answer together.",
    "RevisionReport.precision": "Number format that the replica computes in.",
    "RevisionReport.device": "Device that it computes on.",
    "RevisionReport.process_seconds": "How long the replica's process took to start.",
}
