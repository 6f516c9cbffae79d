"""Tells from a config what recurrent layers keep of a request: those of state-space models, linear attention,
and hybrids with attention. Pure.

A layer keeps what its convolution still sees (channels x kernel) and what its recurrence has summed up. The
engine measures the same when it loads; placement must know it before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Types whose layers are all recurrent, and whose layers all have both, which their configs do not say.
PURE = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
BOTH = ("falcon_h1",)
RECURRENT = ("mamba", "mamba2", "linear_attention", "conv", "recurrent")
HYBRID = ("hybrid", "hybrid_sliding")
ATTENTION = ("attention", "full_attention", "sliding_attention", "chunked_attention", *HYBRID)
PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # nemotron_h's


def recurrent_layers(config: Mapping[str, Any], layers: int) -> tuple[int, int, int]:
    """Return how many layers a decoder has (`layers`, where its config lists none), how many of them have no
    keys and values, and how many numbers all keep of a row beside these."""
    kinds = _kinds(config, layers)
    state = sum(kind in RECURRENT or kind in HYBRID for kind in kinds) * _numbers(config)
    if not state:  # where its size is not known, keys and values are the most that a layer keeps
        return layers, 0, 0
    return len(kinds), sum(kind not in ATTENTION for kind in kinds), state


def _kinds(config: Mapping[str, Any], layers: int) -> list[str]:
    if config.get("model_type") in PURE:
        return ["mamba"] * layers
    if config.get("model_type") in BOTH:
        return ["hybrid"] * layers
    for name in ("layer_types", "layers_block_type", "block_types"):
        if isinstance(found := config.get(name), list) and found:
            return [str(found[layer % len(found)]) for layer in range(layers or len(found))]
    if isinstance(pattern := config.get("hybrid_override_pattern"), str):
        return [PATTERN.get(letter, "") for letter in pattern]
    if isinstance(found := config.get("attn_layer_indices"), list):
        return ["attention" if layer in found else "mamba" for layer in range(layers)]
    period, offset = _number(config, "attn_layer_period"), _number(config, "attn_layer_offset")
    if period:
        return ["attention" if layer % period == offset else "mamba" for layer in range(layers)]
    every = _number(config, "full_attention_interval")
    if every and "linear_num_value_heads" in config:
        return [
            "full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(layers)
        ]
    return []


def _numbers(config: Mapping[str, Any]) -> int:
    """Return how many numbers one recurrent layer keeps of a row; 0: not known."""
    hidden = _number(config, "hidden_size")
    if config.get("model_type") == "rwkv":
        return 5 * hidden  # of float32 at most
    if kernel := _number(config, "conv1d_width"):  # recurrent_gemma
        return (_number(config, "lru_width") or hidden) * kernel
    if kernel := _number(config, "conv_L_cache"):
        return hidden * kernel
    if kernel := _number(config, "linear_conv_kernel_dim"):
        if heads := _number(config, "linear_num_heads"):  # kimi_linear
            size = _number(config, "linear_head_dim")
            return 3 * heads * size * kernel + heads * size * size
        heads, width = (_number(config, f"linear_{name}") for name in ("num_value_heads", "value_head_dim"))
        keys = _number(config, "linear_key_head_dim")
        channels = 2 * _number(config, "linear_num_key_heads") * keys + heads * width
        return channels * kernel + heads * keys * width
    kernel = _number(config, "mamba_d_conv", "conv_kernel")
    state = _number(config, "mamba_d_state", "ssm_state_size", "state_size")
    inner = _inner(config, hidden)
    # The second generation convolves what the state is made of as well.
    groups = _number(config, "mamba_n_groups", "mamba_ngroups", "n_groups")
    return (inner + 2 * groups * state) * kernel + inner * state


def _inner(config: Mapping[str, Any], hidden: int) -> int:
    """Return how many channels a Mamba layer has."""
    if found := _number(config, "mamba_d_ssm"):
        return found
    is_own = config.get("model_type") in PURE
    heads = _number(config, "mamba_n_heads", "mamba_num_heads", *(["num_heads"] if is_own else []))
    size = _number(config, "mamba_d_head", "mamba_head_dim", *(["head_dim"] if is_own else []))
    if heads and size:
        return heads * size
    if is_own and (found := _number(config, "intermediate_size")):
        return found
    return _number(config, "mamba_expand", "expand") * hidden


def _number(config: Mapping[str, Any], *names: str) -> int:
    found = (config.get(name) for name in names)
    return next((each for each in found if type(each) is int and each > 0), 0)
