"""Holds the operator's metrics in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import filterfalse

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tidegate.control.reasons import READY
from tidegate_operator.cache import Body, Cache, is_deleting, pool_of

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.reconcile_seconds = Histogram(
            "tidegate_operator_reconcile_seconds",
            "Duration of one reconcile of a pool.",
            ["outcome"],  # settled, progressing, failed
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.change_seconds = Histogram(
            "tidegate_operator_change_seconds",
            "From the event of a changed Model or Pool to the end of the reconcile that took it in.",
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.writes = Counter(
            "tidegate_operator_writes",
            "Writes to the API server, by kind of object and what was done.",
            ["kind", "verb"],
            registry=self._registry,
        )
        self.queue_depth = Gauge(
            "tidegate_operator_queue_depth", "Pools that wait for a reconcile.", registry=self._registry
        )
        self.leading = Gauge(
            "tidegate_operator_leading", "1 while this process holds the Lease.", registry=self._registry
        )
        self.objects = Gauge(
            "tidegate_operator_objects", "Objects that are known, by kind.", ["kind"], registry=self._registry
        )

    def show(self, cache: Cache, namespaces: Iterable[str], is_followed: Callable[[str], bool]) -> None:
        """Tell from now on which Models, Pools and namespaces are ready, as they are when asked."""
        self._registry.register(_Readiness(cache, tuple(namespaces), is_followed))

    def count_write(self, kind: str, verb: str) -> None:
        self.writes.labels(kind, verb).inc()

    def text(self) -> bytes:
        """Return the exposition format of Prometheus."""
        return generate_latest(self._registry)


class _Readiness(Collector):
    """The label of the namespace is not `namespace`: Prometheus gives that to where it was read."""

    def __init__(self, cache: Cache, namespaces: tuple[str, ...], is_followed: Callable[[str], bool]) -> None:
        self._cache = cache
        self._namespaces = namespaces
        self._is_followed = is_followed

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        models = GaugeMetricFamily(
            "tidegate_model_ready",
            "1 while the Model is Ready.",
            labels=["resource_namespace", "model", "pool"],
        )
        pools = GaugeMetricFamily(
            "tidegate_pool_ready", "1 while the Pool is Ready.", labels=["resource_namespace", "pool"]
        )
        for body in filterfalse(is_deleting, self._cache.everywhere("Model")):
            models.add_metric([*_place(body), pool_of(body)], _is_ready(body))
        for body in filterfalse(is_deleting, self._cache.everywhere("Pool")):
            pools.add_metric(_place(body), _is_ready(body))
        yield from (models, pools)
        followed = GaugeMetricFamily(
            "tidegate_namespace_ready",
            "1 while the operator may follow the namespace, and it stays.",
            labels=["resource_namespace"],
        )
        for namespace in self._namespaces:
            followed.add_metric([namespace], self._is_followed(namespace))
        yield followed


def _place(body: Body) -> list[str]:
    return [str(body["metadata"]["namespace"]), str(body["metadata"]["name"])]


def _is_ready(body: Body) -> bool:
    conditions = (body.get("status") or {}).get("conditions") or ()
    return any(item.get("type") == READY and item.get("status") == "True" for item in conditions)
