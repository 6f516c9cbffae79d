"""Proves that a GPTQ checkpoint is what its configuration says, by the method's own invariants.

A layer of `inputs` x `outputs` is stored as codes of `bits` bits, packed along the inputs into `qweight`, and
for each group of inputs and each output a scale and a zero point (`qzeros`, packed along the outputs);
`g_idx` is the group of each input. Its weight is (code - zero) * scale. Format "gptq" stores zero - 1,
"gptq_v2" the zero itself, and nothing in the files but these numbers tells which it is:

- symmetric zeros are all 2 ^ (bits - 1), so what is stored is one number, which names the format;
- weights have a mean near zero, so the mean code is the mean zero, and what is stored lies 1 or 0 below it.

What is read is bounded: the headers, and samples of codes, zeros and groups. A wrong reading loads without an
error and answers garbage, and no later check sees it: batched and plain passes are wrong together.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt
from statistics import fmean, stdev
from typing import Any

from tidegate.errors import SourceError
from tidegate.sources.checkpoint import Checkpoint, FilesMissing
from tidegate.sources.facts import PACKED_PRECISIONS, StoredWeights
from tidegate.sources.tensors import StoredTensor

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
FIELDS = ("bits", "group_size", "desc_act", "sym", "dynamic")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
CPU_BITS, CPU_GROUPS = (4,), (16, 32, 64, 128)  # of PyTorch's own int4 kernel, which compiles nothing
FUSED = (".w1", ".gate_up_proj")  # GPTQModel renames or splits these, and finds no others
KINDS = ("I32",), ("I32",), ("F16", "BF16", "F32"), ("I32",)
SIDES = (2, 2, 2, 1)
WORD_BITS = 32
USUAL_GROUP_SIZE = 128  # what libraries take where none is named
MOST_LAYERS, MOST_ORDERS = 16, 256  # sampled for codes and zeros, and for the order of the inputs
MOST_INPUTS, MOST_OUTPUTS, MOST_FINE_OUTPUTS = 2048, 32, 256  # of a sampled layer; finer codes scatter more
SURE, MARGIN = 4, 0.3  # standard errors, and codes: another reading is the right one only where it is clear


@dataclass(frozen=True, slots=True)
class Settings:
    """How a checkpoint says that it was quantized. `source` names where."""

    source: str
    bits: int
    group_size: int  # -1: all inputs are one group
    is_ordered: bool  # desc_act: inputs of a group lie apart, in the order of their importance
    is_symmetric: bool | None  # None: not said
    format: str
    is_uniform: bool  # no layer has settings of its own


@dataclass(frozen=True, slots=True)
class Layer:
    """One quantized layer's tensors, whose shapes agree."""

    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None
    bits: int
    group_size: int  # inputs that share a scale, where no `g_idx` says it

    @property
    def inputs(self) -> int:
        return self.qweight.shape[0] * WORD_BITS // self.bits

    @property
    def outputs(self) -> int:
        return self.qweight.shape[1]

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    def order(self) -> Sequence[int]:
        """Return the group of each input."""
        if self.g_idx is None:
            return [index // self.group_size for index in range(self.inputs)]
        return array("i", self.g_idx.raw_row(0, self.inputs))


def check_gptq(checkpoint: Checkpoint) -> None:
    """Compare configuration and tensors. Raises `SourceError` with the file, the field or tensor, and what
    to do."""
    settings = read_settings(checkpoint)
    layers = list(read_layers(checkpoint, settings).values())
    _check_orders(settings, _spread(layers, MOST_ORDERS))
    _check_zeros(settings, _spread(layers, MOST_LAYERS))


def why_unpacked(settings: Settings, names: Iterable[str], precision: str, device: str) -> str:
    """Return why no kernel computes with the packed weights of these layers; empty where one may."""
    if precision not in PACKED_PRECISIONS:
        return f"no kernel computes in {precision}"
    if settings.format == V1 and settings.is_symmetric is False:
        return f"no kernel reads asymmetric zero points of the format {V1}"
    if device == "cpu" and (settings.bits not in CPU_BITS or settings.group_size not in CPU_GROUPS):
        return f"no kernel on CPU computes with {settings.bits} bits in groups of {settings.group_size}"
    fused = next((name for name in names if name.endswith(FUSED)), "")
    return f"GPTQModel knows layers like {fused} only in parts" if fused else ""


def loaded_weights(checkpoint: Checkpoint) -> StoredWeights:
    """Return what the weights of a checkpoint take once they are loaded, as far as no device matters."""
    if checkpoint.quantization != "gptq":
        return checkpoint.weights
    settings = read_settings(checkpoint)
    layers = read_layers(checkpoint, settings)
    packed = {f"{name}.{part}" for name in layers for part in PARTS}
    values = sum(tensor.count for name, tensor in checkpoint.tensors.items() if name not in packed)
    values += sum(layer.inputs * layer.outputs for layer in layers.values())
    if why_unpacked(settings, layers, PACKED_PRECISIONS[0], ""):
        return StoredWeights(values)
    return StoredWeights(0, checkpoint.weights.fixed_bytes, values)


def read_settings(checkpoint: Checkpoint) -> Settings:
    """Read the configuration, which may stand in two files. Raises `SourceError`."""
    said: dict[str, tuple[str, Any]] = {}
    for file, config in checkpoint.quantizations.items():
        for field, value in _fields(config).items():
            other, before = said.setdefault(field, (file, value))
            if before != value:
                raise _wrong(
                    f"{other} says {field} {before!r}, but {file} says {value!r}: keep the one that was "
                    "written with these weights, and correct the other."
                )
    source = next(iter(checkpoint.quantizations))
    found = {field: value for field, (_, value) in said.items()}
    bits, group_size = found.get("bits"), found.get("group_size", USUAL_GROUP_SIZE)
    form = found.get("format", V1)
    if type(bits) is not int or bits not in BITS:
        raise _wrong(f"bits in {source} is {bits!r}: GPTQ is served with 2, 3, 4 or 8 bits.")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise _wrong(f"group_size in {source} is {group_size!r}: give -1 or the inputs per group, as 128.")
    for field in ("desc_act", "sym"):
        if not isinstance(found.get(field, False), bool):
            raise _wrong(f"{field} in {source} is {found[field]!r}: write true or false.")
    if form not in (V1, V2):
        raise _wrong(
            f"checkpoint_format in {source} is {form!r}: {V1} and {V2} are served; export the model again in "
            "one of them."
        )
    is_ordered, is_uniform = found.get("desc_act", False), not found.get("dynamic")
    return Settings(source, bits, group_size, is_ordered, found.get("sym"), form, is_uniform)


def read_layers(checkpoint: Checkpoint, settings: Settings) -> dict[str, Layer]:
    """Return the quantized layers by their names. Raises `SourceError` where tensors are missing or their
    shapes do not fit together."""
    names = {name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith((".qweight", ".qzeros"))}
    if not names:
        raise _wrong(
            f"{settings.source} says that the weights are quantized with GPTQ, but no tensor is named "
            "*.qweight: remove the quantization from it, or copy the quantized weights."
        )
    return {name: _layer(checkpoint.tensors, name, settings) for name in sorted(names)}


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that decide how weights are read, under one name each; null says nothing."""
    found = {name: config[name] for name in FIELDS if config.get(name) is not None}
    for name in ("format", "checkpoint_format"):
        if config.get(name):
            found["format"] = config[name]
    return found


def _layer(tensors: Mapping[str, StoredTensor], name: str, settings: Settings) -> Layer:
    parts = qweight, qzeros, scales, g_idx = [tensors.get(f"{name}.{part}") for part in PARTS]
    if qweight is None or qzeros is None or scales is None:
        lacking = next(part for part, tensor in zip(PARTS, parts, strict=True) if tensor is None)
        raise FilesMissing(
            "SourceFormat",
            f"The checkpoint lacks {name}.{lacking}, but holds its other parts: copy it again.",
        )
    for tensor, kinds, sides in zip(parts, KINDS, SIDES, strict=True):
        if tensor and (tensor.kind not in kinds or len(tensor.shape) != sides or not tensor.count):
            raise _wrong(
                f"{tensor.name} in {tensor.file} is {tensor.kind} {list(tensor.shape)}, which GPTQ does not "
                f"write: {settings.source} names the wrong method, or the file is another's."
            )
    if g_idx is None and settings.is_ordered and scales.shape[0] > 1:
        raise _wrong(
            f"desc_act in {settings.source} is true, but {qweight.file} holds no {name}.g_idx, without which "
            "nobody knows which inputs belong to which scale: take the weights as they were exported, or "
            "set desc_act to false if they were quantized without it."
        )
    rows, outputs = qweight.shape
    bits, groups = settings.bits, 0
    if not settings.is_uniform:
        bits, groups = max(1, qzeros.shape[1] * WORD_BITS // outputs), scales.shape[0]
    inputs = rows * WORD_BITS // bits
    groups = groups or (1 if settings.group_size == -1 else ceil(inputs / settings.group_size))
    shapes = (groups, ceil(outputs * bits / WORD_BITS)), (groups, outputs), (inputs,)
    for part, shape in zip(parts[1:], shapes, strict=True):
        if part and part.shape != shape:
            raise _wrong(
                f"{part.name} in {part.file} has shape {list(part.shape)}, but {qweight.name} "
                f"{list(qweight.shape)} with bits {bits} and group_size {settings.group_size} of "
                f"{settings.source} needs {list(shape)}: correct these there, or take the weights of it."
            )
    size = inputs if groups == 1 else settings.group_size
    if ceil(inputs / size) != groups:  # a layer with settings of its own
        size = inputs // groups
        if g_idx is None and inputs % groups:
            raise _wrong(
                f"{qweight.name} in {qweight.file} has {groups} scales for {inputs} inputs, no whole "
                f"number for each, and no {name}.g_idx says which belong together: take the weights as they "
                "were exported, with it."
            )
    return Layer(qweight, qzeros, scales, g_idx, bits, size)


def _check_orders(settings: Settings, layers: Sequence[Layer]) -> None:
    """Check that every input's group exists, and that they are in order where the settings say so."""
    mixed: dict[bool, StoredTensor] = {}
    for layer in layers:
        if layer.g_idx is None:
            continue
        order = layer.order()
        lost = next((group for group in (min(order), max(order)) if not 0 <= group < layer.groups), None)
        if lost is not None:
            raise _wrong(
                f"{layer.g_idx.name} in {layer.g_idx.file} names group {lost}, but there are "
                f"{layer.groups}: the file is damaged; copy it again."
            )
        if layer.groups > 1:
            plain = all(before <= after for before, after in pairwise(order))
            mixed[not plain] = layer.g_idx
    if not settings.is_uniform or not mixed or settings.is_ordered in mixed:
        return
    tensor = mixed[not settings.is_ordered]
    found = "in plain order" if settings.is_ordered else "not in plain order"
    raise _wrong(
        f"desc_act in {settings.source} is {_json(settings.is_ordered)}, but the inputs in {tensor.name} of "
        f"{tensor.file} are {found}: set desc_act to {_json(not settings.is_ordered)} if the weights were "
        "quantized so, or take them as they were exported."
    )


def _check_zeros(settings: Settings, layers: Sequence[Layer]) -> None:
    """Check that the zero points are those of the format that the settings name."""
    other = V1 if settings.format == V2 else V2
    if settings.is_symmetric and settings.is_uniform:
        middle = 1 << (settings.bits - 1)
        expected = {V1: middle - 1, V2: middle}
        found = {code for layer in layers for code in _zeros(layer, layer.groups - 1, MOST_OUTPUTS)}
        if found == {expected[settings.format]}:
            return
        if found != {expected[other]}:
            raise _wrong(
                f"sym in {settings.source} is true, but the zero points in {layers[0].qzeros.name} and "
                f"others of {layers[0].qzeros.file} are {sorted(found)[:4]} and not all "
                f"{expected[settings.format]}: set sym to false if the weights were quantized so."
            )
    else:
        below = [mean for layer in layers for mean in _below_mean(layer)]
        error = stdev(below) / sqrt(len(below)) if len(below) > 1 else 1.0
        said = fmean(below) - (settings.format == V1)
        really = fmean(below) - (other == V1)
        if abs(said) - abs(really) < max(MARGIN, SURE * error):
            return
    raise _wrong(
        f"checkpoint_format in {settings.source} is {settings.format}, but the zero points in "
        f"{layers[0].qzeros.name} of {layers[0].qzeros.file} are stored as {other} stores them, off by one: "
        f"write {other} there."
    )


def _below_mean(layer: Layer) -> list[float]:
    """Return for some outputs how far the stored zeros lie below the codes, on average over the inputs."""
    words = min(layer.qweight.shape[0], MOST_INPUTS * layer.bits // WORD_BITS) // layer.bits * layer.bits
    outputs = min(layer.outputs, MOST_FINE_OUTPUTS if layer.bits == 8 else MOST_OUTPUTS)
    outputs -= outputs % (WORD_BITS // 4 if layer.bits != 3 else WORD_BITS)
    rows = [layer.qweight.raw_row(row, outputs) for row in range(words)]
    groups = Counter(layer.order()[: words * WORD_BITS // layer.bits])
    zeros = {group: _zeros(layer, group, outputs) for group in groups}
    found = []
    for output in range(outputs):
        codes = _codes(b"".join(row[4 * output : 4 * output + 4] for row in rows), layer.bits)
        stored = sum(count * zeros[group][output] for group, count in groups.items())
        found.append((sum(codes) - stored) / len(codes))
    return found


def _zeros(layer: Layer, group: int, outputs: int) -> Sequence[int]:
    """Return the stored zeros of a group for the first outputs."""
    words = min(layer.qzeros.shape[1], ceil(outputs * layer.bits / WORD_BITS))
    return _codes(layer.qzeros.raw_row(group, words), layer.bits)[: layer.outputs]


def _codes(packed: bytes, bits: int) -> Sequence[int]:
    """Unpack a stream of codes, the lowest bits first."""
    if bits == 8:
        return packed
    stream, mask = int.from_bytes(packed, "little"), (1 << bits) - 1
    return [stream >> at & mask for at in range(0, len(packed) * 8 // bits * bits, bits)]


def _spread(items: Sequence[Layer], most: int) -> Sequence[Layer]:
    return items[:: ceil(len(items) / most)]


def _json(value: bool) -> str:
    return "true" if value else "false"


def _wrong(message: str) -> SourceError:
    return SourceError("SourceFormat", message)
