"""GPTQ checkpoints, as GPTQModel and auto-gptq write them and in other forms, on kernels and unpacked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.checkpoints import packed
from tests.engine_requests import a_request, run
from tidegate.engines.base import EngineLoadError, LoadReport
from tidegate.engines.create import create_engine
from tidegate.engines.transformers import int4
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.engines.transformers.int4 import Int4Linear
from tidegate.engines.transformers.int4_tiles import TiledInt4Linear, has_tiles
from tidegate.engines.transformers.loading import load, open_checkpoint
from tidegate.replica_args import EngineSpec
from tidegate.sources.resolve import resolve

PROMPTS = ([5, 6, 7, 8, 9, 10], [40, 41], [100, 101, 102, 103])


def loaded(path: Path, **spec: Any) -> tuple[TransformersEngine, LoadReport]:
    args = {"threads": 1, **spec.pop("args", {})}
    engine = create_engine(
        EngineSpec("transformers", path=str(path), quantization="gptq", device="cpu", args=args, **spec)
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


def plain_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([prompt])).logits[:, -1] for prompt in PROMPTS])


@pytest.mark.parametrize(
    ("arch", "how"),
    [
        ("llama", {"bits": 2, "group_size": 64}),
        ("llama", {"bits": 3, "is_ordered": True}),
        ("llama", {"bits": 8, "is_symmetric": False}),
        ("llama", {"bits": 4, "group_size": -1}),
        ("llama", {"bits": 3, "group_size": -1, "is_symmetric": False}),
        ("llama", {"is_symmetric": False, "stored_as": "gptq_v2"}),
        ("phi3", {}),
        ("phi3", {"splits": {"gate_up_proj": ("gate_proj", "up_proj")}}),
        ("glm", {"splits": {"gate_up_proj": ("gate_proj", "up_proj")}}),
        ("mixtral", {"bits": 3}),
        ("qwen3_moe", {"is_ordered": True}),
    ],
)
def test_unpacked_weights_are_exactly_those_that_were_packed(
    arch: str, how: dict[str, Any], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, twin = packed(tmp_path / "packed", checkpoints(arch), **how)
    engine, report = loaded(folder, precision="float32")
    assert "The weights are unpacked to float32 and take" in report.notes[0]
    assert "no kernel computes in float32" in report.notes[0]
    torch.testing.assert_close(logits(engine), plain_logits(twin), rtol=1e-4, atol=1e-4)
    assert report.weights_bytes >= sum(
        weight.nbytes for weight in load_file(twin / "model.safetensors").values()
    )
    engine.close()


@pytest.mark.parametrize(
    ("arch", "how", "told"),
    [
        ("llama", {"is_ordered": True}, ""),
        ("llama", {"is_symmetric": False, "stored_as": "gptq_v2"}, ""),
        ("llama", {"is_symmetric": False}, "no kernel reads asymmetric zero points of the format gptq"),
        ("llama", {"bits": 8}, "no kernel on CPU computes with 8 bits in groups of 32"),
        ("llama", {"group_size": -1}, "no kernel on CPU computes with 4 bits in groups of -1"),
        ("phi3", {"splits": {"gate_up_proj": ("gate_proj", "up_proj")}}, ""),
        ("glm", {}, "GPTQModel knows layers like model.layers.0.mlp.gate_up_proj only in parts"),
        ("mixtral", {}, ".block_sparse_moe.experts.0.w1 only in parts"),
    ],
)
def test_half_precision_stays_packed_where_a_kernel_computes_with_it(
    arch: str, how: dict[str, Any], told: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, twin = packed(tmp_path / "packed", checkpoints(arch), **how)
    engine, report = loaded(folder, precision="bfloat16")
    assert told in " ".join(report.notes)
    assert bool(told) == bool(report.notes)
    expected = plain_logits(twin)
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    assert ((logits(engine) - expected).norm(dim=-1) / spread).max() < 0.05
    if "on CPU" not in told:  # placement knows no device
        assert report.weights_bytes == resolve(str(folder)).weights.loaded_bytes("bfloat16")
    engine.close()


@pytest.mark.parametrize("method", ["", None])
def test_a_method_that_is_not_named_is_told_by_the_tensors(
    method: str | None, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """GPTQModel loads the one without its quantized layers, and the other not at all."""
    folder, twin = packed(tmp_path / "packed", checkpoints("llama"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (folder / "config.json").write_text(json.dumps(config))
    engine, report = loaded(folder, precision="bfloat16")
    assert report.notes == ()
    assert torch.nn.functional.cosine_similarity(logits(engine), plain_logits(twin)).min() > 0.99
    engine.close()


def test_a_kernel_that_computes_otherwise_is_not_used(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its zero points mean something else in another version of PyTorch."""
    monkeypatch.setattr(int4, "MIDDLE", int4.MIDDLE - 1)
    folder, twin = packed(tmp_path / "packed", checkpoints("llama"))
    engine, report = loaded(folder, precision="bfloat16")
    assert "the kernel computes model.layers.0.mlp.down_proj wrong: of 1 rows" in report.notes[0]
    assert torch.nn.functional.cosine_similarity(logits(engine), plain_logits(twin)).min() > 0.99
    engine.close()


