"""vLLM's own metrics, told by a thread of its process whenever the replica asks for them."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from tidegate.engines.frames import receive, send
from tidegate.messages.engine_metrics import Family, encode_families

OWN = "vllm:"  # what their names begin with; Python's and the process's are of no use here


def tell(lane: socket.socket) -> None:
    """Answer each frame, the labels that all samples get, with what the metrics are then."""
    labels = msgspec.json.Decoder(dict[str, str])
    try:
        while (frame := receive(lane)) is not None:
            send(lane, encode_families(list(families(REGISTRY, labels.decode(frame)))))
    except ConnectionError:  # the replica is gone
        pass


def families(registry: CollectorRegistry, labels: Mapping[str, str]) -> Iterator[Family]:
    for metric in registry.collect():
        if metric.name.startswith(OWN):
            metric.samples = [
                sample._replace(labels={**sample.labels, **labels}) for sample in metric.samples
            ]
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
