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
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter, functional

from tidegate.engines.transformers.memory import usable_cores

ROWS = 16  # that the layout is chosen for; it serves any number
PROVED_LAYERS = 3
HALVES = (torch.bfloat16, torch.float16)
SMALLEST_HALF = 2**-14  # from which on float16 holds numbers with all of its digits
PART = 1 << 24  # weights that FBGEMM packs as one: they are held in float32 meanwhile
PARTS_AT_ONCE = 4
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
        self.plain: Tensor | None = None
        self.hold(weight)

    @staticmethod
    @abstractmethod
    def takes(weight: Tensor) -> bool:
        """Tell whether a weight of this type and size can be held so, on this machine."""

    @abstractmethod
    def hold(self, weight: Tensor) -> None:
        """Take the weight [outputs, inputs]."""

    @abstractmethod
    def unpacked(self) -> Tensor:
        """Return the weight [outputs, inputs] as plain memory, and let go what was packed."""

    @abstractmethod
    def product(self, inputs: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""

    @property
    def weight(self) -> Tensor:
        """Return the weight [outputs, inputs]. What asks for it does so at every call, as Mamba's layers do:
        so it is plain memory from then on."""
        if self.plain is None:
            self.plain = self.unpacked()
        return self.plain

    def forward(self, inputs: Tensor) -> Tensor:
        if self.plain is None:
            return self.product(inputs)
        rows = inputs.reshape(-1, self.in_features)
        has = has_product(inputs.dtype)
        found = (
            functional.linear(rows, self.plain, self.bias)
            if has
            else widened_product(rows, self.plain, self.bias)
        )
        return found.view(*inputs.shape[:-1], self.out_features)

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

    def unpacked(self) -> Tensor:
        weight = self.packed.to_dense()
        del self.packed
        return weight

    def product(self, inputs: Tensor) -> Tensor:
        return onednn_product(inputs, self.packed, self.bias)


def onednn_product(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return found


class FbgemmLinear(PackedLinear):
    """Holds the weight in float16 and multiplies in float32, for processors without instructions for the
    weight's own type. PyTorch's plain product does it number by number there."""

    packed: list[Any]  # ScriptObjects, whose outputs follow each other

    @staticmethod
    def takes(weight: Tensor) -> bool:
        if weight.dtype not in HALVES or has_product(weight.dtype):
            return False
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            return False
        least, most = torch.aminmax(weight.detach(), dim=1)  # of each output
        largest = torch.maximum(-least, most).float()
        is_held = (largest == 0) | (largest >= SMALLEST_HALF) & (largest <= torch.finfo(torch.float16).max)
        return bool(is_held.all())

    def hold(self, weight: Tensor) -> None:
        outputs = max(1, PART // weight.shape[1])
        biases = [None] if self.bias is None else torch.split(self.bias.detach().float(), outputs)
        parts = torch.split(weight, outputs)
        self.dtype = weight.dtype
        with ThreadPoolExecutor(min(len(parts), PARTS_AT_ONCE, usable_cores())) as workers:
            self.packed = [*workers.map(_packed_part, parts, cycle(biases))]

    def unpacked(self) -> Tensor:
        parts = [torch.ops.quantized.linear_unpack_fp16(part)[0].to(self.dtype) for part in self.packed]
        del self.packed
        return torch.cat(parts)

    def product(self, inputs: Tensor) -> Tensor:
        wide = inputs.float()
        parts = [torch.ops.quantized.linear_dynamic_fp16(wide, part) for part in self.packed]
        found: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return found.to(inputs.dtype)


def _packed_part(weight: Tensor, bias: Tensor | None) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)


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

    def __init__(self, kind: type[PackedLinear], linears: Sequence[Linear]) -> None:
        self.whole = kind(*linears)
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
    """Put packed layers in the place of a model's plain ones, few at a time (`MOST_IN_HAND`) so that no
    second copy of the weights is held. `together` are layers that the model calls with the same inputs.
    Returns how many it replaced. A weight that is also used elsewhere, as a tied head's is, stays.

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
    each = [kinds[group[0]] for group in groups]
    step = max(1, len(groups) // PROVED_LAYERS)
    if not all(map(_is_alike, each[::step], groups[::step])):
        return 0
    with ThreadPoolExecutor(_workers(groups)) as workers:
        # FBGEMM packs on one core; oneDNN takes all of them for each.
        all_of = workers.map if FbgemmLinear in each else map
        for group, packed in zip(groups, all_of(_packed, each, groups), strict=True):
            made.update(zip(group, packed, strict=True))
    for parent, name, child in places:
        if child in made:
            setattr(parent, name, made[child])
    return len(made)


def _packed(kind: type[PackedLinear], group: Sequence[Linear]) -> list[Module]:
    """Return what takes the place of each, whose weights are gone then."""
    made: list[Module]
    if len(group) == 1:
        made = [kind(*group)]
    else:
        joint = Together(kind, group)
        made = [PackedPart(joint, index) for index in range(len(group))]
    for linear in group:
        linear.weight = Parameter(torch.empty(0), requires_grad=False)  # whoever holds the layer frees it
    return made


def _workers(groups: Sequence[Sequence[Linear]]) -> int:
    """Return how many groups may be packed at once."""
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


def _is_alike(kind: type[PackedLinear], linears: Sequence[Linear]) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, linears[0].in_features, generator=generator).to(linears[0].weight.dtype)
    with torch.inference_mode():
        plain = torch.cat([linear(inputs) for linear in linears], dim=-1)
        packed = kind(*linears)(inputs).float()
    wide = plain.float()
    error = torch.linalg.vector_norm(packed - wide) / torch.linalg.vector_norm(wide).clamp_min(1e-6)
    return bool(error <= torch.finfo(plain.dtype).eps)


def has_product(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN multiplies bfloat16, or float16, here; PyTorch's plain layers do then, too."""
    if not torch._C._has_mkldnn:
        return False
    asked = torch.ops.mkldnn
    has = asked._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else asked._is_mkldnn_fp16_supported
    return bool(has())
