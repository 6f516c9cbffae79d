"""The precision rule, the shape of a decoder, and the bytes that follow from them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tidegate.sources.facts import (
    ANY_LENGTH,
    TRAINED,
    DecoderShape,
    StoredWeights,
    auto_precision,
    contradiction,
    decoder_shape,
    kv_bytes_per_token,
    task_of,
    text_config,
)


@pytest.mark.parametrize(
    ("config", "values", "expected"),
    [
        ({"dtype": "float32"}, {"BF16": 9}, "float32"),
        ({"dtype": "bfloat16"}, {"F32": 9}, "bfloat16"),
        ({"torch_dtype": "float16"}, {"F32": 9}, "float16"),
        ({"dtype": "torch.bfloat16"}, {"F16": 9}, "bfloat16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, {}, "bfloat16"),
        ({"text_config": {"dtype": "bfloat16"}}, {"F32": 9}, "bfloat16"),
        ({"dtype": "float16", "text_config": {"dtype": "bfloat16"}}, {"F32": 9}, "float16"),
        ({}, {"BF16": 9, "F32": 3}, "bfloat16"),
        ({}, {"BF16": 3, "F32": 9}, "float32"),
        ({}, {"F16": 3, "I32": 90}, "float16"),
        ({"dtype": "auto"}, {"F16": 3}, "float16"),
        ({"dtype": "float64"}, {"F64": 9, "F16": 1}, "float16"),
        ({}, {"I32": 9}, "float32"),
    ],
)
def test_what_auto_computes_in(config: dict[str, Any], values: dict[str, int], expected: str) -> None:
    assert auto_precision(config, values) == expected


def test_packed_weights_are_unpacked_in_float32() -> None:
    packed = StoredWeights(fixed_bytes=50, packed_values=80)
    assert packed.loaded_bytes("bfloat16") == 50
    assert packed.loaded_bytes("float32") == packed.unpacked_bytes("float32") == 320


def test_loading_converts_floats_only() -> None:
    weights = StoredWeights(float_values=10, fixed_bytes=7)
    assert [weights.loaded_bytes(name) for name in ("float32", "bfloat16", "float16")] == [47, 27, 27]
    assert not StoredWeights().is_known


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "hidden_size": 4096,
                "vocab_size": 9,
                "max_position_embeddings": 8192,
            },
            (32, 8, 128, 4096, 9, 8192),
        ),
        (
            {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "head_dim": 32},
            (2, 4, 32, 64, 0, 0),
        ),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}, (12, 12, 64, 768, 0, 1024)),
        (
            {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "multi_query": True},
            (2, 1, 16, 64, 0, 0),
        ),
        (
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "hidden_size": 64,
                "multi_query": True,
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
            },
            (2, 4, 16, 64, 0, 0),
        ),
        ({"text_config": {"num_hidden_layers": 3}, "num_hidden_layers": 99}, (3, 0, 0, 0, 0, 0)),
        ({"num_hidden_layers": "x", "hidden_size": -1}, (0, 0, 0, 0, 0, 0)),
        (
            {
                "is_encoder_decoder": True,
                "d_model": 512,
                "d_kv": 32,
                "num_heads": 6,
                "num_layers": 8,
                "num_decoder_layers": 4,
                "vocab_size": 9,
                "n_positions": 512,
                "relative_attention_num_buckets": 32,
            },
            (4, 6, 32, 512, 9, 512, ANY_LENGTH, True),
        ),
        (
            {
                "is_encoder_decoder": True,
                "d_model": 64,
                "num_hidden_layers": 12,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 4,
                "decoder_layers": 6,
                "max_position_embeddings": 1024,
            },
            (6, 4, 16, 64, 0, 1024, 0, True),
        ),
    ],
)
def test_the_shape_of_a_decoder(config: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert decoder_shape(config) == DecoderShape(*expected)


# Speech encoder-decoders and retrievers, of which nothing is served, with a name of their own for it.
OTHERWISE = {"canary", "dia", "colmodernvbert", "colpali", "colqwen2"}


def test_the_decoder_of_a_composite_is_the_one_that_transformers_finds() -> None:
    composites = set()
    for kind in sorted({*CONFIG_MAPPING_NAMES} - OTHERWISE):
        try:
            whole = CONFIG_MAPPING[kind]()
        except Exception:  # each checks its own fields, and a few have no default that passes
            continue
        config = json.loads(whole.to_json_string(use_diff=False))
        found, expected = text_config(config), whole.get_text_config(decoder=True)
        if whole.is_encoder_decoder and found is config:
            continue  # transformers makes a decoder of its fields
        assert (found is config) == (expected is whole), kind
        assert found["model_type"] == expected.model_type, kind
        decoder = decoder_shape(json.loads(expected.to_json_string(use_diff=False)))
        assert decoder_shape(config) == replace(decoder, has_encoder=whole.is_encoder_decoder), kind
        if expected is not whole:
            composites.add(kind)
    assert {"gemma3", "llama4", "qwen2_5_omni", "rag", "musicgen"} <= composites


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 4096),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4, TRAINED: 512}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}, TRAINED: 256}, 512),
        ({"text_config": {"n_positions": 8, "rope_scaling": {"type": "linear", "factor": 2}}}, 16),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, TRAINED: 128}}, 0),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8}}}, 0),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, 0),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, 0),
        ({"rope_scaling": {"type": "linear"}}, 0),
        ({"rope_scaling": "linear"}, 0),
        ({}, 0),
    ],
)
def test_what_rotary_scaling_covers(config: dict[str, Any], longest: int) -> None:
    assert decoder_shape({"max_position_embeddings": 1024} | config).longest == longest


@pytest.mark.parametrize(
    ("shape", "quantization", "context", "asked", "words"),
    [
        (DecoderShape(positions=128), "none", 128, "auto", ""),
        (
            DecoderShape(positions=128),
            "none",
            129,
            "auto",
            "contextLength is 129, but the checkpoint holds 128",
        ),
        (DecoderShape(positions=128, longest=512), "none", 512, "auto", ""),
        (DecoderShape(positions=128, longest=512), "none", 513, "auto", "the checkpoint holds 512 positions"),
        (DecoderShape(positions=128, longest=64), "none", 128, "none", ""),
        (DecoderShape(), "none", 9000, "none", ""),
        (DecoderShape(), "gptq", 0, "gptq", ""),
        (
            DecoderShape(),
            "none",
            0,
            "gptq",
            "quantization is gptq, but the checkpoint is not",
        ),
        (
            DecoderShape(),
            "gptq",
            0,
            "none",
            "quantization is none, but the checkpoint is q",
        ),
        (DecoderShape(), "", 0, "gptq", ""),
    ],
)
def test_what_a_checkpoint_cannot_give(
    shape: DecoderShape, quantization: str, context: int, asked: str, words: str
) -> None:
    told = contradiction(shape, quantization, asked_context=context, asked_quantization=asked)
    assert (words in told, bool(told)) == (True, bool(words))


@pytest.mark.parametrize(
    ("heads", "more", "has_modules", "task"),
    [
        (["LlamaForCausalLM"], {}, False, "generate"),
        (["GPT2LMHeadModel"], {}, False, "generate"),
        ([], {}, False, "generate"),
        (["BertModel"], {}, True, "embed"),
        (["BertForMaskedLM"], {}, False, "embed"),
        (["GPTNeoModel"], {}, False, "embed"),
        (["RoFormerModel"], {}, False, "embed"),
        (["Qwen2ForRewardModel"], {}, False, "generate"),  # which is refused
        (["Qwen3ForCausalLM"], {}, True, "embed"),
        (["BertForSequenceClassification"], {"id2label": {"0": "LABEL_0"}}, False, "score"),
        (["BertForSequenceClassification"], {"num_labels": 1}, True, "score"),
        (["BertForSequenceClassification"], {"id2label": {"0": "a", "1": "b"}}, False, "classify"),
        (["BertForSequenceClassification"], {}, False, "classify"),
    ],
)
def test_what_a_checkpoint_is_for(
    heads: list[str], more: dict[str, Any], has_modules: bool, task: str
) -> None:
    assert task_of({"architectures": heads, **more}, has_modules) == task


@pytest.mark.parametrize(
    ("task", "asked", "fits"),
    [
        ("embed", "auto", True),
        ("embed", "generate", False),
        ("generate", "embed", True),
        ("generate", "score", False),
        ("score", "classify", True),
        ("classify", "score", False),
        ("classify", "embed", True),
        ("", "generate", True),
    ],
)
def test_a_task_that_the_checkpoint_is_not_for(task: str, asked: str, fits: bool) -> None:
    told = contradiction(
        DecoderShape(), "none", asked_context=0, asked_quantization="auto", task=task, asked_task=asked
    )
    assert (told == "") == fits
    assert fits or told.startswith(f"task is {asked}, but the checkpoint is made to {task}")


def test_a_tokens_keys_and_values() -> None:
    shape = DecoderShape(layers=32, kv_heads=8, head_dim=128)
    assert kv_bytes_per_token(shape, "bfloat16") == 128 * 1024  # Llama 3 8B's known figure
    assert kv_bytes_per_token(shape, "float32") == 256 * 1024


MAMBA2 = {"hidden_size": 64, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
ONE = (128 + 2 * 16) * 4 + 128 * 16  # what its layers keep each


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 8, "attn_layer_indices": [2, 5]}, (8, 6, 6 * ONE)),
        ({"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1}, (8, 6, 6 * ONE)),
        ({"num_hidden_layers": 4, "model_type": "falcon_h1"}, (4, 0, 4 * ONE)),
        ({"hybrid_override_pattern": "M-M*E"}, (5, 4, 2 * ONE)),
        ({"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}, (4, 2, 4 * ONE)),
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, (4, 0, 0)),
        ({"num_hidden_layers": 4}, (4, 0, 0)),
    ],
)
def test_what_recurrent_layers_keep(config: dict[str, Any], expected: tuple[int, int, int]) -> None:
    shape = decoder_shape({**MAMBA2, "mamba_d_conv": 4, **config})
    assert (shape.layers, shape.without_kv, shape.state) == expected


def test_a_state_of_unknown_size_counts_as_keys_and_values() -> None:
    shape = decoder_shape({"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 4})
    assert (shape.kv_layers, shape.state) == (4, 0)
