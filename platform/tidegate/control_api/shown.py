"""Models as the control API shows them, from what a host gathers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from tidegate.control.desired import ModelRecord
from tidegate.control.observed import Observation
from tidegate.control.plan import queues_of
from tidegate.control.resource_files import parse_resource
from tidegate.control.resources import API_VERSION, Model
from tidegate.control_round import Depths, Registry, observe_store
from tidegate.errors import Conflict, InvalidRequest, NotFound, QueueUnavailable, shortened
from tidegate.messages.queue import Depth

MOST_NAMED_CHARACTERS = 500


async def observed(
    registry: Registry, depths: Depths, records: Mapping[str, ModelRecord], models: Collection[str]
) -> Observation:
    """Return what Redis says of these models; nothing while it is away: the models are there all the same."""
    try:
        return await observe_store(registry, depths, queues_of((), records), models)
    except QueueUnavailable:
        return Observation(None)


def shown_fields(name: str, seen: Observation, record: ModelRecord | None) -> dict[str, Any]:
    """Return the fields of a `ModelView` that say what gateways and replicas know of the model, and whether
    an undo holds."""
    entry = seen.entries.get(name)
    depths = (
        [seen.depths.get((name, revision), Depth(0, 0, 0.0)) for revision in entry.revisions] if entry else []
    )
    replicas = [stats for stats in seen.replicas if stats.model == name]
    return {
        "entry": entry,
        "pinned": record.pinned.revision if record is not None and record.pinned is not None else "",
        "waiting": sum(depth.waiting for depth in depths),
        "running": sum(depth.running for depth in depths),
        "tokens_per_second": round(sum(stats.tokens_per_second for stats in replicas), 1),
        "replicas": replicas,
    }


def version_of(spec: Mapping[str, Any]) -> str:
    """Return the version that a change of a spec is decided on. An object's own will not do: each status that
    the operator writes is another one of those."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checked(name: str, spec: Mapping[str, Any]) -> Model:
    """Return the model of this name and spec. Raises `InvalidRequest` that names the field."""
    document = {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": name}, "spec": dict(spec)}
    found = parse_resource(document, "the body")
    if isinstance(found, Model):
        return found
    problems = found if isinstance(found, list) else []
    raise InvalidRequest("; ".join(map(str, problems)), param=problems[0].field if problems else None)


def changed_since(name: str) -> Conflict:
    return Conflict(f"Model {name} has changed since it was read; read it again and decide anew.")


def unknown_model(name: str, known: Mapping[str, object]) -> NotFound:
    names = shortened(", ".join(sorted(known)), MOST_NAMED_CHARACTERS) or "none"
    return NotFound(f"No model is called {name!r}; there is: {names}.")
