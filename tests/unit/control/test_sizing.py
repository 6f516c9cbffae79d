"""A replica's memory as a sum that a person can check."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.control.builders import model
from tidegate.control.observed import SourceState
from tidegate.control.resources import ModelSpec
from tidegate.control.sizing import (
    MOST_DEFAULT_ROWS,
    UnknownArchitecture,
    kv_cache_bytes,
    replica_bytes,
)
from tidegate.sources.facts import (
    CONTEXT_SLACK,
    CUDA_RUNTIME_BYTES,
    PRECISION_BYTES,
    WEIGHTS_OVERHEAD,
    DecoderShape,
    StoredWeights,
)

GIB = 1 << 30
LLAMA_8B = DecoderShape(layers=32, kv_heads=8, head_dim=128, hidden=4096, vocab=128_256, positions=8192)


def spec(**fields: Any) -> ModelSpec:
    return model(**{"engine": {"name": "transformers"}, "source": {"uri": "/w"}, **fields}).spec


def source(
    weights: int = 16 * GIB,
    precision: str = "bfloat16",
    quantization: str = "none",
    shape: DecoderShape = LLAMA_8B,
    stored: str = "",
) -> SourceState:
    """A checkpoint whose weights take so much on disk, stored in `stored` and computed in `precision`."""
    loaded = StoredWeights(weights // PRECISION_BYTES[stored or precision])
    if quantization != "none":
        loaded = StoredWeights(fixed_bytes=weights)
    return SourceState("resolved", "/w", weights, quantization, precision, shape=shape, weights=loaded)


def test_the_sum_of_an_8b_llama() -> None:
    # 2 x 32 layers x 8 heads x 128 x 2 bytes are 128 KiB per token (Llama 3's known figure).
    # One eighth more keeps what prompts begin with.
    row = (4096 + CONTEXT_SLACK) * 128 * 1024 * 9 // 8
    found = replica_bytes(spec(contextLength=4096, engine={"name": "transformers", "maxSlots": 4}), source())
    assert found.bytes == int(16 * GIB * WEIGHTS_OVERHEAD) + 4 * row + CUDA_RUNTIME_BYTES
    assert found.text == "weights 16.80 GiB + KV cache 2.29 GiB + runtime 1.00 GiB = 20.09 GiB"


def test_prompts_that_are_not_kept_take_no_memory() -> None:
    engine = {"name": "transformers", "maxSlots": 4, "args": {"prefix_cache": False}}
    assert kv_cache_bytes(spec(contextLength=4096, engine=engine), source()) == (
        4 * (4096 + CONTEXT_SLACK) * 128 * 1024
    )


def test_prompts_that_are_kept_take_the_memory_that_is_asked_for_them() -> None:
    engine = {"name": "transformers", "maxSlots": 4, "args": {"prefix_cache_bytes": 3 * GIB}}
    assert kv_cache_bytes(spec(contextLength=4096, engine=engine), source()) == (
        4 * (4096 + CONTEXT_SLACK) * 128 * 1024 + 3 * GIB
    )


@pytest.mark.parametrize(("asked", "found"), [("auto", "embed"), ("embed", "generate"), ("score", "score")])
def test_what_generates_nothing_has_no_cache(asked: str, found: str) -> None:
    shape = replace(source(shape=DecoderShape()), task=found)
    assert (
        replica_bytes(spec(task=asked), shape).bytes == int(16 * GIB * WEIGHTS_OVERHEAD) + CUDA_RUNTIME_BYTES
    )


def test_what_is_written_down_stands() -> None:
    assert replica_bytes(spec(resources={"gpuMemory": "10Gi"}), None).bytes == 10 * GIB
    wanted = spec(engine={"name": "transformers", "kvCacheBytes": 12345})
    assert kv_cache_bytes(wanted, source()) == 12345


def test_a_simulated_engine_takes_what_its_checkpoint_would() -> None:
    assert replica_bytes(model().spec, None).bytes == 0
    assert replica_bytes(model(source={"uri": "/w"}).spec, source()).bytes > 16 * GIB


def test_another_precision_changes_weights_and_cache() -> None:
    stored = replica_bytes(spec(), source()).bytes
    wide = replica_bytes(spec(precision="float32"), source()).bytes
    assert wide - CUDA_RUNTIME_BYTES == pytest.approx(2 * (stored - CUDA_RUNTIME_BYTES), rel=0.01)
    # GPTQ's weights stay as they are stored, only its cache grows.
    packed = source(4 * GIB, "float16", "gptq")
    wanted = {"name": "transformers", "maxSlots": 1}
    narrow = replica_bytes(spec(engine=wanted), packed).bytes
    assert replica_bytes(spec(engine=wanted, precision="float32"), packed).bytes - narrow == (
        kv_cache_bytes(spec(engine=wanted), packed)
    )


@pytest.mark.parametrize(
    "shape", [DecoderShape(), DecoderShape(layers=2, kv_heads=2, head_dim=8), DecoderShape(positions=99)]
)
def test_an_unknown_architecture_is_no_guess(shape: DecoderShape) -> None:
    with pytest.raises(UnknownArchitecture, match=r"config\.json does not say"):
        replica_bytes(spec(), source(shape=shape))


@pytest.mark.parametrize(("without_kv", "context"), [(64, 0), (64, 1 << 20), (60, 8192)])
def test_states_are_counted_for_each_request(without_kv: int, context: int) -> None:
    """Those of a model without attention alone, whatever the context."""
    shape = DecoderShape(layers=64, kv_heads=8, head_dim=128, without_kv=without_kv, state=1000)
    wanted = spec(contextLength=context, engine={"name": "transformers", "maxSlots": 3})
    row = 4 * 1000 + (64 - without_kv) * (context + CONTEXT_SLACK) * 2 * 8 * 128 * 2
    assert kv_cache_bytes(wanted, source(shape=shape)) == 3 * row


def test_many_requests_of_a_long_context_need_no_memory_for_all_of_it_each() -> None:
    """They run by the tokens that they hold: a card of 80 GB serves 64 at once."""
    wanted = spec(contextLength=131_072, engine={"name": "transformers", "maxSlots": 64})
    row = (131_072 + CONTEXT_SLACK) * 128 * 1024 * 9 // 8
    assert kv_cache_bytes(wanted, source()) == row
    assert replica_bytes(wanted, source()).bytes < 40 * GIB


@given(st.integers(1, 1 << 42), st.integers(1, 1 << 20), st.integers(0, 4096))
def test_a_cache_nobody_sized_holds_one_request_and_seldom_outgrows_the_weights(
    weights: int, context: int, slots: int
) -> None:
    wanted = spec(contextLength=context, engine={"name": "transformers", "maxSlots": slots})
    row = kv_cache_bytes(
        spec(contextLength=context, engine={"name": "transformers", "maxSlots": 1}), source()
    )
    cache = kv_cache_bytes(wanted, source(weights))
    assert row <= cache <= (slots or MOST_DEFAULT_ROWS) * row
    assert cache == row or cache <= weights


@pytest.mark.parametrize(
    ("stored", "named", "asked", "loaded"),
    [
        ("bfloat16", "float32", "auto", 32 * GIB),  # the fault that placed it with half of what it takes
        ("float32", "bfloat16", "auto", 8 * GIB),
        ("bfloat16", "bfloat16", "auto", 16 * GIB),
        ("float32", "bfloat16", "float32", 16 * GIB),
        ("bfloat16", "float32", "float16", 16 * GIB),
    ],
)
def test_weights_and_cache_follow_what_is_computed_in(
    stored: str, named: str, asked: str, loaded: int
) -> None:
    wanted = spec(precision=asked, engine={"name": "transformers", "maxSlots": 1})
    found = source(16 * GIB, named, stored=stored)
    computed = named if asked == "auto" else asked
    cache = (8192 + CONTEXT_SLACK) * 2 * 32 * 8 * 128 * PRECISION_BYTES[computed] * 9 // 8
    assert replica_bytes(wanted, found).bytes == int(loaded * WEIGHTS_OVERHEAD) + cache + CUDA_RUNTIME_BYTES


def test_mixed_storage_is_loaded_in_one_precision() -> None:
    """One GiB of float32 norms among bfloat16, and integers that stay."""
    mixed = StoredWeights(float_values=(4 * GIB) // 2 + GIB // 4, fixed_bytes=GIB)
    found = SourceState("resolved", "/w", 6 * GIB, "none", "bfloat16", shape=LLAMA_8B, weights=mixed)
    wanted = spec(engine={"name": "transformers", "kvCacheBytes": 1})
    loaded = 4 * GIB + GIB // 2 + GIB
    assert replica_bytes(wanted, found).bytes == int(loaded * WEIGHTS_OVERHEAD) + 1 + CUDA_RUNTIME_BYTES


def test_a_record_of_the_version_before_takes_what_it_took() -> None:
    """It holds the files' bytes, and as `precision` the type of most values."""
    engine = {"name": "transformers", "kvCacheBytes": 1}
    old = SourceState("resolved", "/w", 16 * GIB, "none", "bfloat16", shape=LLAMA_8B)
    for asked, loaded in (("auto", 16 * GIB), ("float16", 16 * GIB), ("float32", 32 * GIB)):
        found = replica_bytes(spec(precision=asked, engine=engine), old).bytes
        assert found == int(loaded * WEIGHTS_OVERHEAD) + 1 + CUDA_RUNTIME_BYTES
    packed = SourceState("resolved", "/w", 4 * GIB, "gptq", "float16", shape=LLAMA_8B)
    found = replica_bytes(spec(precision="float32", engine=engine), packed).bytes
    assert found == int(4 * GIB * WEIGHTS_OVERHEAD) + 1 + CUDA_RUNTIME_BYTES
