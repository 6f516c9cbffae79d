"""Between what is remembered and decided and the status of a resource. Pure.

`Model.status` is where the operator keeps its memory: `revisions` mirrors the records of `control.desired`
field by field, so an operator that starts anew reads them back and goes on. What is at its default is left
out, which also makes equal memories equal statuses.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from pydantic.alias_generators import to_camel, to_snake

from tidegate.control.conditions import condition, overlaid, settle
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.control.observed import PodProblem
from tidegate.control.reasons import CONFIG_VALID, DEGRADED, PROGRESSING, READY, SCHEDULED
from tidegate.control.status import outage
from tidegate.messages.registry import Condition, ModelEntry

Status = dict[str, Any]

# Changes of these alone may wait a little, or a busy model would be written with every look.
RESTLESS = ("waiting",)
RESTLESS_SECONDS = 5.0

# Why something is not ready that will be, or is not meant to be any longer.
ON_ITS_WAY = frozenset(
    {
        *("Resolving", "NotChecked", "Queued", "Building", "Loading", "Waking", "Unproven"),
        *("ClusterStarting", "ClusterRecreating", "Deleting"),
    }
)

# Fields whose values are a person's own mappings: their keys are left as they are.
_VERBATIM = frozenset({"spec"})


def model_status(entry: ModelEntry, record: ModelRecord, generation: int, pool: str, waiting: int) -> Status:
    """The whole status of a Model that is planned for."""
    shown = record.revisions.get(record.serving) or next(reversed(record.revisions.values()), None)
    placement = shown.placement if shown is not None else None
    return {
        "observedGeneration": generation,
        "conditions": conditions_on_wire(entry.conditions, generation),
        "revision": record.serving,
        "format": entry.quantization if entry.quantization != "none" else entry.precision,
        "precision": entry.precision,
        "pool": pool,
        "replicas": entry.replicas_ready,
        "wantedReplicas": entry.replicas_wanted,
        "replicaSummary": f"{entry.replicas_ready}/{entry.replicas_wanted}",
        "waiting": waiting,
        "selector": "",
        **({"accelerator": placement.group, "gpuShare": placement.gpus} if placement is not None else {}),
        **memory(record),
    }


def memory(record: ModelRecord) -> Status:
    """The part of a Model's status that `record_of` reads."""
    return {
        "created": record.created,
        "serving": record.serving,
        "revisions": [_to_wire(kept) for kept in record.revisions.values()],
    }


def record_of(name: str, status: Mapping[str, Any]) -> ModelRecord | None:
    """What a Model's status remembers; None where it remembers nothing, or nothing that can be read (the
    model then proves itself anew)."""
    if "created" not in status:
        return None
    try:
        kept = [msgspec.convert(_from_wire(item), RevisionRecord) for item in status.get("revisions") or ()]
    except msgspec.ValidationError:
        return None
    return ModelRecord(
        name=name,
        created=int(status["created"]),
        serving=str(status.get("serving") or ""),
        revisions={item.revision: item for item in kept},
    )


def refused_status(
    past: Mapping[str, Any], generation: int, reason: str, message: str, pool: str, now: float
) -> Status:
    """The status of a Model whose spec is refused: what it remembers stays, and so does what it says of what
    still runs."""
    told = [
        condition(READY, "False", reason, message),
        condition(CONFIG_VALID, "False", reason, message),
    ]
    before = conditions_of(past)
    conditions = overlaid(before, told, before, now)
    return {
        **{key: value for key, value in past.items() if key not in ("conditions", "observedGeneration")},
        "observedGeneration": generation,
        "conditions": conditions_on_wire(conditions, generation),
        "pool": pool,
    }


def outage_status(past: Mapping[str, Any], generation: int, reason: str, message: str, now: float) -> Status:
    """The status of a Model of which nothing can be found out now."""
    conditions = outage(conditions_of(past), reason, message, now)
    told = conditions_on_wire(conditions, generation)
    return {**past, "observedGeneration": generation, "conditions": told}


def without_pool_status(past: Mapping[str, Any], generation: int, message: str, now: float) -> Status:
    """The status of a Model whose Pool is not there: nothing of it runs, and nothing is on its way."""
    before = conditions_of(past)
    idle = [condition(kind, "False", "NoSuchPool", message) for kind in (SCHEDULED, PROGRESSING)]
    conditions = overlaid(outage(before, "NoSuchPool", message, now), idle, before, now)
    return {
        **past,
        "observedGeneration": generation,
        "conditions": conditions_on_wire(conditions, generation),
        "replicas": 0,
        "wantedReplicas": 0,
        "replicaSummary": "0/0",
    }


