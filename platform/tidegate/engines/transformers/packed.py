"""Linear layers whose weights lie in the order in which oneDNN computes with them.

A plain `torch.nn.Linear` in bfloat16 on CPU reorders its weight in every call, which for the few rows of a
decoding step costs as much as the product itself. Packed once, the results are the same (ADR 0025). Layers
that take the same inputs are packed together: one product in the place of two or three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

ROWS = 16  # that the layout is chosen for; it serves any number
PROVED_LAYERS = 3


class PackedLinear(Module):
    """Takes the place of a `Linear` on CPU in bfloat16, or of some that take the same inputs: their outputs
    follow each other."""

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
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    @property
    def weight(self) -> Tensor:
        """Return the weight [outputs, inputs] as plain memory, for code that looks at it: a copy."""
        return self.packed.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")
        return found

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Together:
    """Layers that are packed together. The first one called with some inputs computes all of them, and the
    others, called with the same, take their part of that."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.whole = PackedLinear(*linears)
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


def can_pack() -> bool:
    """True where oneDNN computes in bfloat16 itself."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: Module, together: Iterable[Sequence[Module]] = ()) -> int:
    """Put packed layers in the place of a model's plain ones, one after the other so that no second copy of
    the weights is held. `together` are layers that the model calls with the same inputs. Returns how many it
    packed. A weight that is also used elsewhere, as a tied head's is, stays.

    Where a packed layer does not give what the plain one gives, none is packed (checked on samples).
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is Linear and _is_packable(child)
    ]
    users: Counter[int] = Counter()
    for module in set(model.modules()):
        users.update(id(weight) for weight in module.parameters(recurse=False))
    places = [place for place in places if users[id(place[2].weight)] == 1]
    groups = [*_groups([child for _, _, child in places], together)]
    if not can_pack() or not all(
        _is_alike(group) for group in groups[:: max(1, len(groups) // PROVED_LAYERS)]
    ):
        return 0
    made: dict[Linear, Module] = {}
    for group in groups:
        if len(group) == 1:
            made[group[0]] = PackedLinear(*group)
        else:
            joint = Together(group)
            made.update((linear, PackedPart(joint, index)) for index, linear in enumerate(group))
        for linear in group:
            linear.weight = Parameter(torch.empty(0), requires_grad=False)  # whoever holds the layer frees it
    for parent, name, child in places:
        setattr(parent, name, made[child])
    return len(made)


def _groups(linears: Sequence[Linear], together: Iterable[Sequence[Module]]) -> Iterator[list[Linear]]:
    """Return each of `linears` once, alone or with those that it is packed together with."""
    left = dict.fromkeys(linears)
    joint = {group[0]: group for group in together}
    for linear in linears:
        if linear not in left:
            continue
        group = [each for each in joint.get(linear, ()) if isinstance(each, Linear) and each in left]
        is_joint = len(group) == len(joint.get(linear, ())) > 1 and len({*map(_kind, group)}) == 1
        group = group if is_joint else [linear]
        for each in group:
            del left[each]
        yield group


def _kind(linear: Linear) -> tuple[int, bool]:
    return linear.in_features, linear.bias is None


def _is_packable(linear: Linear) -> bool:
    weight = linear.weight
    has_hooks = bool(linear._forward_hooks or linear._forward_pre_hooks)
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not has_hooks


def _is_alike(linears: Sequence[Linear]) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, linears[0].in_features, generator=generator).to(linears[0].weight.dtype)
    with torch.inference_mode():
        plain = torch.cat([linear(inputs) for linear in linears], dim=-1).float()
        packed = PackedLinear(*linears)(inputs).float()
    error = torch.linalg.vector_norm(packed - plain) / torch.linalg.vector_norm(plain).clamp_min(1e-6)
    return bool(error <= torch.finfo(torch.bfloat16).eps)
