"""Linear layers whose weights lie in the order in which oneDNN computes with them.

A plain `torch.nn.Linear` in bfloat16 on CPU reorders its weight in every call, which for the few rows of a
decoding step costs as much as the product itself. Packed once, the results are the same (ADR 0025).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

ROWS = 16  # that the layout is chosen for; it serves any number
PROVED_LAYERS = 3


class PackedLinear(Module):
    """Takes the place of a `Linear` on CPU in bfloat16."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    @property
    def weight(self) -> Tensor:
        """Return the weight [outputs, inputs] as plain memory, for code that looks at it: a copy."""
        return self.packed.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")
        return found

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def can_pack() -> bool:
    """True where oneDNN computes in bfloat16 itself."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: Module) -> int:
    """Put packed layers in the place of a model's plain ones, one after the other so that no second copy of
    the weights is held. Returns how many. A weight that is also used elsewhere, as a tied head's is, stays.

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
    if not can_pack() or not all(
        _is_alike(child) for _, _, child in places[:: max(1, len(places) // PROVED_LAYERS)]
    ):
        return 0
    made: dict[int, PackedLinear] = {}
    for parent, name, child in places:
        if id(child) not in made:
            made[id(child)] = PackedLinear(child)
        setattr(parent, name, made[id(child)])
        child.weight = Parameter(torch.empty(0), requires_grad=False)  # whoever holds the layer frees it
    return len(made)


def _is_packable(linear: Linear) -> bool:
    weight = linear.weight
    has_hooks = bool(linear._forward_hooks or linear._forward_pre_hooks)
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not has_hooks


def _is_alike(linear: Linear) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, linear.in_features, generator=generator).to(linear.weight.dtype)
    with torch.inference_mode():
        plain, packed = linear(inputs).float(), PackedLinear(linear)(inputs).float()
    error = torch.linalg.vector_norm(packed - plain) / torch.linalg.vector_norm(plain).clamp_min(1e-6)
    return bool(error <= torch.finfo(torch.bfloat16).eps)
