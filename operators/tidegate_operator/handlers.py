"""The event handler puts what informers bring where the reconcile finds it. It decides and writes nothing.

Each version of an object goes into the cache, and the keys of the pools that it may concern onto the queue.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from tidegate_operator.cache import Body, Cache, labels, pool_of
from tidegate_operator.kinds import Kind
from tidegate_operator.pod_template import POOL_LABEL
from tidegate_operator.work_queue import Key, ReconcileQueue


class EventHandler:
    """Takes in versions of objects, from watches and listings alike. `changed_at` says since when a pool
    waits for the reconcile that takes in a change of its Pool or a Model (monotonic seconds)."""

    def __init__(self, cache: Cache, queue: ReconcileQueue) -> None:
        self._cache = cache
        self._queue = queue
        self.changed_at: dict[Key, float] = {}

    def on_update(self, kind: Kind, body: Body) -> None:
        past = self._cache.get(kind, body["metadata"]["namespace"], body["metadata"]["name"])
        if self._cache.put(kind, body):
            is_asked = past is None or _generation(past) != _generation(body)
            self._enqueue(kind, body, is_asked=is_asked)

    def on_delete(self, kind: Kind, body: Body) -> None:
        if self._cache.drop(kind, body):
            self._enqueue(kind, body, is_asked=True)

    def on_list(self, kind: Kind, namespace: str, bodies: Iterable[Body], version: int) -> None:
        self._cache.missing.discard(kind)
        for body in self._cache.replace(kind, namespace, bodies, version):
            self._enqueue(kind, body, is_asked=False)

    def on_missing(self, kind: Kind) -> None:
        """The API server does not know the kind."""
        self._cache.missing.add(kind)

    def resync(self, *namespaces: str) -> None:
        """Have every pool of these namespaces reconciled."""
        for namespace in namespaces:
            for body in self._cache.of("Pool", namespace):
                self._queue.add((namespace, body["metadata"]["name"]))
            for body in self._cache.of("Model", namespace):
                self._queue.add((namespace, pool_of(body)))

    def _enqueue(self, kind: Kind, body: Body, *, is_asked: bool) -> None:
        for key in self._keys(kind, body):
            if is_asked and kind in ("Model", "Pool"):
                self.changed_at.setdefault(key, time.monotonic())
            self._queue.add(key)

    def _keys(self, kind: Kind, body: Body) -> set[Key]:
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        if kind == "Pool":
            return {(namespace, name)}
        if kind != "Model":
            pool = labels(body).get(POOL_LABEL)
            return {(namespace, pool)} if pool else set()
        # A name is one model's in all namespaces: what happens to one may let another have it.
        same = self._cache.named("Model", name)
        return {(other["metadata"]["namespace"], pool_of(other)) for other in [body, *same]}


def _generation(body: Body) -> int:
    return int(body["metadata"].get("generation") or 0)
