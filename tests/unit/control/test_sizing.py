"""A replica's memory as a sum that a person can check."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.control.builders import model
from tidegate.control.observed import DecoderShape, SourceState
from tidegate.control.resources import ModelSpec
from tidegate.control.sizing import (
    CONTEXT_SLACK,
    MOST_DEFAULT_ROWS,
    RUNTIME_BYTES,
    WEIGHTS_OVERHEAD,
    UnknownArchitecture,
    kv_cache_bytes,
    replica_bytes,
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
) -> SourceState:
    return SourceState("resolved", "/w", weights, quantization, precision, shape=shape)


def test_the_sum_of_an_8b_llama() -> None:
    # 2 x 32 layers x 8 heads x 128 x 2 bytes are 128 KiB per token (Llama 3's known figure).
    row = (4096 + CONTEXT_SLACK) * 128 * 1024
    found = replica_bytes(spec(contextLength=4096, engine={"name": "transformers", "maxSlots": 4}), source())
    assert found.bytes == int(16 * GIB * WEIGHTS_OVERHEAD) + 4 * row + RUNTIME_BYTES
    assert found.text == "weights 16.80 GiB + KV cache 2.03 GiB + runtime 1.00 GiB = 19.83 GiB"


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
    assert wide - RUNTIME_BYTES == pytest.approx(2 * (stored - RUNTIME_BYTES), rel=0.01)
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


@given(st.integers(1, 1 << 42), st.integers(1, 1 << 20))
def test_a_cache_nobody_sized_holds_one_request_and_seldom_outgrows_the_weights(
    weights: int, context: int
) -> None:
    wanted = spec(contextLength=context)
    row = kv_cache_bytes(
        spec(contextLength=context, engine={"name": "transformers", "maxSlots": 1}), source()
    )
    cache = kv_cache_bytes(wanted, source(weights))
    assert row <= cache <= MOST_DEFAULT_ROWS * row
    assert cache == row or cache <= weights


def test_the_engine_counts_alike() -> None:
    """The engine has its own numbers, as it may not import this package and this may not import it."""
    from tidegate.engines.transformers import kv, memory

    assert (memory.LOADING_OVERHEAD, memory.CUDA_RUNTIME_BYTES) == (WEIGHTS_OVERHEAD, RUNTIME_BYTES)
    assert kv.COLUMN_SLACK == CONTEXT_SLACK
