"""The status of a resource, from records and decisions, and the record that a status holds. Pure.

The operator keeps its records in `Model.status`: `weights` and `revisions` mirror `control.desired` field by
field, so an operator that starts anew reads them back and goes on. What is at its default is left out, which
also makes equal records equal statuses.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from pydantic.alias_generators import to_camel, to_snake

from tidegate.control.conditions import condition, overlaid, settle
from tidegate.control.desired import Look, ModelRecord, Pin, RevisionRecord, traffic_of
from tidegate.control.observed import PodProblem
from tidegate.control.reasons import CONFIG_VALID, DEGRADED, PROGRESSING, READY, SCHEDULED, Reason
from tidegate.control.rollout_state import RolloutState
from tidegate.control.status import outage
from tidegate.messages.registry import Condition, ModelEntry
from tidegate.messages.rollouts import Action, RolloutView

Status = dict[str, Any]

# Changes of these alone may wait a little, or a busy model would be written with every reconcile.
RESTLESS = ("waiting", "rollout")
RESTLESS_SECONDS = 5.0

# Fields whose values are a person's own mappings: their keys are left as they are.
_VERBATIM = frozenset({"spec"})


def model_status(
    entry: ModelEntry,
    record: ModelRecord,
    generation: int,
    pool: str,
    waiting: int,
    view: RolloutView | None = None,
) -> Status:
    """Return the whole status of a Model that is planned for. What is said of one replica is said of the
    revision with the largest share."""
    placement = record.lead.placement if record.lead is not None else None
    return {
        "observedGeneration": generation,
        "conditions": conditions_on_wire(entry.conditions, generation),
        "revision": ",".join(kept.revision for kept in record.serving),
        "task": entry.task,
        "format": entry.quantization if entry.quantization != "none" else entry.precision,
        "precision": entry.precision,
        "pool": pool,
        "replicas": entry.replicas_ready,
        "wantedReplicas": entry.replicas_wanted,
        "replicaSummary": f"{entry.replicas_ready}/{entry.replicas_wanted}",
        "waiting": waiting,
        "selector": "",
        **({"accelerator": placement.group, "gpuShare": placement.gpus} if placement is not None else {}),
        **(rollout_on_wire(view) if view is not None else {}),
        **record_on_wire(record),
    }


def rollout_on_wire(view: RolloutView) -> Status:
    """Return a Model's rollout as people read it; nothing is decided by it."""
    return {"rollout": to_wire(view), "step": f"{view.step + 1}/{len(view.steps)}"}


def rollout_of(status: Mapping[str, Any]) -> RolloutView | None:
    """Return the rollout that a Model's status tells of; None: none, or one of another version."""
    try:
        return msgspec.convert(from_wire(status.get("rollout")), RolloutView | None)
    except msgspec.ValidationError:
        return None


def record_on_wire(record: ModelRecord) -> Status:
    """Return the part of a Model's status that `record_of` reads."""
    told = {"rolloutState": record.durable.rollout, "acted": record.acted}
    return {
        "created": record.created,
        **{key: to_wire(each) for key, each in told.items() if each is not None},
        **({"weights": record.weights} if record.weights else {}),
        **({"look": to_wire(record.look)} if record.look is not None else {}),
        **({"pinned": to_wire(record.pinned)} if record.pinned is not None else {}),
        "revisions": [to_wire(kept) for kept in record.revisions.values()],
    }


def record_of(name: str, status: Mapping[str, Any]) -> ModelRecord | None:
    """Return the record that a Model's status holds; None where it holds none, or none that can be read (the
    model then proves itself anew)."""
    if "created" not in status:
        return None
    try:
        kept = [msgspec.convert(from_wire(item), RevisionRecord) for item in status.get("revisions") or ()]
        look = msgspec.convert(from_wire(status.get("look")), Look | None)
        pinned = msgspec.convert(from_wire(status.get("pinned")), Pin | None)
        rollout = msgspec.convert(from_wire(status.get("rolloutState")), RolloutState | None)
        acted = msgspec.convert(from_wire(status.get("acted")), Action | None)
    except msgspec.ValidationError:
        return None
    return ModelRecord(
        name=name,
        created=int(status["created"]),
        weights=traffic_of(status),
        revisions={item.revision: item for item in kept},
        look=look,
        pinned=pinned,
        rollout=rollout,
        acted=acted,
    )


