"""4-bit GPTQ checkpoints, as GPTQModel and as auto-gptq wrote them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.engine_requests import a_request, run
from tidegate.engines.base import EngineLoadError, LoadReport
from tidegate.engines.create import create_engine
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.replica_args import EngineSpec

PROMPTS = ([5, 6, 7, 8, 9, 10], [40, 41], [100, 101, 102, 103])


def loaded(path: Path) -> tuple[TransformersEngine, LoadReport]:
    engine = create_engine(
        EngineSpec("transformers", path=str(path), quantization="gptq", device="cpu", args={"threads": 1})
    )
    assert isinstance(engine, TransformersEngine)
    return engine, engine.load()


def logits(engine: TransformersEngine) -> torch.Tensor:
    return torch.cat([engine._batch.join([prompt]).float() for prompt in PROMPTS])


@pytest.mark.parametrize("name", ["llama-gptq", "llama-auto-gptq", "falcon-gptq"])
def test_a_quantized_checkpoint_answers_like_the_original(
    name: str, checkpoints: Callable[[str], Path]
) -> None:
    engine, report = loaded(checkpoints(name))
    assert report.notes == ()
    original = AutoModelForCausalLM.from_pretrained(checkpoints(name.partition("-")[0]), dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.cat([original(torch.tensor([prompt])).logits[:, -1] for prompt in PROMPTS])
        similarity = torch.nn.functional.cosine_similarity(logits(engine), expected)
    # Four bits of random weights; a falcon whose quantized layers were left out has 0.04.
    assert similarity.min() > 0.8
    engine.close()


def test_a_quantized_checkpoint_serves_a_batch(checkpoints: Callable[[str], Path]) -> None:
    engine, _ = loaded(checkpoints("llama-gptq"))
    requests = [
        a_request(str(index), prompt, max_tokens=6, temperature=index / 2)
        for index, prompt in enumerate(PROMPTS)
    ]
    results = run(engine, requests, apart=2)
    assert all(len(result.tokens) == 6 for result in results.values())
    engine.close()


def test_a_quantized_weight_that_is_missing_is_refused(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints("falcon-gptq"), tmp_path / "broken"))
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if name.endswith(".qweight"))
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(EngineLoadError) as caught:
        loaded(folder)
    assert caught.value.reason == "WeightsMissing"
    assert name.removesuffix("qweight") in caught.value.message
