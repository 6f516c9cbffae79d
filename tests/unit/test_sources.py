"""Sources: facts of a folder, and one clear sentence for each thing that can be wrong with it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tidegate import demo
from tidegate.control.source_answer import read_answer
from tidegate.errors import SourceError
from tidegate.sources import (
    MAX_ANSWER_BYTES,
    Places,
    decoder_shape,
    inspect,
    main,
    pull,
    resolve,
    short_answer,
)

WEIGHTS = Path(demo.__file__).parent / "weights"


def safetensors(path: Path, dtype: str = "BF16", count: int = 4) -> None:
    header = json.dumps({"w": {"dtype": dtype, "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2 * count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    safetensors(path / "model.safetensors")
    return path


def refusal(uri: str | Path) -> tuple[str, str]:
    with pytest.raises(SourceError) as refused:
        resolve(str(uri))
    return refused.value.source_reason, refused.value.message


def test_facts_of_a_folder(folder: Path) -> None:
    found = resolve(str(folder))
    assert (found.architecture, found.quantization, found.precision) == (
        "LlamaForCausalLM",
        "none",
        "bfloat16",
    )
    assert found.weights_bytes == (folder / "model.safetensors").stat().st_size
    assert resolve(f"file://{folder}").digest == found.digest


def test_the_digest_follows_the_small_files(folder: Path) -> None:
    before = resolve(str(folder)).digest
    (folder / "tokenizer_config.json").write_text("{}")
    assert resolve(str(folder)).digest != before


@pytest.mark.parametrize(
    ("config", "extra", "quantization"),
    [
        ({"quantization_config": {"quant_method": "GPTQ"}}, "", "gptq"),
        ({}, "quantize_config.json", "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "", "awq"),
        ({}, "", "none"),
    ],
)
def test_quantization_is_read_from_both_places(
    folder: Path, config: dict[str, Any], extra: str, quantization: str
) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if extra:
        (folder / extra).write_text("{}")
    assert inspect("x", folder).quantization == quantization


def test_nothing_there(tmp_path: Path) -> None:
    reason, message = refusal(tmp_path / "gone")
    assert reason == "SourceNotFound"
    assert "There is no folder at" in message


def test_other_formats_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert refusal(folder) == (
        "SourceFormat",
        f"{folder} holds its weights only as PyTorch .bin; "
        "Tidegate reads *.safetensors, so convert them first.",
    )
    (folder / "config.json").unlink()
    (folder / "pytorch_model.bin").rename(folder / "model.gguf")
    assert "GGUF" in refusal(folder)[1]


@pytest.mark.parametrize("cut", [4, 40, -1])
def test_a_cut_file_is_found(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "not a whole safetensors file" in refusal(folder)[1]


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors" in refusal(folder)[1]


def test_a_file_is_not_a_folder(folder: Path) -> None:
    assert "give the folder" in refusal(folder / "config.json")[1]


def test_an_empty_folder_and_a_broken_config(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is empty" in refusal(empty)[1]
    (folder / "config.json").write_text("[1")
    assert "cannot be read" in refusal(folder)[1]


def test_pull_reads_every_file_to_its_end(folder: Path) -> None:
    moved: dict[str, tuple[int, int]] = {}
    found = pull(str(folder), lambda name, done, total: moved.update({name: (done, total)}))
    assert moved == {f"verify {name}": (size, size) for name, size in found.files.items()}


def test_the_demo_checkpoints() -> None:
    assert resolve(str(WEIGHTS / "tide-demo")).quantization == "none"
    assert resolve(str(WEIGHTS / "tide-demo-gptq")).quantization == "gptq"


def test_offline_says_so_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    answer = subprocess.run(
        [sys.executable, "-m", "tidegate.sources", "resolve", "hf://owner/name@main"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    error = json.loads(answer.stdout)["error"]
    assert (answer.returncode, error["reason"]) == (1, "Offline")
    assert "HF_HUB_OFFLINE" in error["message"]


def test_looking_needs_no_model_library() -> None:
    code = "import sys, tidegate.sources; print({'torch', 'transformers', 'ray'} & {*sys.modules})"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == "set()"


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
    ],
)
def test_the_shape_of_a_decoder(config: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert tuple(decoder_shape(config).values()) == expected


def test_claims_are_folders_that_are_not_left(folder: Path) -> None:
    places = Places(claims={"models": folder.parent})
    assert resolve("pvc://models/checkpoint", places).path == str(folder)
    for uri, words in (
        ("pvc://other/checkpoint", "not mounted here"),
        ("pvc://models/../..", "leads out of the claim"),
        ("pvc://models/none", "holds no folder none"),
    ):
        with pytest.raises(SourceError, match=words) as refused:
            resolve(uri, places)
        assert refused.value.source_reason == "SourceNotFound"


def test_the_answer_fits_a_termination_message(folder: Path, tmp_path: Path) -> None:
    """As the Job runs it: what the operator reads is a file of at most 4096 bytes."""
    answer = tmp_path / "answer"
    arguments = ["resolve", "pvc://m/checkpoint", "--claim", f"m={folder.parent}", "--answer", str(answer)]
    assert main(arguments) == 0
    found = read_answer(answer.read_text())
    assert found is not None
    assert (found.state, found.checkpoint, found.precision) == ("resolved", str(folder), "bfloat16")
    assert main(["resolve", str(tmp_path / "gone"), "--answer", str(answer)]) == 1
    failed = read_answer(answer.read_text())
    assert failed is not None
    assert (failed.state, failed.reason) == ("failed", "SourceNotFound")


@pytest.mark.parametrize("letter", ["x", "ü", '"', "\U0001f40b"])
def test_a_long_failure_is_cut_to_fit(letter: str) -> None:
    body = short_answer({"error": {"reason": "Offline", "message": letter * 9000}})
    assert 3000 < len(body) <= MAX_ANSWER_BYTES
    found = read_answer(body.decode())
    assert found is not None
    assert found.reason == "Offline"
