"""The reader of checkpoint folders: its facts, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.unit.sources.builders import LLAMA, Tensors, safetensors, write
from tidegate.errors import SourceError
from tidegate.sources.checkpoint import MAX_CONFIG_BYTES, SINGLE, FilesMissing, read_checkpoint
from tidegate.sources.facts import StoredWeights
from tidegate.sources.tensors import PAGE_BYTES


def refused(folder: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        read_checkpoint(folder)
    return caught.value


def test_sizes_and_types_come_from_the_headers(tmp_path: Path) -> None:
    tensors: Tensors = {
        "a": ("BF16", [4, 2]),
        "b": ("F32", [3]),
        "ids": ("I64", [2]),
        "narrow": ("F8_E4M3", [5]),
    }
    found = read_checkpoint(write(tmp_path, tensors=tensors))
    assert found.weights_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert found.tensor_names == frozenset(tensors)
    assert found.auto_precision == "bfloat16"
    assert found.weights == StoredWeights(float_values=16, fixed_bytes=16)
    assert found.weights.loaded_bytes("float32") == 16 * 4 + 16
    assert found.weights.loaded_bytes("bfloat16") == 16 * 2 + 16


@pytest.mark.parametrize(
    ("dtype", "kinds", "precision", "loaded"),
    [
        ("float32", ("BF16", "BF16"), "float32", 12 * 4),
        ("bfloat16", ("F32", "F32"), "bfloat16", 12 * 2),
        ("float16", ("BF16", "F32"), "float16", 12 * 2),
        (None, ("BF16", "F32"), "bfloat16", 12 * 2),
        (None, ("F32", "BF16"), "float32", 12 * 4),
    ],
)
def test_precision_auto_loads_what_the_config_says(
    tmp_path: Path, dtype: str | None, kinds: tuple[str, str], precision: str, loaded: int
) -> None:
    tensors: Tensors = {"most": (kinds[0], [9]), "rest": (kinds[1], [3])}
    found = read_checkpoint(write(tmp_path, LLAMA | ({"dtype": dtype} if dtype else {}), tensors))
    assert found.auto_precision == precision
    assert found.weights.loaded_bytes(found.auto_precision) == loaded


def test_a_quantized_checkpoint_is_loaded_as_it_is_stored(tmp_path: Path) -> None:
    tensors: Tensors = {"qweight": ("I32", [100]), "scales": ("F16", [10])}
    config = LLAMA | {"quantization_config": {"quant_method": "gptq"}, "dtype": "float32"}
    found = read_checkpoint(write(tmp_path, config, tensors))
    assert found.auto_precision == "float32"
    assert found.weights == StoredWeights(0, 420)
    assert read_checkpoint(write(tmp_path, config | {"dtype": None}, tensors)).auto_precision == "float16"


@pytest.mark.parametrize(
    ("config", "extra", "quantization"),
    [
        ({"quantization_config": {"quant_method": "GPTQ"}}, "", "gptq"),
        ({"quantization_config": {"bits": 4}}, "", "gptq"),
        ({}, "quantize_config.json", "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "", "awq"),
        ({}, "", "none"),
    ],
)
def test_quantization_is_read_from_both_places(
    tmp_path: Path, config: dict[str, Any], extra: str, quantization: str
) -> None:
    write(tmp_path, {"model_type": "llama", **config})
    if extra:
        (tmp_path / extra).write_text("{}")
    assert read_checkpoint(tmp_path).quantization == quantization


def test_the_architecture_falls_back_to_the_type(tmp_path: Path) -> None:
    assert read_checkpoint(write(tmp_path)).architecture == "LlamaForCausalLM"
    assert read_checkpoint(write(tmp_path, {"model_type": "llama"})).architecture == "llama"


def test_the_digest_follows_the_small_files(tmp_path: Path) -> None:
    before = read_checkpoint(write(tmp_path)).digest()
    assert read_checkpoint(tmp_path).digest() == before
    (tmp_path / "README.md").write_text("changed")
    (tmp_path / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    assert read_checkpoint(tmp_path).digest() == before
    (tmp_path / "tokenizer.model").write_text("x")
    assert read_checkpoint(tmp_path).digest() != before


def test_a_modules_layer_is_loaded_however_large_it_is(tmp_path: Path) -> None:
    (write(tmp_path) / "2_Dense").mkdir()
    layer = tmp_path / "2_Dense" / SINGLE
    with layer.open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    without = read_checkpoint(tmp_path).digest()
    (tmp_path / "modules.json").write_text("[]")
    found = read_checkpoint(tmp_path)
    assert "2_Dense/model.safetensors" in found.loaded
    assert (before := found.digest()) != without
    with layer.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert read_checkpoint(tmp_path).digest() != before


def test_the_digest_sees_weights_that_change_in_place(tmp_path: Path) -> None:
    """In any tensor; of a large one pages are read, so a change between them is not seen."""
    pages = 64
    write(tmp_path, tensors={"a": ("U8", [pages * PAGE_BYTES]), "b": ("BF16", [3])})
    found = read_checkpoint(tmp_path)
    before, content = found.digest(), bytearray((tmp_path / SINGLE).read_bytes())
    seen = {}
    places = {"first": 0, "between": 2 * PAGE_BYTES, "last": pages * PAGE_BYTES - 1}
    for name, at in {**places, "small": pages * PAGE_BYTES + 5}.items():
        changed = bytearray(content)
        changed[found.tensors["a"].start + at] ^= 1
        (tmp_path / SINGLE).write_bytes(changed)
        seen[name] = read_checkpoint(tmp_path).digest() != before
    assert seen == {"first": True, "between": False, "last": True, "small": True}


def test_where_a_checksum_of_the_weights_is_known_it_is_the_digests(tmp_path: Path) -> None:
    """The hub's cache names a file by its sha256, and the commit of a bucket is made of checksums."""
    write(tmp_path)
    plain = read_checkpoint(tmp_path).digest()
    assert plain != read_checkpoint(tmp_path).digest("c") != read_checkpoint(tmp_path).digest("d")
    blob = tmp_path.parent / ("0" * 64)
    (tmp_path / SINGLE).rename(blob)
    (tmp_path / SINGLE).symlink_to(blob)
    linked = read_checkpoint(tmp_path)
    assert linked.digest("c") == linked.digest("d") != plain


