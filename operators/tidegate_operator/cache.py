"""The cache holds what the API server last said, by kind, namespace and name. Pure: informers put in, others
read.

Watches, listings and the answers to our own writes come in no fixed order. So an older version never replaces
a newer one (resource versions of one cluster are comparable numbers, which Kubernetes promises since 1.35 and
etcd has always given), and what a listing lacks is only forgotten if it is older than the listing. Answers
keep a reconcile that runs before the watch has caught up from writing the same thing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from tidegate.control.resources import DEFAULT_POOL
from tidegate_operator.kinds import Kind

Body = Mapping[str, Any]


class Cache:
    """`missing` are the kinds that the API server does not know."""

    def __init__(self) -> None:
        self.missing: set[Kind] = set()
        self._bodies: dict[tuple[Kind, str], dict[str, Body]] = {}

    def put(self, kind: Kind, body: Body) -> bool:
        """Take in one version of an object; False where the cache has it or a newer one."""
        meta = body["metadata"]
        bodies = self._bodies.setdefault((kind, meta["namespace"]), {})
        known = bodies.get(meta["name"])
        if known is not None and is_same(known, body) and version(body) <= version(known):
            return False
        bodies[meta["name"]] = slim(body)
        return True

    def drop(self, kind: Kind, body: Body) -> bool:
        """Forget an object that is gone; False where another of its name stands already."""
        meta = body["metadata"]
        bodies = self._bodies.get((kind, meta["namespace"]), {})
        known = bodies.get(meta["name"])
        if known is None or not is_same(known, body):
            return False
        del bodies[meta["name"]]
        return True

    def replace(self, kind: Kind, namespace: str, listed: Iterable[Body], listed_at: int) -> list[Body]:
        """Take in a whole listing of version `listed_at`. Returns what has changed or gone by it."""
        bodies = {body["metadata"]["name"]: body for body in listed}
        changed = [body for body in bodies.values() if self.put(kind, body)]
        for name, known in list(self._bodies.get((kind, namespace), {}).items()):
            if name not in bodies and version(known) <= listed_at:
                del self._bodies[(kind, namespace)][name]
                changed.append(known)
        return changed

    def get(self, kind: Kind, namespace: str, name: str) -> Body | None:
        return self._bodies.get((kind, namespace), {}).get(name)

    def of(self, kind: Kind, namespace: str, wanted: Callable[[Body], bool] | None = None) -> list[Body]:
        """Return the objects of a kind in a namespace (those that are `wanted`), oldest first."""
        return sorted(filter(wanted, self._bodies.get((kind, namespace), {}).values()), key=age)

    def everywhere(self, kind: Kind) -> list[Body]:
        """Return all objects of a kind, oldest first."""
        found = [bodies.values() for (other, _), bodies in self._bodies.items() if other == kind]
        return sorted(chain.from_iterable(found), key=age)

    def count(self, kind: Kind) -> int:
        return sum(len(bodies) for (other, _), bodies in self._bodies.items() if other == kind)

    def named(self, kind: Kind, name: str) -> list[Body]:
        """Return the objects of one name in all namespaces, oldest first."""
        found = [bodies.get(name) for (other, _), bodies in self._bodies.items() if other == kind]
        return sorted(filter(None, found), key=age)


def version(body: Body) -> int:
    """Return the resource version as a number; 0 where it is none."""
    text = str(body.get("metadata", {}).get("resourceVersion", ""))
    return int(text) if text.isdecimal() else 0


def is_same(one: Body, other: Body) -> bool:
    """Return whether both are versions of one object, and not of two that had the same name."""
    return bool(one["metadata"].get("uid") == other["metadata"].get("uid"))


def age(body: Body) -> tuple[str, str, str]:
    """Sort by creation; the namespace decides between two of the same second."""
    meta = body["metadata"]
    return (str(meta.get("creationTimestamp", "")), str(meta.get("namespace", "")), str(meta.get("name", "")))


def labels(body: Body) -> Mapping[str, str]:
    return body["metadata"].get("labels") or {}


def pool_of(model: Body) -> str:
    """Return the pool that a Model names, also where its spec is no valid one."""
    spec = model.get("spec")
    pool = spec.get("pool") if isinstance(spec, Mapping) else None
    return pool if isinstance(pool, str) and pool else DEFAULT_POOL


def is_deleting(body: Body) -> bool:
    return bool(body["metadata"].get("deletionTimestamp"))


def slim(body: Body) -> Body:
    """Return the object without the bookkeeping of server-side apply, often half of an object. Of a Model's
    stays who changed its spec last."""
    meta = body["metadata"]
    if "managedFields" not in meta:
        return body
    kept = {key: value for key, value in meta.items() if key != "managedFields"}
    if body.get("kind") == "Model" and (last := _last_of_spec(meta["managedFields"])) is not None:
        kept["managedFields"] = [{"manager": last.get("manager", "")}]
    return {**body, "metadata": kept}


def author_of(model: Body) -> str:
    """Return who changed a cached Model's spec last: a field manager, or whose key was shown to the control
    API, which writes as `key:NAME`."""
    for last in model["metadata"].get("managedFields") or ():
        return str(last["manager"]).removeprefix("key:")
    return ""


def _last_of_spec(entries: Iterable[Body]) -> Body | None:
    of_spec = (each for each in entries if "f:spec" in (each.get("fieldsV1") or {}))
    # Times are whole seconds: within one, what was asked of the control API came last.
    return max(
        of_spec,
        key=lambda each: (str(each.get("time", "")), str(each["manager"]).startswith("key:")),
        default=None,
    )
