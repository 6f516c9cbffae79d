"""What the engine refuses of a checkpoint before anything heavy is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.sources.builders import LLAMA, write, write_gptq
from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers.loading import context_length, open_checkpoint
from tidegate.sources.facts import DecoderShape


def refused(folder: Path, quantization: str = "auto") -> EngineLoadError:
    with pytest.raises(EngineLoadError) as caught:
        open_checkpoint(folder, quantization)
    return caught.value


def test_gptq_is_found_in_either_file(tmp_path: Path) -> None:
    assert open_checkpoint(write_gptq(tmp_path), "auto").quantization == "gptq"
    assert refused(tmp_path, "none").reason == "InvalidEngineArgs"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert open_checkpoint(tmp_path, "gptq").quantization == "gptq"
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


def test_context_length() -> None:
    shape = DecoderShape(positions=128)
    assert context_length(shape, 0) == 128
    assert context_length(shape, 64) == 64
    with pytest.raises(EngineLoadError, match="contextLength is 129, but the checkpoint holds 128"):
        context_length(shape, 129)
    unbounded = DecoderShape()
    assert (context_length(unbounded, 0), context_length(unbounded, 9000)) == (2048, 9000)
