"""Loads GPTQ checkpoints: packed, for kernels that compute with that, or unpacked into plain weights.

Packed weights take the memory that they were quantized for, so they come first: on a CPU as layers of our own
(`int4`), else by GPTQModel. But kernels on CPU know 4 bits, some group sizes and half precision only, and
GPTQModel's idea of an architecture's fused layers is not always the checkpoint's. What cannot be loaded so,
or computes otherwise than the method says, is unpacked layer by layer while transformers itself loads it:
every architecture, bit width and precision, at the memory of a checkpoint that is not quantized.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tidegate.engines.transformers.int4 import KERNEL_OUTPUTS
from tidegate.engines.transformers.int4_tiles import int4_linear
from tidegate.sources.checkpoint import Checkpoint
from tidegate.sources.gptq import PARTS, V1, WORD_BITS, Layer, Settings
from tidegate.sources.tensors import StoredTensor

SAMPLED_LAYERS = 3
PROVED_ROWS = 32  # beside one: kernels are chosen by the number of rows
TOLERANCE = 0.05  # of a layer's outputs in half precision; a zero point that is off by one gives 0.2 and more
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
# Fused layers of transformers, and the parts that GPTQModel splits them into before it quantizes.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}
FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def load_packed(
    checkpoint: Checkpoint, settings: Settings, layers: Mapping[str, Layer], precision: str, device: str
) -> tuple[Any, list[str]]:
    """Load by GPTQModel, and prove on samples that its layers compute what the method says. Returns the model
    and the tensors that it has no use for.

    Raises whatever GPTQModel does, and ValueError.
    """
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(
        str(checkpoint.path),
        device=device,
        backend=BACKEND.GPTQ_TORCH_ATEN if device == "cpu" else BACKEND.AUTO,
        dtype=getattr(torch, precision),
        trust_remote_code=False,
    ).model
    modules = dict(model.named_modules())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    plain = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in layers}
    missing = [layer for layer in layers if not hasattr(modules.get(layer), "qweight")]
    missing += sorted(plain - tied - checkpoint.tensor_names)
    if missing:
        raise ValueError(f"GPTQModel holds {missing[0]} otherwise than the checkpoint")
    prove_layers(model, settings, layers)
    unused = checkpoint.tensor_names - set(model.state_dict())
    return model, [name for name in unused if name.rpartition(".")[0] not in layers]


def prove_layers(model: Any, settings: Settings, layers: Mapping[str, Layer]) -> None:
    """Compare samples of the packed layers with the weights that the method says, for one row and for many.
    Raises ValueError."""
    for name in list(layers)[:: max(1, len(layers) // SAMPLED_LAYERS)]:
        module = model.get_submodule(name)
        weight = Unpacked(layers[name], settings.format)[...]
        inputs = torch.randn(PROVED_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
        expected = inputs @ weight.T
        if (bias := getattr(module, "bias", None)) is not None:
            expected += bias.float().cpu()
        for rows in (1, PROVED_ROWS):
            with torch.inference_mode():
                found = module(inputs[:rows].to(model.device, model.dtype)).float().cpu()
            error = float(torch.linalg.vector_norm(found - expected[:rows]) / expected[:rows].norm())
            if not error <= TOLERANCE:
                raise ValueError(
                    f"the kernel computes {name} wrong: of {rows} rows the outputs differ by {error:.2g}"
                )


def hold_packed(model: Any, settings: Settings, layers: Mapping[str, Layer]) -> None:
    """Give the `Int4Linear` of `model` their weights, and prove that they compute what the method says.
    Raises ValueError."""
    for name, layer in layers.items():
        model.get_submodule(name).hold(*numbers(layer, settings.format))
    prove_layers(model, settings, layers)


def packable(skeleton: Any, layers: Mapping[str, Layer]) -> bool:
    """Tell whether each of the layers is one of the architecture's own that `Int4Linear` can stand for."""
    modules = dict(skeleton.named_modules())
    return all(
        type(module := modules.get(name)) is nn.Linear
        and (module.in_features, module.out_features) == (layer.inputs, layer.outputs)
        and layer.outputs % KERNEL_OUTPUTS == 0
        for name, layer in layers.items()
    )


def with_int4_layers(architecture: Any, names: Iterable[str]) -> Any:
    """Return `architecture` with an `Int4Linear` in place of each of the layers named."""

    def build(self: Any, config: Any) -> None:
        architecture.__init__(self, config)
        for name in names:
            self.set_submodule(name, int4_linear(self.get_submodule(name)))

    body = {"__init__": build, "__module__": architecture.__module__}
    return type(architecture.__name__, (architecture,), body)


