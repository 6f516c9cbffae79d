from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers.checkpoint import read_checkpoint

CONFIG = {"model_type": "llama", "max_position_embeddings": 128, "dtype": "bfloat16"}


def write(
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, tuple[str, list[int], int]] | None = None,
) -> Path:
    """A checkpoint of headers and zeros: tensor name -> (type, shape, bytes)."""
    (folder / "config.json").write_text(json.dumps(config if config is not None else CONFIG))
    header, offset = {}, 0
    for name, (kind, shape, size) in (tensors or {"a": ("BF16", [4, 2], 16)}).items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(offset))
    return folder


def refused(folder: Path, quantization: str = "auto") -> EngineLoadError:
    with pytest.raises(EngineLoadError) as caught:
        read_checkpoint(folder, quantization)
    return caught.value


def test_sizes_and_types_come_from_the_headers(tmp_path: Path) -> None:
    tensors = {"a": ("BF16", [4, 2], 16), "b": ("F32", [3], 12), "ids": ("I64", [2], 16)}
    checkpoint = read_checkpoint(write(tmp_path, tensors=tensors), "auto")
    assert checkpoint.weights_bytes == 44
    assert checkpoint.names == frozenset({"a", "b", "ids"})
    assert checkpoint.stored_precision() == "bfloat16"
    assert checkpoint.loaded_bytes("float32") == 11 * 4 + 16
    assert checkpoint.loaded_bytes("bfloat16") == 11 * 2 + 16


def test_without_a_type_in_the_config_the_commonest_counts(tmp_path: Path) -> None:
    tensors = {"a": ("F16", [9], 18), "b": ("F32", [3], 12)}
    checkpoint = read_checkpoint(write(tmp_path, {"model_type": "llama"}, tensors), "auto")
    assert checkpoint.stored_precision() == "float16"


def test_gptq_is_found_in_either_file(tmp_path: Path) -> None:
    named = {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert read_checkpoint(write(tmp_path, named), "auto").is_gptq
    write(tmp_path)
    assert not read_checkpoint(tmp_path, "none").is_gptq
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}))
    assert read_checkpoint(tmp_path, "gptq").is_gptq
    assert refused(tmp_path, "none").reason == "InvalidEngineArgs"


def test_what_is_not_there_or_not_right_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path).reason == "WeightsMissing"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "no weights" in refused(tmp_path).message
    (tmp_path / "config.json").write_text("{")
    assert refused(tmp_path).reason == "WeightsWrong"
    write(tmp_path, {**CONFIG, "quantization_config": {"quant_method": "awq"}})
    assert refused(tmp_path).reason == "UnsupportedModel"
    write(tmp_path)
    assert refused(tmp_path, "gptq").reason == "InvalidEngineArgs"


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    weights = write(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert "cut off" in refused(tmp_path).message
    weights.write_bytes(b"<html>")
    assert "not a safetensors file" in refused(tmp_path).message
    weights.write_bytes(struct.pack("<Q", 4) + b"{{{{")
    assert "damaged header" in refused(tmp_path).message


def test_context_length(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write(tmp_path), "auto")
    assert checkpoint.context_length(0) == 128
    assert checkpoint.context_length(64) == 64
    with pytest.raises(EngineLoadError, match="contextLength is 129, but the checkpoint holds 128"):
        checkpoint.context_length(129)
    unbounded = read_checkpoint(write(tmp_path, {"model_type": "bloom"}), "auto")
    assert (unbounded.context_length(0), unbounded.context_length(9000)) == (2048, 9000)


def test_pickled_weights_are_counted_by_their_files(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(100))
    checkpoint = read_checkpoint(tmp_path, "auto")
    assert (checkpoint.weights_bytes, checkpoint.names, checkpoint.loaded_bytes("float32")) == (
        100,
        None,
        100,
    )
