from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from tidegate.engines.transformers.bounds import (
    ORIGINAL,
    SMALL,
    made_small,
    named_bounds,
    rotary_switch,
    sparse_limit,
)


def model_of(kind: str, *modules: Any, **fields: Any) -> Any:
    return SimpleNamespace(config=AutoConfig.for_model(kind, **deepcopy(fields)), modules=lambda: modules)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


LONG = rope("longrope", short_factor=[1.0], long_factor=[2.0], original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("kind", "fields", "bounds"),
    [
        ("llama", {}, {}),
        ("mistral", {"sliding_window": 100}, {"sliding_window": 100}),
        ("mistral", {"sliding_window": 1000}, {}),  # never reached in the context
        ("mistral", {"sliding_window": None}, {}),
        ("gemma3", {"text_config": {"sliding_window": 100}}, {"sliding_window": 100}),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, {}),
        ("qwen3", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 4}, 100),
        ("dots1", {"sliding_window": 100, "layer_types": ["full_attention"] * 62}, {}),
        ("gpt_neo", {"window_size": 100}, {"window_size": 100}),
        ("mamba2", {"chunk_size": 100}, {"chunk_size": 100}),
        ("llama4_text", {"attention_chunk_size": 100, "floor_scale": 50}, None),
        ("flint", {}, {"sliding_window": 513}),
    ],
)
def test_bounds_within_the_context_are_found(kind: str, fields: dict[str, Any], bounds: Any) -> None:
    context = 600 if kind == "flint" else 200
    if bounds is None:
        bounds = {"attention_chunk_size": 100, "floor_scale": 50}
    elif bounds == 100:
        bounds = {"sliding_window": 100}
    assert named_bounds(model_of(kind, **fields), context) == bounds


def test_bounds_are_small_for_a_while_where_they_are_asked_for() -> None:
    inner = AutoConfig.for_model("gemma3_text", sliding_window=100)  # a part's own copy
    part = SimpleNamespace(config=inner)
    layers = [SimpleNamespace(sliding_window=window) for window in (100, 200, None)]
    model = model_of("gemma3", part, *layers, text_config={"sliding_window": 100})
    with pytest.raises(ZeroDivisionError), made_small(model, ["sliding_window"]):
        assert inner.sliding_window == SMALL
        assert [layer.sliding_window for layer in layers] == [SMALL, SMALL + 1, None]
        raise ZeroDivisionError
    assert inner.sliding_window == 100
    assert [layer.sliding_window for layer in layers] == [100, 200, None]


@pytest.mark.parametrize(
    ("kind", "fields", "switch"),
    [
        ("llama", {}, None),
        ("llama", {"rope_parameters": rope("linear", factor=2.0)}, None),
        ("llama", {"rope_parameters": rope("yarn", factor=2.0, original_max_position_embeddings=64)}, None),
        ("llama", {"rope_parameters": LONG}, 64),
        ("phi3", {"rope_parameters": LONG, "hidden_size": 64, ORIGINAL: 64}, 64),
        ("llama", {"rope_parameters": rope("dynamic", factor=2.0), "max_position_embeddings": 80}, 80),
        ("hunyuan_v1_dense", {"rope_parameters": rope("dynamic", factor=2.0, alpha=1000.0)}, None),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": rope("default"), "full_attention": LONG}},
            64,
        ),
    ],
)
def test_where_rotary_factors_change(kind: str, fields: dict[str, Any], switch: int | None) -> None:
    assert rotary_switch(model_of(kind, **fields)) == switch


def test_up_to_where_sparse_attention_sees_everything() -> None:
    assert sparse_limit(model_of("deepseek_v32", index_topk=64)) == 64
    blocks = {"index_topk_blocks": 3, "index_block_size": 8, "num_hidden_layers": 1}
    assert sparse_limit(model_of("minimax_m3_vl_text", layer_types=["minimax_m3_sparse"], **blocks)) == 24
    assert sparse_limit(model_of("minimax_m3_vl_text", layer_types=["full_attention"], **blocks)) is None
    assert sparse_limit(model_of("llama")) is None
