"""What the files of a checkpoint alone prove not to be served: refused before a replica starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.unit.sources.builders import LLAMA, Tensors, safetensors, write
from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers.loading import open_checkpoint
from tidegate.errors import SourceError
from tidegate.replica_args import EngineSpec
from tidegate.sources import servable
from tidegate.sources.checkpoint import read_checkpoint
from tidegate.sources.resolve import resolve
from tidegate.sources.servable import check_servable


def refusal(folder: Path) -> tuple[str, str]:
    """What resolving says; the engine says the same."""
    with pytest.raises(SourceError) as resolving:
        resolve(str(folder))
    with pytest.raises(EngineLoadError) as loading:
        open_checkpoint(EngineSpec("transformers", path=str(folder)))
    assert loading.value.message == resolving.value.message
    return resolving.value.source_reason, resolving.value.message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "whisper", "is_encoder_decoder": True}, "no encoder-decoder from text to text"),
        (
            {"model_type": "t5", "is_encoder_decoder": True, "quantization_config": {"quant_method": "gptq"}},
            "'t5' is an encoder-decoder, which no GPTQ kernel computes",
        ),
        ({"model_type": "encoder-decoder", "is_encoder_decoder": True}, "joins two models"),
        (
            {
                "model_type": "bart",
                "architectures": ["BartModel"],
                "is_encoder_decoder": True,
            },
            "BartModel (bart) is an encoder-decoder, which is served to generate text alone.",
        ),
        (
            {"model_type": "bert", "architectures": ["BertForTokenClassification"]},
            "(bert) neither generates text nor makes vectors",
        ),
        ({"model_type": "llama", "architectures": ["LlamaForRewardModel"]}, "(llama) neither generates text"),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForProcessRewardModel"]},
            "(qwen2) neither generates text",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]},
            "nor classifies whole texts",
        ),
        ({"model_type": "baichuan"}, "has no architecture 'baichuan' (model_type in config.json)."),
        ({"model_type": "chatglm", "auto_map": {"AutoModel": "m.M"}}, "code of its own, which is never run."),
        ({"architectures": ["LlamaForCausalLM"]}, "has no architecture ''"),
        (
            LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "with awq (config.json)",
        ),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "quantized with fp8"),
        (LLAMA | {"quantization_config": {"load_in_4bit": True}}, "quantized with bitsandbytes"),
        (LLAMA | {"quantization_config": {"quant_method": ""}}, "quantized with unknown"),
        (LLAMA | {"compression_config": {"quant_method": "compressed-tensors"}}, "with compressed-tensors"),
        (LLAMA | {"text_config": {"quantization_config": {"quant_method": "aqlm"}}}, "quantized with aqlm"),
    ],
)
def test_what_the_config_alone_proves(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    reason, message = refusal(write(tmp_path, config))
    assert (reason, words in message) == ("UnsupportedModel", True), message


@pytest.mark.parametrize(("pad", "is_refused"), [(99, False), (100, True), (None, False), (-1, False)])
def test_a_padding_token_outside_the_vocabulary(tmp_path: Path, pad: int | None, is_refused: bool) -> None:
    write(tmp_path, LLAMA | {"pad_token_id": pad, "vocab_size": 100})
    if not is_refused:
        check_servable(read_checkpoint(tmp_path))
        return
    reason, message = refusal(tmp_path)
    assert (reason, "config.json: pad_token_id is 100, but vocab_size is 100" in message) == (
        "SourceFormat",
        True,
    )


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt"),
        ("quantize_config.json", {"bits": 4, "quant_method": "awq"}, "awq"),
    ],
)
def test_methods_that_stand_in_a_file_of_their_own(
    tmp_path: Path, file: str, content: dict[str, Any], method: str
) -> None:
    (write(tmp_path) / file).write_text(json.dumps(content))
    reason, message = refusal(tmp_path)
    assert (reason, f"quantized with {method} ({file})" in message) == ("UnsupportedModel", True)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.qweight": ("I32", [4, 32])},
        {"a.weight": ("F8_E4M3", [8]), "a.weight_scale_inv": ("F32", [1])},
        {"a.w": ("U8", [8]), "a.weight.absmax": ("F32", [1])},
        {"a.weight": ("I8", [8])},
    ],
)
def test_quantized_weights_that_nobody_describes(tmp_path: Path, tensors: Tensors) -> None:
    safetensors(write(tmp_path) / "model.safetensors", tensors)
    reason, message = refusal(tmp_path)
    assert (reason, f"holds {max(tensors, key=len)}" in message) == ("SourceFormat", True)


def test_plain_weights_of_another_name_are_told_theirs(tmp_path: Path) -> None:
    write(tmp_path).joinpath("model.safetensors").rename(tmp_path / "weights.safetensors")
    reason, message = refusal(tmp_path)
    expected = f"{tmp_path} holds its weights as weights.safetensors: rename it to model.safetensors."
    assert (reason, message) == ("SourceFormat", expected)


def test_what_transformers_generates_text_with_is_resolved(tmp_path: Path) -> None:
    for kind, heads in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in [heads] if isinstance(heads, str) else heads:
            check_servable(read_checkpoint(write(tmp_path, {"model_type": kind, "architectures": [name]})))


def test_without_transformers_the_engine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servable, "registered_types", lambda: "")
    check_servable(read_checkpoint(write(tmp_path, {"model_type": "baichuan"})))