def test_weights_that_lie_there_twice_are_counted_once(tmp_path: Path) -> None:
    """As Mistral's do, in its own format beside the shards, and others' below `original`."""
    write(tmp_path)
    safetensors(tmp_path / "consolidated.safetensors", {"w2": ("BF16", [99])})
    (tmp_path / "original").mkdir()
    safetensors(tmp_path / "original" / "model.safetensors", {"w3": ("BF16", [99])})
    assert read_checkpoint(tmp_path).tensor_names == frozenset({"w"})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_checkpoint(tmp_path)
    assert found.tensor_names == frozenset({"w"})
    assert found.weights_bytes == (tmp_path / "model-1.safetensors").stat().st_size


def test_other_formats_are_named(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    assert "no *.safetensors weights" in refused(tmp_path).message
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    error = refused(tmp_path)
    assert isinstance(error, FilesMissing)
    assert (error.source_reason, error.message) == (
        "SourceFormat",
        f"{tmp_path} holds its weights only as PyTorch .bin; "
        "Tidegate reads *.safetensors, so convert them first.",
    )
    (tmp_path / "config.json").unlink()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.gguf")
    assert "GGUF" in refused(tmp_path).message
    (tmp_path / "model.gguf").rename(tmp_path / "notes.txt")
    assert "give the folder that directly holds it" in refused(tmp_path).message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>", "unpack requires a buffer of 8 bytes"),
        (b"<!doctype html>", "the header is too long"),
        (struct.pack("<Q", 4) + b"{{{{", "Expecting property name"),
        (struct.pack("<Q", 2) + b"[]", "pop expected at most 1 argument"),
        (struct.pack("<Q", 8) + b'{"w": 1}', "not subscriptable"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    weights = write(tmp_path) / "model.safetensors"
    weights.write_bytes(content)
    error = refused(tmp_path)
    assert (error.source_reason, isinstance(error, FilesMissing)) == ("SourceFormat", False)
    assert error.message.startswith(f"{weights} is not a whole safetensors file: ")
    assert words in error.message


@pytest.mark.parametrize("cut", [4, 40, -1])
def test_a_cut_file_is_found(tmp_path: Path, cut: int) -> None:
    weights = write(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    assert "not a whole safetensors file" in refused(tmp_path).message
    if cut < 0:
        assert "the file ends too early; download or copy it again" in refused(tmp_path).message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (write(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))
    error = refused(tmp_path)
    assert isinstance(error, FilesMissing)
    assert "model-2.safetensors" in error.message
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in refused(tmp_path).message


def test_an_empty_folder_and_a_broken_config(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert isinstance(error, FilesMissing)
    assert "has no config.json; a checkpoint folder holds it" in error.message
    write(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    error = refused(tmp_path)
    assert (isinstance(error, FilesMissing), "cannot be read" in error.message) == (False, True)
    (tmp_path / "config.json").write_text("[1]")
    assert "is not a JSON object" in refused(tmp_path).message


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    safetensors(tmp_path / "adapter_model.safetensors")
    expected = (
        f"{tmp_path} is an adapter (adapter_config.json) and no model of its own: merge it into its base"
    )
    assert refused(tmp_path).message.startswith(f"{expected} model owner/base (peft's merge_and_unload)")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert refused(tmp_path).message.startswith(expected)
    safetensors(tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).weight_files == ("model.safetensors",)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_no_file(tmp_path: Path, file: str) -> None:
    write(tmp_path)
    (tmp_path / file).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    )
    message = refused(tmp_path).message
    assert message.startswith(
        f"{tmp_path / file} is a git-LFS pointer and not the file itself: run `git lfs pull`"
    )


@pytest.mark.parametrize(
    "names",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["model-00001-of-00002.safetensors"],
        ["a.safetensors", "b.safetensors"],
    ],
)
def test_shards_need_their_index(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for name in names:
        safetensors(tmp_path / name, {name: ("F32", [1])})
    error = refused(tmp_path)
    assert isinstance(error, FilesMissing)
    assert f"holds the weight files {', '.join(names)} and no model.safetensors.index.json" in error.message
    index = {"weight_map": {name: name for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_checkpoint(tmp_path).tensor_names == frozenset(names)


def test_one_file_of_another_name_and_its_shards_are_read(tmp_path: Path) -> None:
    """As auto-gptq calls them."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    safetensors(tmp_path / "gptq_model-4bit-128g.safetensors")
    assert read_checkpoint(tmp_path).weight_files == ("gptq_model-4bit-128g.safetensors",)
    index = {"weight_map": {"a": "gptq_model-4bit-128g-00001-of-00002.safetensors"}}
    (tmp_path / "gptq_model-4bit-128g.safetensors.index.json").write_text(json.dumps(index))
    assert "gptq_model-4bit-128g-00001-of-00002.safetensors; copy them too" in refused(tmp_path).message


def test_a_tensor_that_lies_there_twice_is_named_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for file in ("one.safetensors", "two.safetensors"):
        safetensors(tmp_path / file)
    index = {"weight_map": {"w": "one.safetensors", "v": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(tmp_path).message
    assert message.startswith(f"{tmp_path} holds w twice, in one.safetensors and in two.safetensors: ")


def test_a_shape_that_does_not_fit_its_bytes_is_refused(tmp_path: Path) -> None:
    weights = write(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"[4, 2]", b"[4, 9]"))
    assert "w has 16 bytes, but its shape [4, 9] of BF16 takes others" in refused(tmp_path).message


def test_a_broken_generation_config_is_told(tmp_path: Path) -> None:
    (write(tmp_path) / "generation_config.json").write_text("{")
    assert f"{tmp_path / 'generation_config.json'} cannot be read" in refused(tmp_path).message
