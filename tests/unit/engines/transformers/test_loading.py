"""What the engine refuses of a checkpoint before anything heavy is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.sources.builders import LLAMA, write, write_gptq
from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers.loading import open_checkpoint
from tidegate.replica_args import EngineSpec
from tidegate.sources.checkpoint import Checkpoint


def opened(folder: Path, quantization: str = "auto", context_length: int = 0) -> Checkpoint:
    return open_checkpoint(
        EngineSpec("transformers", str(folder), quantization=quantization, context_length=context_length)
    )


def refused(folder: Path, quantization: str = "auto", context_length: int = 0) -> EngineLoadError:
    with pytest.raises(EngineLoadError) as caught:
        opened(folder, quantization, context_length)
    return caught.value


def test_gptq_is_found_in_either_file(tmp_path: Path) -> None:
    assert opened(write_gptq(tmp_path)).quantization == "gptq"
    assert refused(tmp_path, "none").reason == "InvalidEngineArgs"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert opened(tmp_path, "gptq").quantization == "gptq"
    assert refused(tmp_path, "none").reason == "InvalidEngineArgs"


def test_what_is_not_there_or_not_right_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path).reason == "WeightsMissing"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    error = refused(tmp_path)
    assert (error.reason, "no *.safetensors weights" in error.message) == ("WeightsMissing", True)
    (tmp_path / "config.json").write_text("{")
    assert refused(tmp_path).reason == "WeightsWrong"
    write(tmp_path, LLAMA | {"quantization_config": {"quant_method": "awq"}})
    assert refused(tmp_path).reason == "UnsupportedModel"
    write(tmp_path)
    assert refused(tmp_path, "gptq").reason == "InvalidEngineArgs"


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    weights = write(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    error = refused(tmp_path)
    assert (error.reason, "ends too early" in error.message) == ("WeightsWrong", True)


def test_a_context_that_is_too_long_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, LLAMA | {"max_position_embeddings": 128})
    assert opened(folder, context_length=128).shape.positions == 128
    error = refused(folder, context_length=129)
    assert error.reason == "InvalidEngineArgs"
    assert error.message.startswith("contextLength is 129, but the checkpoint holds 128 positions")
