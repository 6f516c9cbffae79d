"""Measures what requests hold in a model's cache, and tells what an arena would hold of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from tidegate.engines.base import is_out_of_memory
from tidegate.engines.transformers.batch import ERRORS, Forward, RowByRow
from tidegate.engines.transformers.kv import LayerKind


@dataclass(frozen=True, slots=True)
class KvSize:
    """What requests hold in the KV cache. No `layers`: they are of another kind than an arena holds."""

    layers: tuple[LayerKind, ...]
    bytes_per_token: int
    bytes_per_row: int = 0  # beside its tokens: the state of recurrent layers

    def of_row(self, tokens: int) -> int:
        return self.bytes_per_row + tokens * self.bytes_per_token


def measure_kv(model: Any) -> KvSize:
    """Measure the cache of a few tokens: exact for every architecture but for windows, which bound it."""
    tokens = 2
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    # Without the configuration layers hold keys and values of all tokens, which windows bound otherwise.
    for named in ({}, {"config": model.config}):
        try:
            cache = DynamicCache(**named)
            Forward(model)(ids, cache=cache)
        except ERRORS as error:
            if is_out_of_memory(error):
                raise
            continue
        kinds = [layer_kind(layer) for layer in cache.layers]
        if kinds and None not in kinds:
            per_token = sum(tensor_bytes(kept(layer, TOKENS), set()) for layer in cache.layers) // tokens
            per_row = sum(tensor_bytes(kept(layer, STATES), set()) for layer in cache.layers)
            return KvSize(tuple(kind for kind in kinds if kind is not None), per_token, per_row)
    return measure_alone(model)


TOKENS, STATES = ("keys", "values"), ("conv_states", "recurrent_states")
MIXED = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)


def layer_kind(layer: Any) -> LayerKind | None:
    """Return what the arena holds of a layer of transformers' own cache; None: it holds no such layer."""
    if type(layer) is DummyLayer:
        return LayerKind(has_tokens=False)
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return LayerKind() if layer.is_initialized else None
    if type(layer) is LinearAttentionLayer or type(layer) in MIXED:
        if not any(layer.has_previous_state.values()):
            return None  # it keeps its states elsewhere
        return LayerKind(has_tokens=type(layer) in MIXED, states=layer.number_of_states)
    return None


def kept(layer: Any, names: Sequence[str]) -> list[Any]:
    return [getattr(layer, name, None) for name in names]


def measure_alone(model: Any) -> KvSize:
    """Measure what a row holds that runs by itself."""

    def held(length: int) -> int:
        batch = RowByRow(model)
        batch.join([[0] * length])
        return tensor_bytes([batch.rows[0].kwargs, batch.rows[0].states], set())

    return measure_rows(held)


def measure_rows(held: Callable[[int], int]) -> KvSize:
    """Measure by the bytes that a row of so many tokens has `held`; 0 where none can run, of which the
    self-check says why."""
    short, long = 2, 10  # tokens
    try:
        few, many = held(short), held(long)
    except ERRORS as error:
        if is_out_of_memory(error):
            raise
        return KvSize((), 0)
    per_token = -(-max(0, many - few) // (long - short))
    return KvSize((), per_token, max(0, few - short * per_token))


def tensor_bytes(value: Any, seen: set[int]) -> int:
    """Sum the tensors that a cache holds, whatever it is made of; each counts once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(part, seen) for part in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(part, seen) for part in value)
    is_cache = type(value).__module__.startswith("transformers.") and not isinstance(value, PreTrainedConfig)
    return tensor_bytes(vars(value), seen) if is_cache and hasattr(value, "__dict__") else 0
