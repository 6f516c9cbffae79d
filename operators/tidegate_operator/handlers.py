"""What the API server tells, put where the reconcile finds it. Thin: no handler decides or writes.

Only `kopf.on.event`, which answers every event of every object and writes nothing; kopf's other handlers
keep their state in annotations and finalizers. Each handler puts the object into the cache and the keys of
the pools that it may concern on the queue.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import kopf

from tidegate_operator.cache import Body, Cache, Kind, labels, pool_of
from tidegate_operator.pod_template import POOL_LABEL
from tidegate_operator.work_queue import Key, WorkQueue

# On everything that we make, so that watches and listings are short in a busy namespace.
SELECTOR = "app.kubernetes.io/managed-by=tidegate-operator"
WATCHED: Mapping[Kind, tuple[str, str, str]] = {
    "Model": ("tidegate.dev", "v1alpha1", "models"),
    "Pool": ("tidegate.dev", "v1alpha1", "pools"),
    "RayCluster": ("ray.io", "v1", "rayclusters"),
    "Job": ("batch", "v1", "jobs"),
    "Pod": ("", "v1", "pods"),
}
OURS: frozenset[Kind] = frozenset({"RayCluster", "Job", "Pod"})


class News:
    """Takes in versions of objects, from watches and listings alike. `changed_at` tells since when a pool
    waits for the look that takes in a change of its Pool or a Model (monotonic seconds)."""

    def __init__(self, cache: Cache, queue: WorkQueue) -> None:
        self._cache = cache
        self._queue = queue
        self.changed_at: dict[Key, float] = {}

    def seen(self, kind: Kind, body: Body) -> None:
        past = self._cache.get(kind, body["metadata"]["namespace"], body["metadata"]["name"])
        if self._cache.put(kind, body):
            is_asked = past is None or _generation(past) != _generation(body)
            self.told(kind, body, is_asked=is_asked)

    def gone(self, kind: Kind, body: Body) -> None:
        if self._cache.drop(kind, body):
            self.told(kind, body, is_asked=True)

    def listed(self, kind: Kind, namespace: str, bodies: Iterable[Body], version: int) -> None:
        for body in self._cache.replace(kind, namespace, bodies, version):
            self.told(kind, body, is_asked=False)

    def told(self, kind: Kind, body: Body, *, is_asked: bool) -> None:
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


def watch(news: News, kinds: Iterable[Kind]) -> kopf.OperatorRegistry:
    """kopf's registry with one event handler per kind."""
    registry = kopf.OperatorRegistry()
    for kind in kinds:
        group, version, plural = WATCHED[kind]
        kopf.on.event(group, version, plural, registry=registry, id=kind.lower())(_handler(news, kind))
    kopf.on.login(registry=registry)(_login)
    return registry


def kopf_settings() -> kopf.OperatorSettings:
    """What kopf does beside watching is switched off: posting of events, peering, and the watch of every
    definition in the cluster (megabytes of schema). So it does not see a kind that comes later; the listing
    in `main` does."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.watching.chunk_size = 200
    # A server that refuses for a while must not end the process: what is served goes on anyway.
    settings.networking.error_backoffs = (0.2, 0.5, 1, 2, 3, 5, *([8] * 100))
    settings.networking.connect_timeout = 10.0
    settings.networking.request_timeout = 60.0
    for kind in OURS:
        _, _, plural = WATCHED[kind]
        settings.watching.label_selectors[plural] = SELECTOR
    return settings


def _handler(news: News, kind: Kind) -> Any:
    async def handle(type: str | None, body: Mapping[str, Any], **_: Any) -> None:
        plain = _plain(body)
        if type == "DELETED":
            news.gone(kind, plain)
        else:
            news.seen(kind, plain)

    return handle


async def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """The pod's service account, or else the kubeconfig; both without the Kubernetes client's models."""
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def _plain(body: Mapping[str, Any]) -> Body:
    """kopf hands out a view; what is kept must be the object itself."""
    return dict(body)


def _generation(body: Body) -> int:
    return int(body["metadata"].get("generation") or 0)
