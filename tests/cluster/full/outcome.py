"""What the operator has made of the resources, without what differs from one time to the next: when things
happened, identities that the API server gives, and how many tries a step took."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tests.cluster.full.control_plane import NAMESPACE
from tests.cluster.simulated_serve import SimulatedServe
from tidegate.store.registry import Registry
from tidegate_operator.cluster import Cluster, Object

_PASSING = frozenset(
    {
        "at",
        "attemptAt",
        "created",
        "creationTimestamp",
        "failures",
        "generation",
        "lastTransitionTime",
        "last_transition_time",
        "managedFields",
        "resourceVersion",
        "retiredAt",
        "retryAt",
        "uid",
    }
)
_TRIES = re.compile(r"\bTry \d+")
_SHOWN_LINES = 60

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """All by name; `serve` by cluster."""

    models: Facts
    pools: Facts
    clusters: Facts
    registry: Facts
    serve: Facts

    def ready(self) -> dict[str, tuple[str, str]]:
        """(status, reason) of each Model's condition `Ready`."""
        found = {}
        for name, body in self.models.items():
            conditions = body.get("status", {}).get("conditions", [])
            ready = next((item for item in conditions if item["type"] == "Ready"), None)
            found[name] = (ready["status"], ready["reason"]) if ready else ("", "")
        return found


async def outcome(api: Cluster, registry: Registry, serve: SimulatedServe) -> Outcome:
    clusters = await _all(api, "RayCluster")
    entries = await registry.read_models()
    return Outcome(
        models=await _all(api, "Model"),
        pools=await _all(api, "Pool"),
        clusters=clusters,
        registry={name: _lasting(msgspec.to_builtins(entry)) for name, entry in entries.items()},
        serve={
            name: {app: serve.application(name, app) for app in serve.standing(name)} for name in clusters
        },
    )


def difference(wanted: Outcome, found: Outcome) -> str:
    """Where the two differ, one path a line; empty: nowhere."""
    lines: list[str] = []
    for part in ("models", "pools", "clusters", "registry", "serve"):
        _compare(part, getattr(wanted, part), getattr(found, part), lines)
    return "\n".join(lines[:_SHOWN_LINES])


async def _all(api: Cluster, kind: Any) -> dict[str, Any]:
    found: list[Object]
    found, _ = await api.list(kind, NAMESPACE)
    return {body["metadata"]["name"]: _lasting(body) for body in found}


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lasting(item) for key, item in value.items() if key not in _PASSING}
    if isinstance(value, list | tuple):
        return [_lasting(item) for item in value]
    return _TRIES.sub("Try", value) if isinstance(value, str) else value


def _compare(path: str, wanted: Any, found: Any, lines: list[str]) -> None:
    if wanted == found:
        return
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in sorted(wanted.keys() | found.keys()):
            _compare(f"{path}.{key}", wanted.get(key), found.get(key), lines)
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
            _compare(f"{path}[{number}]", one, other, lines)
    else:
        lines.append(f"{path}: {json.dumps(found)[:300]} instead of {json.dumps(wanted)[:300]}")
