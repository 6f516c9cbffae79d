"""Finds what a configuration bounds by a number of tokens, and makes the bounds small for a while.

A model may be right up to its window and wrong beyond it, and no short prompt tells. Passing a window of
4,096 tokens takes minutes on a CPU; so the self-check makes the bounds small instead. Where they stand they
are asked for at every call (masks and caches read the configuration, a few layers a copy of their own), so a
short prompt passes them as a long one passes the true ones. A bound that something else was made of when
the model was (gpt_neo's mask) does not follow; that shows, as making it small changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

SMALL = 12  # tokens: some of the probe's rows stay below, one passes it while it decodes
ORIGINAL = "original_max_position_embeddings"
BOUNDS = re.compile(rf"window|chunk_size$|^local_attention$|floor_scale$|_n_floor$|^{ORIGINAL}$")
NO_BOUNDS = re.compile(r"max_window_layers|pattern|feed_forward|lm_head")
# How a state is scanned, and from where a scale grows that a model may not use.
NEUTRAL = re.compile(rf"^(mamba_)?chunk_size$|floor|^{ORIGINAL}$")
FULL_ONLY = {"full_attention"}
WINDOWS = re.compile(r"window|attention_chunk")


def named_bounds(model: Any, context_length: int) -> dict[str, int]:
    """Return the fields that bound attention or a scan within the context, with the greatest such value."""
    text = model.config.get_text_config(decoder=True)
    unused = [NO_BOUNDS]
    if _is_full(text):
        unused.append(WINDOWS)
    if rotary_switch(model):
        unused.append(re.compile(ORIGINAL))  # what has changed there stays apart from the plain forward pass
    found: dict[str, int] = {}
    for fields in _places(text):
        for name, value in fields.items():
            is_bound = type(value) is int and SMALL < value < context_length and BOUNDS.search(name)
            if is_bound and not any(pattern.search(name) for pattern in unused):
                found[name] = max(value, found.get(name, 0))
    return found


@contextmanager
def made_small(model: Any, names: Collection[str]) -> Iterator[None]:
    """Let the fields be SMALL, wherever the model looks them up. What differs stays different."""
    configs = {id(config): config for module in model.modules() if (config := _text_config(module))}
    places: list[MutableMapping[str, Any]] = [
        *(fields for config in configs.values() for fields in _places(config)),
        *(module.__dict__ for module in model.modules()),
    ]
    held = [
        (fields, name, fields[name])
        for fields in places
        for name in names
        if type(fields.get(name)) is int and fields[name] > SMALL
    ]
    sizes = {name: sorted({value for _, other, value in held if other == name}) for name in names}
    try:
        for fields, name, value in held:
            fields[name] = SMALL + sizes[name].index(value)
        yield
    finally:
        for fields, name, value in held:
            fields[name] = value


def rotary_switch(model: Any) -> int | None:
    """Return after how many tokens a row's rotary factors change, all of its own and its neighbours' at
    once; None where they never do."""
    text = model.config.get_text_config(decoder=True)
    found = []
    for parameters in _rope_parameters(text):
        kind = parameters.get("rope_type")
        if kind == "longrope" or "long_mscale" in parameters:  # phimoe's own
            found.append(parameters.get(ORIGINAL) or getattr(text, ORIGINAL, None))
        elif kind == "dynamic" and not parameters.get("alpha"):  # hunyuan's, which are fixed
            found.append(text.max_position_embeddings)
    return min((int(value) for value in found if value), default=None)


def sparse_limit(model: Any) -> int | None:
    """Return up to how many tokens sparse attention sees every key; None where attention is not sparse.
    Past it an indexer picks, and ties among what it picks from make a model contradict itself."""
    text = model.config.get_text_config(decoder=True)
    if _is_full(text):
        return None
    found = []
    for fields in _places(text):
        blocks, size = fields.get("index_topk_blocks"), fields.get("index_block_size")
        found.append(blocks * size if type(blocks) is type(size) is int else fields.get("index_topk"))
    return min((value for value in found if type(value) is int), default=None)


def _is_full(text: Any) -> bool:
    """Tell whether layers say that they see everything, whatever windows stand beside it."""
    return set(vars(text).get("layer_types") or ()) == FULL_ONLY


def _text_config(module: Any) -> Any:
    """Return what a part of a model goes by, which may be a copy of the whole model's."""
    config = module.__dict__.get("config")
    return config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else None


def _places(text: Any) -> list[MutableMapping[str, Any]]:
    """Return where a configuration holds fields: its own, those of layers that differ, the rotary ones."""
    layers = text._heterogeneity_spec.per_layer_overrides.values() if text.is_heterogeneous else ()
    return [vars(text), *layers, *_rope_parameters(text)]


def _rope_parameters(text: Any) -> list[MutableMapping[str, Any]]:
    """Return the rotary parameters, of which there may be one set for each type of layer."""
    whole = vars(text).get("rope_parameters") or {}
    inner = [value for value in whole.values() if isinstance(value, MutableMapping)]
    return inner if inner and "rope_type" not in whole else [whole]