def unpacked_weights(
    checkpoint: Checkpoint, settings: Settings, layers: Mapping[str, Layer], skeleton: Any
) -> dict[str, Lazy]:
    """Return the checkpoint's tensors as those of one that is not quantized, each made when it is read.

    `skeleton` is the architecture without weights.
    """
    from transformers.pytorch_utils import Conv1D

    parts = {f"{name}.{part}" for name in layers for part in PARTS}
    modules = dict(skeleton.named_modules())
    found: dict[str, Lazy] = {
        name: Stored(tensor) for name, tensor in checkpoint.tensors.items() if name not in parts
    }
    for name, layer in layers.items():
        # GPT-2's layers keep their weight as inputs x outputs.
        found[f"{name}.weight"] = Unpacked(
            layer, settings.format, as_stored=isinstance(modules.get(name), Conv1D)
        )
    _fuse_experts(found, skeleton)
    for name in set(skeleton.state_dict()) - set(found):
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        split = [f"{prefix}.{part}.weight" for part in FUSED.get(last, ())]
        if split and all(part in found for part in split):
            found[name] = Joined([found.pop(part) for part in split], torch.cat)
    return found


class Lazy(ABC):
    """A tensor that transformers reads by slicing it, as it does those of safetensors."""

    @abstractmethod
    def __getitem__(self, _all: object) -> Tensor: ...


@dataclass(frozen=True)
class Stored(Lazy):
    tensor: StoredTensor

    def __getitem__(self, _all: object) -> Tensor:
        return read(self.tensor)


@dataclass(frozen=True)
class Joined(Lazy):
    parts: Sequence[Lazy]
    join: Callable[[list[Tensor]], Tensor]

    def __getitem__(self, _all: object) -> Tensor:
        return self.join([part[...] for part in self.parts])


@dataclass(frozen=True)
class Unpacked(Lazy):
    """A quantized layer's weight in float32: outputs x inputs, or the other way round `as_stored`."""

    layer: Layer
    format: str
    as_stored: bool = False

    def __getitem__(self, _all: object) -> Tensor:
        codes, zeros, scales, groups = numbers(self.layer, self.format)
        weight = (codes.float() - zeros.float()[groups]) * scales[groups]
        return weight if self.as_stored else weight.T.contiguous()


def numbers(layer: Layer, format: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read a layer's codes (uint8, inputs x outputs), zeros (uint8) and scales (float32, groups x outputs),
    and the group of each input."""
    zeros = unpack(read(layer.qzeros).T, layer.bits).T[:, : layer.outputs]
    if format == V1:
        zeros = (zeros + 1) & ((1 << layer.bits) - 1)  # where 0 was stored, it wrapped around
    groups = torch.tensor(layer.order(), dtype=torch.long)
    return unpack(read(layer.qweight), layer.bits), zeros, read(layer.scales).float(), groups


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 [words, columns] to uint8 [codes, columns]; codes are a stream, the lowest bits first."""
    if 8 % bits == 0:  # whole codes in every byte
        parts = words.flatten().view(torch.uint8).view(*words.shape, 4)
        shifted = [(parts >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(shifted, dim=-1).flatten(2).transpose(1, 2).flatten(0, 1)
    run = bits // gcd(bits, WORD_BITS)  # words that hold whole codes: three of them 32 codes of 3 bits
    runs = words.reshape(-1, run, words.shape[1]).long() & 0xFFFFFFFF
    codes = []
    for at in range(0, run * WORD_BITS, bits):
        word, shift = divmod(at, WORD_BITS)
        code = runs[:, word] >> shift
        if shift + bits > WORD_BITS:
            code = code | runs[:, word + 1] << (WORD_BITS - shift)
        codes.append((code & ((1 << bits) - 1)).to(torch.uint8))
    return torch.stack(codes, dim=1).flatten(0, 1)


def read(tensor: StoredTensor) -> Tensor:
    with safe_open(tensor.file, framework="pt") as file:
        found: Tensor = file.get_tensor(tensor.name)
    return found


def _fuse_experts(found: dict[str, Lazy], skeleton: Any) -> None:
    """Stack experts that are stored one by one where the architecture holds all of a layer in one weight."""
    experts: dict[str, dict[str, dict[int, str]]] = {}
    for name in found:
        if match := EXPERT.fullmatch(name):
            experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = name
    targets = set(skeleton.state_dict())
    for prefix, parts in experts.items():
        for fused, names in FUSED_EXPERTS.items():
            if f"{prefix}.{fused}" in targets and all(part in parts for part in names):
                each = [
                    Joined([found.pop(parts[part][number]) for part in names], torch.cat)
                    for number in sorted(parts[names[0]])
                ]
                found[f"{prefix}.{fused}"] = Joined(each, torch.stack)
