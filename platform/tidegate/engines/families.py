"""Writes an engine's own metrics as families (`messages.engine_metrics`) with the labels of its replica."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from tidegate.messages.engine_metrics import Family


def families(metrics: Iterable[Metric], labels: Mapping[str, str]) -> Iterator[Family]:
    """Yield each metric, whose samples get these labels beside their own."""
    for metric in metrics:
        metric.samples = [sample._replace(labels={**sample.labels, **labels}) for sample in metric.samples]
        lines = generate_latest(_Only(metric)).decode().splitlines(keepends=True)
        head = "".join(line for line in lines if line.startswith("#"))
        samples = "".join(line for line in lines if not line.startswith("#"))
        yield Family(metric.name, head, samples)


class _Only(CollectorRegistry):
    def __init__(self, metric: Any) -> None:
        super().__init__()
        self._metric = metric

    def collect(self) -> Iterator[Any]:
        yield self._metric