def pool_status(
    past: Mapping[str, Any],
    generation: int,
    ready: Condition,
    problems: Sequence[PodProblem],
    numbers: Mapping[str, Any],
    now: float,
) -> Status:
    """The whole status of a Pool. `problems` are those of its pods; one of the head keeps it from ready."""
    of_head = next((problem for problem in problems if not problem.group), None)
    if ready.reason == "ClusterStarting" and of_head is not None:
        ready = condition(READY, "False", of_head.reason, of_head.message)
    if problems:
        text = " ".join(dict.fromkeys(problem.message for problem in problems))
        degraded = condition(DEGRADED, "True", problems[0].reason, text)
    elif ready.status == "False" and ready.reason not in ON_ITS_WAY:
        degraded = condition(DEGRADED, "True", ready.reason, ready.message)
    else:
        degraded = condition(DEGRADED, "False", "Healthy")
    conditions = settle([ready, degraded], conditions_of(past), now)
    return {
        "observedGeneration": generation,
        "conditions": conditions_on_wire(conditions, generation),
        **{key: value for key, value in numbers.items() if value not in ("", None)},
    }


def conditions_of(status: Mapping[str, Any]) -> list[Condition]:
    return [
        Condition(
            type=item["type"],
            status=item["status"],
            reason=item["reason"],
            message=item.get("message", ""),
            observedGeneration=item.get("observedGeneration", 0),
            lastTransitionTime=item.get("lastTransitionTime", ""),
        )
        for item in status.get("conditions") or ()
    ]


def conditions_on_wire(conditions: Iterable[Condition], generation: int) -> list[dict[str, Any]]:
    return [
        {
            "type": item.type,
            "status": item.status,
            "observedGeneration": generation,
            "lastTransitionTime": item.lastTransitionTime,
            "reason": item.reason,
            "message": item.message,
        }
        for item in conditions
    ]


def is_due(past: Mapping[str, Any], new: Mapping[str, Any], since_write_seconds: float) -> bool:
    """Whether `new` must be written over `past` now. What `new` lacks was removed."""
    if past == new:
        return False
    changed = {key for key in past.keys() | new.keys() if past.get(key) != new.get(key)}
    return not changed <= set(RESTLESS) or since_write_seconds >= RESTLESS_SECONDS


def transitions(past: Mapping[str, Any], new: Mapping[str, Any]) -> list[Condition]:
    """Conditions whose status or reason is another now, for Events. A condition that begins as expected (not
    degraded, valid) is no news."""
    before = {item.type: item for item in conditions_of(past)}
    found = []
    for item in conditions_of(new):
        old = before.get(item.type)
        if old is None and _is_expected(item):
            continue
        if old is None or (old.status, old.reason) != (item.status, item.reason):
            found.append(item)
    return found


def is_trouble(item: Condition) -> bool:
    """Whether an Event about it is a Warning."""
    if item.type == DEGRADED:
        return item.status == "True"
    return item.status == "False" and item.type != PROGRESSING and item.reason not in ON_ITS_WAY


def deleting_since(body: Mapping[str, Any]) -> float | None:
    """When the deletion was asked for (unix seconds); None: it was not."""
    stamp = body["metadata"].get("deletionTimestamp")
    if not stamp:
        return None
    return datetime.datetime.fromisoformat(str(stamp).replace("Z", "+00:00")).timestamp()


def _is_expected(item: Condition) -> bool:
    if item.type == DEGRADED:
        return item.status == "False"
    return item.type == CONFIG_VALID and item.status == "True"


def _to_wire(value: Any) -> Any:
    """A struct as camelCase mappings without what is at its default."""
    if isinstance(value, msgspec.Struct):
        found = {}
        for field, key in _fields(type(value)):
            item = getattr(value, field.name)
            if not field.required and item == field.default:
                continue
            if item is None or item == [] or item == {}:
                continue
            found[key] = item if field.name in _VERBATIM else _to_wire(item)
        return found
    if isinstance(value, list | tuple):
        return [_to_wire(item) for item in value]
    return value


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> Sequence[tuple[msgspec.structs.FieldInfo, str]]:
    """A struct's fields and what they are called on the wire. Finding them out costs more than all the rest
    of a status."""
    return [(field, to_camel(field.name)) for field in msgspec.structs.fields(kind)]


def _from_wire(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {to_snake(key): item if key in _VERBATIM else _from_wire(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_from_wire(item) for item in value]
    return value