def refused_status(
    past: Mapping[str, Any], generation: int, reason: str, message: str, pool: str, now: float
) -> Status:
    """Return the status of a Model whose spec is refused: its record stays, and so does what it says of what
    still runs."""
    refusal = [
        condition(READY, "False", reason, message),
        condition(CONFIG_VALID, "False", reason, message),
    ]
    before = conditions_of(past)
    conditions = overlaid(before, refusal, before, now)
    return {
        **{key: value for key, value in past.items() if key not in ("conditions", "observedGeneration")},
        "observedGeneration": generation,
        "conditions": conditions_on_wire(conditions, generation),
        "pool": pool,
    }


def outage_status(past: Mapping[str, Any], generation: int, reason: str, message: str, now: float) -> Status:
    """Return the status of a Model of which nothing can be found out now."""
    conditions = conditions_on_wire(outage(conditions_of(past), reason, message, now), generation)
    return {**past, "observedGeneration": generation, "conditions": conditions}


def without_pool_status(past: Mapping[str, Any], generation: int, message: str, now: float) -> Status:
    """Return the status of a Model whose Pool is not there: nothing of it runs, and nothing is on its way."""
    before = conditions_of(past)
    idle = [condition(kind, "False", Reason.NoSuchPool, message) for kind in (SCHEDULED, PROGRESSING)]
    conditions = overlaid(outage(before, Reason.NoSuchPool, message, now), idle, before, now)
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
    """Return the whole status of a Pool. `problems` are those of its pods; one of the head keeps it from
    ready."""
    of_head = next((problem for problem in problems if not problem.group), None)
    if ready.reason == Reason.ClusterStarting and of_head is not None:
        ready = condition(READY, "False", of_head.reason, of_head.message)
    if problems:
        text = " ".join(dict.fromkeys(problem.message for problem in problems))
        degraded = condition(DEGRADED, "True", problems[0].reason, text)
    elif is_trouble(ready):
        degraded = condition(DEGRADED, "True", ready.reason, ready.message)
    else:
        degraded = condition(DEGRADED, "False", Reason.Healthy)
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
    """Tell whether `new` must be written over `past` now. What `new` lacks was removed."""
    if past == new:
        return False
    changed = {key for key in past.keys() | new.keys() if past.get(key) != new.get(key)}
    return not changed <= set(RESTLESS) or since_write_seconds >= RESTLESS_SECONDS


def transitions(past: Mapping[str, Any], new: Mapping[str, Any]) -> list[Condition]:
    """Return the conditions whose status or reason is another now, for Events. One that begins as expected
    (not degraded, valid) is not among them."""
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
    """Tell whether an Event about it is a Warning."""
    if item.type == DEGRADED:
        return item.status == "True"
    reason = Reason.of(item.reason)
    passes = reason is not None and reason.passes_by_itself
    return item.status == "False" and item.type != PROGRESSING and not passes


def deleting_since(body: Mapping[str, Any]) -> float | None:
    """Return when the deletion was asked for (unix seconds); None: it was not."""
    stamp = body["metadata"].get("deletionTimestamp")
    if not stamp:
        return None
    return datetime.datetime.fromisoformat(str(stamp).replace("Z", "+00:00")).timestamp()


def _is_expected(item: Condition) -> bool:
    if item.type == DEGRADED:
        return item.status == "False"
    return item.type == CONFIG_VALID and item.status == "True"


def to_wire(value: Any) -> Any:
    """Return a struct as camelCase mappings without what is at its default."""
    if isinstance(value, msgspec.Struct):
        found = {}
        for field, key in _fields(type(value)):
            item = getattr(value, field.name)
            if not field.required and item == field.default:
                continue
            if item is None or item == [] or item == {}:
                continue
            found[key] = item if field.name in _VERBATIM else to_wire(item)
        return found
    if isinstance(value, list | tuple):
        return [to_wire(item) for item in value]
    return value


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> Sequence[tuple[msgspec.structs.FieldInfo, str]]:
    """Return a struct's fields and their names on the wire. Finding them out costs more than all the rest of
    a status."""
    return [(field, to_camel(field.name)) for field in msgspec.structs.fields(kind)]


def from_wire(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {to_snake(key): item if key in _VERBATIM else from_wire(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [from_wire(item) for item in value]
    return value
