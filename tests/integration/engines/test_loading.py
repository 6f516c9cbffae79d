"""What is refused at load, and what is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

from tests.checkpoints import DECODERS, ENCODER_DECODERS, tiny
from tests.engine_requests import a_request, add, run
from tidegate.engines.base import Engine, EngineLoadError, LoadReport
from tidegate.engines.create import create_engine
from tidegate.engines.transformers import selfcheck
from tidegate.engines.transformers.batch import ArenaBatch
from tidegate.engines.transformers.decoder_step import DecoderStep
from tidegate.engines.transformers.head import Head
from tidegate.engines.transformers.memory import CPU_RUNTIME_BYTES
from tidegate.engines.transformers.packed import PackedLinear
from tidegate.replica_args import EngineSpec
from tidegate.sources.facts import WEIGHTS_OVERHEAD, decoder_shape, kv_bytes_per_token
from tidegate.sources.resolve import resolve


@pytest.fixture
def copy(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint that the test may change."""
    return lambda name: Path(shutil.copytree(checkpoints(name), tmp_path / name))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refused(path: Path, **spec: Any) -> EngineLoadError:
    engine = create_engine(EngineSpec("transformers", path=str(path), **{"device": "cpu", **spec}))
    with pytest.raises(EngineLoadError) as caught:
        engine.load()
    return caught.value


def report(path: Path) -> LoadReport:
    engine = create_engine(EngineSpec("transformers", str(path), precision="float32", device="cpu"))
    try:
        return engine.load()
    finally:
        engine.close()


def test_a_missing_weight_is_refused_by_name(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    change_weights(folder, lambda weights: weights.__delitem__(name))
    error = refused(folder)
    assert error.reason == "WeightsMissing"
    assert name in error.message


def test_a_tied_weight_may_be_missing(
    load: Callable[..., Engine], checkpoints: Callable[[str], Path]
) -> None:
    names = load_file(checkpoints("gpt2") / "model.safetensors")
    assert "lm_head.weight" not in names
    assert load("gpt2").free_slots() > 0


def test_an_unexpected_weight_is_told(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change_weights(folder, lambda weights: weights.update({"extra.weight": torch.zeros(2)}))
    engine = create_engine(EngineSpec("transformers", path=str(folder), device="cpu"))
    report = engine.load()
    assert report.notes == ("1 weights of the checkpoint are not used: extra.weight.",)
    assert report.precision == "float32"
    assert report.slots >= 1
    assert report.kv_bytes_per_token == 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, size, bytes


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("model.norm.weight", [64], [128]),
        ("model.layers.0.mlp.up_proj.weight", [128, 256], [256, 128]),
        ("model.embed_tokens.weight", [500, 128], [512, 128]),
    ],
)
def test_weights_of_another_shape_are_refused(
    copy: Callable[[str], Path], name: str, found: list[int], expected: list[int]
) -> None:
    folder = copy("llama")
    change_weights(folder, lambda weights: weights.update({name: torch.ones(found)}))
    error = refused(folder)
    assert error.reason == "WeightsWrong"
    assert error.message.startswith(
        f"{name} in {folder / 'model.safetensors'} has shape {found}, but {folder / 'config.json'} makes it "
        f"{expected}"
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(copy: Callable[[str], Path], value: float) -> None:
    folder, name = copy("llama"), "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights[name].view(-1)[7].fill_(value))
    error = refused(folder)
    assert error.reason == "WeightsWrong"
    assert f"{name} in {folder / 'model.safetensors'} holds NaN or infinite values" in error.message


def test_weights_that_a_precision_cannot_hold_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change_weights(folder, lambda weights: weights["model.norm.weight"].view(-1)[7].fill_(1e6))
    error = refused(folder, precision="float16")
    assert (error.reason, "set precision to bfloat16" in error.message) == ("WeightsWrong", True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'rope_type'='yarn': {'factor'}"),
        ({"rope_parameters": {"rope_type": "waves", "rope_theta": 1e4}}, "KeyError: 'waves' (rope_type)"),
        ({"hidden_act": "bend"}, "KeyError: 'bend' (hidden_act)"),
        ({"hidden_size": "128"}, "Field 'hidden_size' expected int, got str (value: '128')"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads (5)"),
    ],
)
def test_half_a_config_is_told_by_its_file_and_not_as_the_tokenizers(
    copy: Callable[[str], Path], changed: dict[str, Any], words: str
) -> None:
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    error = refused(folder)
    assert error.reason == "WeightsWrong"
    assert error.message.startswith(f"{folder / 'config.json'} does not describe a llama: ")
    assert words in error.message


def test_an_unknown_architecture_is_refused_and_its_code_never_run(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "baichuan", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_x.py").write_text("raise SystemExit('this code was run')")
    error = refused(folder)
    assert error.reason == "UnsupportedModel"
    assert "never run" in error.message


def test_a_missing_tokenizer_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert refused(folder).reason == "TokenizerMissing"


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"precision": "int3"}, "precision"),
        ({"device": "tpu"}, "device"),
        ({"context_length": 100_000}, "contextLength"),
        ({"quantization": "gptq"}, "not quantized"),
    ],
)
def test_a_wrong_spec_is_refused_by_its_field(
    checkpoints: Callable[[str], Path], spec: dict[str, Any], word: str
) -> None:
    error = refused(checkpoints("llama"), **spec)
    assert error.reason == "InvalidEngineArgs"
    assert word in error.message


