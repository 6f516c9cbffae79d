"""Whether one replica fits the machine at all. Pure."""

from __future__ import annotations

from tidegate.control.observed import Capacity, SourceState
from tidegate.control.resources import ModelSpec


def misfit(spec: ModelSpec, source: SourceState | None, capacity: Capacity) -> tuple[str, str] | None:
    """(reason, sentence with the sum) where one replica can never be placed; None where it may."""
    wanted = spec.resources
    if wanted.cpus > capacity.cpus:
        return (
            "TooFewCpus",
            f"One replica asks for {wanted.cpus:g} CPU cores and the machine has {capacity.cpus:g}; "
            "lower spec.resources.cpus.",
        )
    if wanted.gpus > capacity.gpus:
        return (
            "TooFewGpus",
            f"One replica asks for {wanted.gpus:g} GPUs and the machine has {capacity.gpus:g}; "
            "lower spec.resources.gpus, or set device to cpu.",
        )
    weights = source.weights_bytes if source is not None else 0
    # Only host memory is known before loading; a checkpoint that is larger can not even be read in.
    if capacity.memory_bytes and weights > capacity.memory_bytes:
        return (
            "TooLittleMemory",
            f"The weights take {gib(weights)} and the machine has {gib(capacity.memory_bytes)} of memory; "
            "use a smaller or quantized checkpoint.",
        )
    return None


def gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
