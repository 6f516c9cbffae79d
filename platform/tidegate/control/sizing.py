"""Sizing: the memory that one replica takes, and whether it fits a machine at all. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.control.observed import Capacity, SourceState
from tidegate.control.resources import ModelSpec
from tidegate.control.schema_types import size_bytes
from tidegate.sources.facts import (
    CONTEXT_SLACK,
    CUDA_RUNTIME_BYTES,
    PRECISION_BYTES,
    PREFIX_SHARE,
    WEIGHTS_OVERHEAD,
    kv_bytes_per_token,
    state_bytes,
)

# A KV cache that nobody asked a size for: as large as the weights, but between one and `maxSlots`, or this
# many, requests of full context. Requests take what their tokens need, so more than these run in it.
MOST_DEFAULT_ROWS = 8


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """Accelerator memory of one replica. `text` writes the sum out for a person."""

    bytes: int
    text: str


class UnknownArchitecture(Exception):
    """The checkpoint's config does not say what the KV cache takes."""


def replica_bytes(spec: ModelSpec, source: SourceState | None) -> ReplicaMemory:
    """Return the accelerator memory of one replica: what the spec says, or the sum over its checkpoint.

    Raises `UnknownArchitecture` where neither is known.
    """
    if spec.resources.gpu_memory:
        asked = size_bytes(spec.resources.gpu_memory)
        return ReplicaMemory(asked, f"resources.gpuMemory {gib(asked)}")
    if spec.source is None:
        return ReplicaMemory(0, "the simulated engine takes none")
    if source is None:
        raise UnknownArchitecture("The checkpoint is not known yet.")
    weights = int(_loaded_weights(spec, source) * WEIGHTS_OVERHEAD)
    cache = kv_cache_bytes(spec, source)
    total = weights + cache + CUDA_RUNTIME_BYTES
    return ReplicaMemory(
        total,
        f"weights {gib(weights)} + KV cache {gib(cache)} + runtime {gib(CUDA_RUNTIME_BYTES)} = {gib(total)}",
    )


def kv_cache_bytes(spec: ModelSpec, source: SourceState) -> int:
    """Return the bytes of one replica's KV cache: none where nothing is generated. Raises
    `UnknownArchitecture`."""
    if asked_task(spec, source) != "generate":
        return 0
    if spec.engine.kv_cache_bytes:
        return spec.engine.kv_cache_bytes
    context = spec.context_length or source.shape.positions
    # A model without attention keeps as much of any context.
    if not source.shape.is_known or (source.shape.kv_layers and not context):
        raise UnknownArchitecture(
            "The checkpoint's config.json does not say what its KV cache takes "
            "(num_hidden_layers, num_key_value_heads, head_dim, max_position_embeddings)."
        )
    columns = context + CONTEXT_SLACK
    per_token = kv_bytes_per_token(source.shape, _compute_precision(spec, source))
    row = columns * per_token + state_bytes(source.shape)
    args, kept = spec.engine.args, 0
    # A state is of all tokens before: no other prompt can begin with it.
    if not state_bytes(source.shape) and args.get("prefix_cache", True):
        kept = int(args.get("prefix_cache_bytes", 0))
        row += 0 if kept else -(-row // PREFIX_SHARE)
    most = spec.engine.max_slots or MOST_DEFAULT_ROWS
    return row * max(1, min(most, _loaded_weights(spec, source) // row)) + kept


def asked_task(spec: ModelSpec, source: SourceState | None) -> str:
    """Return what the model does: what the spec says, else what its checkpoint is for."""
    found = source.task if source is not None else ""
    return (spec.task if spec.task != "auto" else found) or "generate"


def misfit(spec: ModelSpec, source: SourceState | None, capacity: Capacity) -> tuple[str, str] | None:
    """Return (reason, sentence with the sum) where one replica can never be placed; None where it may."""
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


def _loaded_weights(spec: ModelSpec, source: SourceState) -> int:
    """Return the bytes of the weights in the precision that is computed in."""
    if source.weights.is_known:
        return source.weights.loaded_bytes(_compute_precision(spec, source))
    # A record of the version before: the files' bytes, and in `precision` the type of most values.
    stored, wanted = PRECISION_BYTES.get(source.precision), PRECISION_BYTES.get(spec.precision)
    if source.quantization in ("", "none") and stored and wanted:
        return source.weights_bytes * wanted // stored
    return source.weights_bytes


def _compute_precision(spec: ModelSpec, source: SourceState) -> str:
    return spec.precision if spec.precision != "auto" else source.precision or "float32"