def test_slots_come_from_the_memory_of_the_cache(load: Callable[..., Engine]) -> None:
    row = 1024 * (128 + 64)  # bytes per token, context and slack
    assert load("llama", context_length=128, kv_cache_bytes=5 * row + 1).free_slots() == 5
    assert load("llama", context_length=128, kv_cache_bytes=5 * row, max_slots=2).free_slots() == 2


def test_a_cache_too_small_for_one_request_is_refused(checkpoints: Callable[[str], Path]) -> None:
    assert refused(checkpoints("llama"), kv_cache_bytes=1000).reason == "OutOfMemory"


def test_a_memory_cap_bounds_the_cache(
    load: Callable[..., Engine], checkpoints: Callable[[str], Path]
) -> None:
    weights = report(checkpoints("llama")).weights_bytes
    row = 1024 * (128 + 64)
    cap = int(weights * WEIGHTS_OVERHEAD) + CPU_RUNTIME_BYTES + 3 * row + 1
    assert load("llama", context_length=128, memory_cap_bytes=cap).free_slots() == 3
    error = refused(checkpoints("llama"), context_length=128, memory_cap_bytes=CPU_RUNTIME_BYTES)
    assert error.reason == "OutOfMemory"


@pytest.mark.parametrize("arch", sorted({**DECODERS, **ENCODER_DECODERS}))
def test_the_control_loop_computes_the_cache_that_the_engine_takes(
    checkpoints: Callable[[str], Path], arch: str
) -> None:
    """Placement on GPUs rests on it, and it sees nothing but config.json."""
    folder = checkpoints(arch)
    shape = decoder_shape(json.loads((folder / "config.json").read_text()))
    assert kv_bytes_per_token(shape, "float32") == report(folder).kv_bytes_per_token


