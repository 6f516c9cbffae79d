"""vLLM's own metrics, told by a thread of its process whenever the replica asks for them."""

from __future__ import annotations

import socket

import msgspec
from prometheus_client import REGISTRY

from tidegate.engines.families import families
from tidegate.engines.frames import receive, send
from tidegate.messages.engine_metrics import encode_families

OWN = "vllm:"  # what their names begin with; Python's and the process's are of no use here


def tell(lane: socket.socket) -> None:
    """Answer each frame, the labels that all samples get, with what the metrics are then."""
    labels = msgspec.json.Decoder(dict[str, str])
    try:
        while (frame := receive(lane)) is not None:
            own = (metric for metric in REGISTRY.collect() if metric.name.startswith(OWN))
            send(lane, encode_families(list(families(own, labels.decode(frame)))))
    except ConnectionError:  # the replica is gone
        pass