def test_a_library_that_computes_otherwise_is_not_used(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it takes the zero points to be stored in the other format. It loads what is stored in parts."""
    from gptqmodel.models import loader

    monkeypatch.setattr(loader, "convert_gptq_v1_to_v2_format", lambda model, **_: model)
    parts = {"gate_up_proj": ("gate_proj", "up_proj")}
    folder, twin = packed(tmp_path / "packed", checkpoints("phi3"), splits=parts)
    engine, report = loaded(folder, precision="bfloat16")
    assert "the kernel computes model.layers.0.mlp.down_proj wrong" in report.notes[0]
    assert torch.nn.functional.cosine_similarity(logits(engine), plain_logits(twin)).min() > 0.99
    engine.close()


@pytest.mark.parametrize("how", [{}, {"is_ordered": True}, {"group_size": 128}])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_packed_layer_gives_a_row_the_same_whatever_rows_are_beside_it(
    how: dict[str, Any], precision: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, twin = packed(tmp_path / "packed", checkpoints("llama"), **how)
    spec = EngineSpec("transformers", path=str(folder), precision=precision, device="cpu")
    model = load(open_checkpoint(spec), spec).model
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Int4Linear)}
    assert len(layers) == 14
    fastest = TiledInt4Linear if has_tiles() else Int4Linear
    assert {type(each) for each in layers.values()} <= {fastest, Int4Linear}
    assert type(layers["model.layers.0.mlp.up_proj"]) is fastest
    weights = load_file(twin / "model.safetensors")
    for name, layer in layers.items():
        inputs = torch.randn(3, 67, layer.in_features, generator=torch.Generator().manual_seed(0))
        inputs = inputs.to(getattr(torch, precision))
        with torch.inference_mode():
            together = layer(inputs)
            alone = [layer(inputs[:, :columns]) for columns in (1, 4, 5, 33)]
        expected = inputs.float() @ weights[f"{name}.weight"].T
        assert ((together.float() - expected).norm() / expected.norm()) < 0.005
        for found in alone:
            assert torch.equal(found, together[:, : found.shape[1]])


def test_a_cpu_unpacks_where_somebody_asks_for_it(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder, twin = packed(tmp_path / "packed", checkpoints("llama"))
    engine, report = loaded(folder, precision="bfloat16", args={"unpacks_gptq": True})
    assert "unpacks_gptq asks for it" in report.notes[0]
    assert report.weights_bytes >= load_file(twin / "model.safetensors")["lm_head.weight"].numel() * 2
    assert torch.nn.functional.cosine_similarity(logits(engine), plain_logits(twin)).min() > 0.99
    engine.close()


def test_scales_that_are_not_finite_are_refused(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder, _ = packed(tmp_path / "packed", checkpoints("llama"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.scales"][0, 0] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for precision in ("float32", "bfloat16"):
        with pytest.raises(EngineLoadError) as caught:
            loaded(folder, precision=precision)
        assert caught.value.reason == "WeightsWrong"
        assert f"model.layers.1.mlp.up_proj.scales in {folder / 'model.safetensors'}" in caught.value.message