@pytest.mark.parametrize("named", ["float32", "bfloat16", None])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_what_is_placed_is_what_is_loaded(
    copy: Callable[[str], Path], stored: str, named: str | None
) -> None:
    """Sizing sees nothing but the config and the headers."""
    folder = copy("llama")
    change_weights(
        folder,
        lambda weights: weights.update({name: weights[name].to(getattr(torch, stored)) for name in weights}),
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": named}))
    source = resolve(str(folder))
    engine: Any = create_engine(EngineSpec("transformers", path=str(folder), device="cpu"))
    loaded = engine.load()
    assert loaded.precision == source.precision == (named or stored)
    model = engine._batch._forward._head._model
    packed = [module.weight for module in model.modules() if isinstance(module, PackedLinear)]
    held = sum(weight.nbytes for weight in (*model.parameters(), *packed))
    assert loaded.weights_bytes == source.weights.loaded_bytes(source.precision) == held


def test_weights_larger_than_memory_are_refused_before_loading(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.engines.transformers.loading.free_bytes", lambda _device: 1 << 20)
    error = refused(checkpoints("llama"))
    assert error.reason == "OutOfMemory"
    assert "1.0 MiB are free" in error.message


class Shifted(ArenaBatch):
    """A batched path that is wrong without an error: one position off, as a broken architecture's is."""

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            self._positions += 1
            logits = super().decode(tokens)
            self._positions -= 1
        return logits


def test_a_wrong_batch_is_found_and_requests_run_one_by_one(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = EngineSpec("transformers", path=str(checkpoints("llama")), device="cpu", args={"threads": 1})
    right = create_engine(spec)
    right.load()
    monkeypatch.setattr(selfcheck, "ArenaBatch", Shifted)
    engine = create_engine(spec)
    report = engine.load()
    assert len(report.notes) == 1
    assert "one by one" in report.notes[0]
    requests = [a_request(str(n), f"prompt number {n}", max_tokens=5 + n) for n in range(4)]
    expected = run(right, requests, apart=2)
    found = run(engine, requests, apart=2)
    assert {key: result.tokens for key, result in found.items()} == {
        key: result.tokens for key, result in expected.items()
    }


class Failing(ArenaBatch):
    """Fails on prompts that hold token 13."""

    def join(self, sequences: Any, *, sources: Any = (), every: Any = None) -> torch.Tensor:
        if any(13 in sequence for sequence in sequences) and self.count:
            raise ValueError("thirteen")
        return super().join(sequences, sources=sources, every=every)


def test_a_prefill_that_fails_fails_its_request_only(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "ArenaBatch", Failing)
    engine = load("llama")
    requests = [a_request("ok", [5, 6], max_tokens=9), a_request("bad", [13, 6], max_tokens=9)]
    requests.append(a_request("ok too", [7, 8], max_tokens=9))
    results = run(engine, requests, apart=1)
    failed = results["bad"].finish
    assert failed is not None
    assert (failed.reason, failed.code) == ("error", "GenerationFailed")
    assert len(results["ok"].tokens) == len(results["ok too"].tokens) == 9


def test_memory_that_runs_out_in_a_step_is_the_engines_failure(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load("llama")

    def fail(*_args: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    add(engine, a_request("r", [5, 6], max_tokens=9))
    engine.step()
    monkeypatch.setattr(ArenaBatch, "decode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert "out of memory" in (engine.health() or "")


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def on_the_host() -> None:
    torch.empty(1 << 50)


@pytest.mark.parametrize("run_out", [on_a_gpu, on_the_host])
@pytest.mark.parametrize("passes", [0, 1, 5, 7, 20])  # a measure of the cache, plain ones, those of the batch
def test_memory_that_runs_out_while_a_model_is_checked_is_told_so(
    checkpoints: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    run_out: Callable[[], None],
    passes: int,
) -> None:
    left = iter(range(passes))

    def failing(forward: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                run_out()
            return forward(*args, **options)

        return fail

    monkeypatch.setattr(Head, "run", failing(Head.run))
    monkeypatch.setattr(DecoderStep, "prefill", failing(DecoderStep.prefill))
    error = refused(checkpoints("llama"), context_length=64)
    assert error.reason == "OutOfMemory"
    assert "llocate" in error.message
    assert error.message.endswith("give it more, or serve a smaller or quantized checkpoint.")


@pytest.mark.parametrize("run_out", [on_a_gpu, on_the_host])
def test_memory_that_runs_out_while_weights_are_read_is_told_so(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, run_out: Callable[[], None]
) -> None:
    monkeypatch.setattr(core_model_loading, "_materialize_copy", lambda *_args: run_out())
    assert refused(checkpoints("llama")).reason == "OutOfMemory"


@pytest.mark.parametrize("run_out", [on_a_gpu, on_the_host])
def test_memory_that_runs_out_while_experts_are_put_together_is_told_so(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, run_out: Callable[[], None]
) -> None:
    """transformers says why in a report, and raises something that does not."""
    folder = checkpoints("qwen3_moe")
    monkeypatch.setattr(core_model_loading.MergeModulelist, "convert", lambda *_args, **_options: run_out())
    error = refused(folder)
    assert (error.reason, "llocate" in error.message) == ("OutOfMemory", True)


def test_numbers_that_are_not_finite_fail_their_request_only(load: Callable[..., Engine]) -> None:
    engine: Any = load("llama")
    alone = run(engine, [a_request("good", [5, 6], max_tokens=9)])["good"].tokens
    requests = [a_request("good", [5, 6], max_tokens=9), a_request("bad", [7, 8], max_tokens=9)]
    decode = engine._batch.decode

    def poison(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = decode(tokens)
        rows = [row for row, sequence in enumerate(engine._scheduler.running) if sequence.id == "bad"]
        logits[rows] = float("nan")
        return logits

    engine._batch.decode = poison
    results = run(engine, requests)
    failed = results["bad"].finish
    assert failed is not None
    assert failed.code == "NumericalError"
    assert results["good"].tokens == alone


def test_an_empty_prompt_starts_from_the_start_token(load: Callable[..., Engine], tmp_path: Path) -> None:
    engine = load(tiny(tmp_path / "opt", "opt"))
    results = run(engine, [a_request("empty", "", max_tokens=4), a_request("start", [1], max_tokens=4)])
    assert results["empty"].tokens == results["start"].tokens
