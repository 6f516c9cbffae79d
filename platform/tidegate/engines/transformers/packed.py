"""Linear layers whose weights lie in the order in which a library computes with them.

A plain `torch.nn.Linear` in bfloat16 on CPU reorders its weight in every call, which for the few rows of a
decoding step costs as much as the product itself. Packed once, the results are the same (ADR 0025). Where a
processor has no instructions for the weights' type, PyTorch multiplies number by number, and packing them for
FBGEMM is several times as fast (ADR 0030). Layers that take the same inputs are packed together: one product
in the place of two or three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter, functional

from tidegate.engines.transformers.memory import usable_cores

ROWS = 16  # that the layout is chosen for; it serves any number
PROVED_LAYERS = 3
HALVES = (torch.bfloat16, torch.float16)
FEWEST_HALF = 2**-10  # the largest weight of a layer that float16 holds as well as bfloat16, at least
BLOCK = 1 << 20  # weights that are widened at a time: they stay in the cache
WORTH_WIDENING = 4  # rows from which on that is faster than a product number by number
MOST_IN_HAND = 1 << 26  # weights that are packed at the same time


class PackedLinear(Module, ABC):
    """Takes the place of a `Linear` on CPU, or of some that take the same inputs: their outputs follow each
    other."""

    def __init__(self, *linears: Linear) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self.bias: Tensor | None = linears[0].bias
        weight = linears[0].weight.detach()
        if len(linears) > 1:
            weight = torch.cat([linear.weight.detach() for linear in linears])
            if self.bias is not None:
                biases = torch.cat([linear.bias.detach() for linear in linears])
                self.bias = Parameter(biases, requires_grad=False)
        self.hold(weight)

    @staticmethod
    @abstractmethod
    def takes(weight: Tensor) -> bool:
        """Tell whether a weight of this type and size can be held so, on this machine."""

    @abstractmethod
    def hold(self, weight: Tensor) -> None:
        """Take the weight [outputs, inputs]."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """Return the weight [outputs, inputs] as plain memory, for code that looks at it: a copy."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class OneDnnLinear(PackedLinear):
    """Multiplies in bfloat16, in the order of oneDNN, where the processor has instructions for it."""

    packed: Tensor

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and has_product(weight.dtype)

    def hold(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    @property
    def weight(self) -> Tensor:
        return self.packed.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        return onednn_product(inputs, self.packed, self.bias)


def onednn_product(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return found


class FbgemmLinear(PackedLinear):
    """Holds the weight in float16 and multiplies in float32, for processors that have instructions for
    neither type. PyTorch's plain product does it number by number there."""

    packed: Any  # a ScriptObject
    dtype: torch.dtype

    @staticmethod
    def takes(weight: Tensor) -> bool:
        if weight.dtype not in HALVES or "fbgemm" not in torch.backends.quantized.supported_engines:
            return False
        largest = max(map(abs, map(float, torch.aminmax(weight.detach()))))
        return not has_product(weight.dtype) and FEWEST_HALF <= largest <= torch.finfo(torch.float16).max

    def hold(self, weight: Tensor) -> None:
        bias = None if self.bias is None else self.bias.detach().float()
        self.packed, self.dtype = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias), weight.dtype

    @property
    def weight(self) -> Tensor:
        found: Tensor = torch.ops.quantized.linear_unpack_fp16(self.packed)[0]
        return found.to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = torch.ops.quantized.linear_dynamic_fp16(inputs.float(), self.packed)
        return found.to(self.dtype)


class WidenedLinear(Module):
    """Takes the place of a `Linear` that would be a `FbgemmLinear`, but whose weight is used elsewhere too:
    that is widened block by block in every call."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        found = widened_product(inputs.reshape(-1, self.in_features), self.weight, self.bias)
        return found.view(*inputs.shape[:-1], self.out_features)


def widened_product(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: int = BLOCK,  # TorchScript knows no names of a module
    fewest: int = WORTH_WIDENING,
) -> Tensor:
    """Map [rows, inputs] to [rows, outputs]."""
    if inputs.shape[0] < fewest:
        return functional.linear(inputs, weight, bias)
    wide, parts = inputs.float(), torch.split(weight, max(1, block // weight.shape[1]))
    found = torch.cat([functional.linear(wide, part.float()) for part in parts], dim=1)
    if bias is not None:
        found += bias
    return found.to(inputs.dtype)


class Together:
    """Layers that are packed together. The first one called with some inputs computes all of them, and the
    others, called with the same, take their part of that."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.whole = _whole(linears)
        self.sizes = [linear.out_features for linear in linears]
        self._inputs: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def part(self, index: int, inputs: Tensor) -> Tensor:
        found = self._parts[index] if inputs is self._inputs else None
        if found is None:
            self._inputs, self._parts = inputs, [*torch.split(self.whole(inputs), self.sizes, dim=-1)]
            found = self._parts[index]
            assert found is not None
        self._parts[index] = None
        if not any(part is not None for part in self._parts):
            self._inputs = None  # which may be large
        return found


class PackedPart(Module):
    """Takes the place of a `Linear` that is packed together with others."""

    def __init__(self, together: Together, index: int) -> None:
        super().__init__()
        self.together, self.index = together, index
        self.whole = together.whole  # as a module of the model's
        self.in_features, self.out_features = self.whole.in_features, together.sizes[index]

    @property
    def weight(self) -> Tensor:
        """See `PackedLinear.weight`."""
        return torch.split(self.whole.weight, self.together.sizes)[self.index]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.together.part(self.index, inputs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def joint(*layers: Module) -> PackedLinear | None:
    """Return what computes all of these layers, where they are packed together in this order."""
    first = layers[0]
    if not isinstance(first, PackedPart) or len(layers) != len(first.together.sizes):
        return None
    for index, layer in enumerate(layers):
        if not isinstance(layer, PackedPart) or (layer.together, layer.index) != (first.together, index):
            return None
        if layer._forward_hooks or layer._forward_pre_hooks:
            return None
    return first.whole


KINDS = (OneDnnLinear, FbgemmLinear)


def kind_of(weight: Tensor, kinds: Sequence[type[PackedLinear]] = KINDS) -> type[PackedLinear] | None:
    """Return how a weight is packed here; None: it stays as it is."""
    if weight.device.type != "cpu":
        return None
    return next((kind for kind in kinds if kind.takes(weight)), None)


def pack_linears(
    model: Module,
    together: Iterable[Sequence[Module]] = (),
    allowed: Sequence[type[PackedLinear]] = KINDS,
) -> int:
    """Put packed layers in the place of a model's plain ones, few at a time so that no second copy of the
    weights is held. `together` are layers that the model calls with the same inputs. Returns how many it
    replaced. A weight that is also used elsewhere, as a tied head's is, stays.

    Where a packed layer does not give what the plain one gives, none is packed (checked on samples).
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is Linear and not child._forward_hooks and not child._forward_pre_hooks
    ]
    users: Counter[int] = Counter()
    for module in set(model.modules()):
        users.update(id(weight) for weight in module.parameters(recurse=False))
    kinds = {child: kind for _, _, child in places if (kind := kind_of(child.weight, allowed)) is not None}
    shared = [child for child in kinds if users[id(child.weight)] > 1]
    made: dict[Module, Module] = {
        child: WidenedLinear(child) for child in shared if kinds.pop(child) is FbgemmLinear
    }
    groups = [*_groups(kinds, together)]
    if not all(_is_alike(group) for group in groups[:: max(1, len(groups) // PROVED_LAYERS)]):
        return 0
    with ThreadPoolExecutor(_workers(groups)) as workers:
        for group, packed in zip(groups, workers.map(_packed, groups), strict=True):
            made.update(zip(group, packed, strict=True))
    for parent, name, child in places:
        if child in made:
            setattr(parent, name, made[child])
    return len(made)


def _packed(group: Sequence[Linear]) -> list[Module]:
    """Return what takes the place of each, whose weights are gone then."""
    made: list[Module]
    if len(group) == 1:
        made = [_whole(group)]
    else:
        joint = Together(group)
        made = [PackedPart(joint, index) for index in range(len(group))]
    for linear in group:
        linear.weight = Parameter(torch.empty(0), requires_grad=False)  # whoever holds the layer frees it
    return made


def _whole(linears: Sequence[Linear]) -> PackedLinear:
    kind = kind_of(linears[0].weight)
    assert kind is not None
    return kind(*linears)


def _workers(groups: Sequence[Sequence[Linear]]) -> int:
    """Return how many groups may be packed at once: each is held three times over meanwhile."""
    largest = max((sum(linear.weight.numel() for linear in group) for group in groups), default=1)
    return max(1, min(usable_cores(), MOST_IN_HAND // largest))


def _groups(
    kinds: Mapping[Linear, type[PackedLinear]], together: Iterable[Sequence[Module]]
) -> Iterator[list[Linear]]:
    """Return each of these once, alone or with those that it is packed together with."""
    left = dict.fromkeys(kinds)
    joint = {group[0]: group for group in together}
    for linear in kinds:
        if linear not in left:
            continue
        group = [each for each in joint.get(linear, ()) if isinstance(each, Linear) and each in left]
        alike = {(kinds[each], each.in_features, each.bias is None) for each in group}
        is_joint = len(group) == len(joint.get(linear, ())) > 1 and len(alike) == 1
        group = group if is_joint else [linear]
        for each in group:
            del left[each]
        yield group


def _is_alike(linears: Sequence[Linear]) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, linears[0].in_features, generator=generator).to(linears[0].weight.dtype)
    with torch.inference_mode():
        plain = torch.cat([linear(inputs) for linear in linears], dim=-1)
        packed = _whole(linears)(inputs).float()
    wide = plain.float()
    error = torch.linalg.vector_norm(packed - wide) / torch.linalg.vector_norm(wide).clamp_min(1e-6)
    return bool(error <= torch.finfo(plain.dtype).eps)


def has_product(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN multiplies numbers of this type here, as PyTorch's plain layers then do."""
    asked = torch.ops.mkldnn
    has = asked._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else asked._is_mkldnn_fp16_supported
    return bool(torch._C._has_mkldnn and has())
