"""What the API server last said, by kind, namespace and name. Pure: watches and listings put in, others read.

Three sources write here in no fixed order: the watches, the periodic listing, and the answers to our own
writes. So an older version never replaces a newer one (resource versions of one cluster are comparable
numbers, which Kubernetes promises since 1.35 and etcd has always given), and what a listing lacks is only
forgotten if it is older than the listing. Reading our own answers is what keeps a reconcile that runs before
the watch has caught up from writing the same thing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from tidegate.control.resources import DEFAULT_POOL

Kind = Literal["Model", "Pool", "RayCluster", "Job", "Pod"]
KINDS: tuple[Kind, ...] = ("Model", "Pool", "RayCluster", "Job", "Pod")
Body = Mapping[str, Any]


class Cache:
    def __init__(self) -> None:
        self._bodies: dict[tuple[Kind, str], dict[str, Body]] = {}

    def put(self, kind: Kind, body: Body) -> bool:
        """Take in one version of an object; False where the cache has it or a newer one."""
        meta = body["metadata"]
        place = self._bodies.setdefault((kind, meta["namespace"]), {})
        known = place.get(meta["name"])
        if known is not None and is_same(known, body) and version(body) <= version(known):
            return False
        place[meta["name"]] = slim(body)
        return True

    def drop(self, kind: Kind, body: Body) -> bool:
        """The object is gone; False where another of its name stands already."""
        meta = body["metadata"]
        place = self._bodies.get((kind, meta["namespace"]), {})
        known = place.get(meta["name"])
        if known is None or not is_same(known, body):
            return False
        del place[meta["name"]]
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
        """The objects of a kind in a namespace (those that are `wanted`), oldest first."""
        return sorted(filter(wanted, self._bodies.get((kind, namespace), {}).values()), key=age)

    def everywhere(self, kind: Kind) -> list[Body]:
        """All objects of a kind, oldest first."""
        found = [
            body for (other, _), place in self._bodies.items() if other == kind for body in place.values()
        ]
        return sorted(found, key=age)

    def named(self, kind: Kind, name: str) -> list[Body]:
        """The objects of one name in all namespaces, oldest first."""
        found = [place[name] for (other, _), place in self._bodies.items() if other == kind and name in place]
        return sorted(found, key=age)


def version(body: Body) -> int:
    """The resource version as a number; 0 where it is none."""
    text = str(body.get("metadata", {}).get("resourceVersion", ""))
    return int(text) if text.isdecimal() else 0


def is_same(one: Body, other: Body) -> bool:
    """Whether both are versions of one object, and not of two that had the same name."""
    return bool(one["metadata"].get("uid") == other["metadata"].get("uid"))


def age(body: Body) -> tuple[str, str, str]:
    """Sorts by creation; the namespace decides between two of the same second."""
    meta = body["metadata"]
    return (str(meta.get("creationTimestamp", "")), str(meta.get("namespace", "")), str(meta.get("name", "")))


def labels(body: Body) -> Mapping[str, str]:
    return body["metadata"].get("labels") or {}


def pool_of(model: Body) -> str:
    """The pool that a Model names, also where its spec is no valid one."""
    spec = model.get("spec")
    pool = spec.get("pool") if isinstance(spec, Mapping) else None
    return pool if isinstance(pool, str) and pool else DEFAULT_POOL


def is_deleting(body: Body) -> bool:
    return bool(body["metadata"].get("deletionTimestamp"))


def slim(body: Body) -> Body:
    """Without the bookkeeping of server-side apply, often half of an object."""
    meta = body["metadata"]
    if "managedFields" not in meta:
        return body
    return {**body, "metadata": {key: value for key, value in meta.items() if key != "managedFields"}}
