"""What the method's own invariants prove of a GPTQ checkpoint, from headers and samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.sources.builders import Tensors, safetensors, write_gptq
from tidegate import demo
from tidegate.errors import SourceError
from tidegate.sources.checkpoint import FilesMissing, read_checkpoint
from tidegate.sources.gptq import check_gptq, loaded_weights, read_layers, read_settings

ORDERED = {"desc_act": True}
MIXED = [(index * 7 + 3) % 64 // 32 for index in range(64)]


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        check_gptq(read_checkpoint(folder))
    assert caught.value.source_reason == "SourceFormat"
    return caught.value.message


@pytest.mark.parametrize("stored_as", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_format_is_proved_and_its_false_label_refused(
    tmp_path: Path, bits: int, is_symmetric: bool, stored_as: str
) -> None:
    made: dict[str, Any] = {"bits": bits, "inputs": 128, "is_symmetric": is_symmetric}
    check_gptq(read_checkpoint(write_gptq(tmp_path, stored_as=stored_as, **made)))
    other = "gptq" if stored_as == "gptq_v2" else "gptq_v2"
    message = refusal(write_gptq(tmp_path, {"checkpoint_format": other}, stored_as=stored_as, **made))
    assert f"checkpoint_format in config.json is {other}" in message
    assert f"layers.0.qzeros of {tmp_path / 'model.safetensors'} are stored as {stored_as} stores" in message
    assert message.endswith(f"write {stored_as} there.")


@pytest.mark.parametrize("said", [{"sym": None}, {"dynamic": {"lm_head": {"bits": 8}}}])
def test_a_false_label_is_refused_where_symmetry_is_not_said(tmp_path: Path, said: dict[str, Any]) -> None:
    check_gptq(read_checkpoint(write_gptq(tmp_path, said)))
    assert "write gptq there" in refusal(write_gptq(tmp_path, said | {"checkpoint_format": "gptq_v2"}))


def test_zeros_that_are_not_symmetric_are_not_called_so(tmp_path: Path) -> None:
    message = refusal(write_gptq(tmp_path, {"sym": True}, is_symmetric=False))
    assert "sym in config.json is true, but the zero points in layers.0.qzeros" in message


def test_inputs_that_are_no_whole_number_of_groups(tmp_path: Path) -> None:
    """Without an order of inputs the last group has fewer."""
    folder = write_gptq(tmp_path, inputs=160, group_size=64, without="g_idx")
    checkpoint = read_checkpoint(folder)
    for layer in read_layers(checkpoint, read_settings(checkpoint)).values():
        assert [*layer.order()] == [0] * 64 + [1] * 64 + [2] * 32
    said = {"dynamic": {"-:lm_head": {}}, "group_size": 128}
    message = refusal(write_gptq(tmp_path, said, inputs=160, group_size=64, without="g_idx"))
    assert "has 3 scales for 160 inputs, no whole number for each, and no layers.0.g_idx says" in message


def test_an_order_of_inputs_needs_its_groups(tmp_path: Path) -> None:
    check_gptq(read_checkpoint(write_gptq(tmp_path, ORDERED, order=MIXED)))
    check_gptq(read_checkpoint(write_gptq(tmp_path, without="g_idx")))
    check_gptq(read_checkpoint(write_gptq(tmp_path, ORDERED, group_size=64)))
    assert "holds no layers.0.g_idx" in refusal(write_gptq(tmp_path, ORDERED, without="g_idx"))
    message = refusal(write_gptq(tmp_path, ORDERED))
    assert "desc_act in config.json is true, but the inputs in layers." in message
    assert "are in plain order: set desc_act to false" in message
    assert "not in plain order: set desc_act to true" in refusal(write_gptq(tmp_path, order=MIXED))


@pytest.mark.parametrize(("group", "told"), [(2, "group 2"), (-1, "group -1")])
def test_a_group_that_is_not_there_is_refused(tmp_path: Path, group: int, told: str) -> None:
    message = refusal(write_gptq(tmp_path, ORDERED, order=[*MIXED[:-1], group]))
    assert f"layers.0.g_idx in {tmp_path / 'model.safetensors'} names {told}, but there are 2" in message


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"bits": 8}, "layers.0.qzeros in {file} has shape [2, 4], but layers.0.qweight [8, 32] with bits 8"),
        ({"group_size": 16}, "has shape [2, 4], but layers.0.qweight [8, 32] with bits 4 and group_size 16"),
        ({"group_size": -1}, "needs [1, 4]: correct these there"),
        ({"group_size": None}, "with bits 4 and group_size 128"),
        ({"bits": 5}, "bits in config.json is 5: GPTQ is served with 2, 3, 4 or 8 bits"),
        ({"bits": "4"}, "bits in config.json is '4'"),
        ({"bits": True}, "bits in config.json is True"),
        ({"bits": None}, "bits in config.json is None"),
        ({"group_size": 0}, "group_size in config.json is 0"),
        ({"group_size": "32"}, "group_size in config.json is '32'"),
        ({"desc_act": "no"}, "desc_act in config.json is 'no': write true or false"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format in config.json is 'marlin': gptq and gptq_v2"),
    ],
)
def test_settings_that_do_not_fit_the_tensors(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    folder = write_gptq(tmp_path, said)
    assert words.format(file=folder / "model.safetensors") in refusal(folder)


@pytest.mark.parametrize(
    ("field", "other"),
    [("bits", 3), ("group_size", 64), ("desc_act", True), ("sym", False), ("checkpoint_format", "gptq_v2")],
)
@pytest.mark.parametrize("file", ["quantize_config.json", "quantization_config.json"])
def test_two_files_that_disagree(tmp_path: Path, file: str, field: str, other: object) -> None:
    folder = write_gptq(tmp_path)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / file).write_text(json.dumps(said))
    check_gptq(read_checkpoint(folder))
    (folder / file).write_text(json.dumps(said | {field: other}))
    named = "format" if field == "checkpoint_format" else field
    assert refusal(folder).startswith(
        f"config.json says {named} {said[field]!r}, but {file} says {other!r}: "
    )


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_part_that_is_missing_is_named(tmp_path: Path, part: str) -> None:
    with pytest.raises(FilesMissing, match=rf"lacks layers\.0\.{part}, but holds its other parts"):
        check_gptq(read_checkpoint(write_gptq(tmp_path, without=part)))


def test_weights_of_another_method_are_refused(tmp_path: Path) -> None:
    folder = write_gptq(tmp_path)
    safetensors(folder / "model.safetensors", {"a.weight": ("F16", [4, 4])})
    assert "no tensor is named *.qweight" in refusal(folder)
    awq: Tensors = {"a.qweight": ("I32", [64, 4]), "a.qzeros": ("I32", [2, 4]), "a.scales": ("F16", [2, 32])}
    safetensors(folder / "model.safetensors", awq)
    assert "correct these there, or take the weights of it" in refusal(folder)
    safetensors(folder / "model.safetensors", {**awq, "a.qweight": ("F16", [8, 32])})
    assert "a.qweight in " in refusal(folder)
    assert "is F16 [8, 32], which GPTQ does not write" in refusal(folder)


def test_layers_of_their_own_settings_are_read_by_their_shapes(tmp_path: Path) -> None:
    folder = write_gptq(tmp_path, {"bits": 4, "dynamic": {"layers": {"bits": 3}}}, bits=3)
    checkpoint = read_checkpoint(folder)
    layers = read_layers(checkpoint, read_settings(checkpoint))
    found = {(layer.bits, layer.inputs, layer.outputs, layer.groups) for layer in layers.values()}
    assert found == {(3, 64, 32, 2)}


@pytest.mark.parametrize(
    ("made", "expected"),
    [({}, (0, 5760, 8192)), ({"is_symmetric": False}, (8192, 0, 0))],
)
def test_what_is_loaded_is_packed_where_a_kernel_may_compute_with_it(
    tmp_path: Path, made: dict[str, Any], expected: tuple[int, ...]
) -> None:
    found = loaded_weights(read_checkpoint(write_gptq(tmp_path, **made)))
    assert (found.float_values, found.fixed_bytes, found.packed_values) == expected


def test_the_demo_is_right() -> None:
    check_gptq(read_checkpoint(demo.model_path("tide-demo-gptq")))
