"""Holds the operator's metrics in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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

    def count_write(self, kind: str, verb: str) -> None:
        self.writes.labels(kind, verb).inc()

    def text(self) -> bytes:
        """Return the exposition format of Prometheus."""
        return generate_latest(self._registry)
