"""The parts of a plain decoder's layers, each part for all layers, in code that TorchScript compiles.

Called from Python, every operation of a step takes the interpreter's lock back, which a replica's event loop
wants as well, and finds the caches full of weights. Compiled, a step is one call without the lock. What is
here runs both ways, and what a model has that is not here (`Other`) runs in Python alone.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from tidegate.engines.transformers.int4 import Int4Linear, int4_product
from tidegate.engines.transformers.int4_tiles import TiledInt4Linear, tiled_product
from tidegate.engines.transformers.packed import (
    FbgemmLinear,
    OneDnnLinear,
    PackedLinear,
    WidenedLinear,
    onednn_product,
    widened_product,
)

log = logging.getLogger(__name__)

STATIC_ROPE = ("default", "linear", "yarn", "llama3", "proportional")  # others look at what runs
SAMPLED = (0, 1, 2, 77, 4095, 100_000)  # positions


class Other(Module):
    """Anything that maps [tokens, numbers], layer by layer. TorchScript does not take it."""

    def __init__(self, operations: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.operations = list(operations)

    def forward(self, inputs: Tensor, at: int) -> Tensor:
        return self.operations[at](inputs)


class PlainProducts(Module):
    weights: list[Tensor]
    biases: list[Tensor | None]

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.weights = [layer.weight.detach() for layer in layers]
        self.biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]

    def forward(self, inputs: Tensor, at: int) -> Tensor:
        return linear(inputs, self.weights[at], self.biases[at])


class WidenedProducts(PlainProducts):
    def forward(self, inputs: Tensor, at: int) -> Tensor:
        return widened_product(inputs, self.weights[at], self.biases[at])


class OneDnnProducts(Module):
    packed: list[Tensor]
    biases: list[Tensor | None]

    def __init__(self, layers: Sequence[OneDnnLinear]) -> None:
        super().__init__()
        self.packed = [layer.packed for layer in layers]
        self.biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]

    def forward(self, inputs: Tensor, at: int) -> Tensor:
        return onednn_product(inputs, self.packed[at], self.biases[at])


class FbgemmProducts(Module):
    begins: list[int]

    def __init__(self, layers: Sequence[FbgemmLinear]) -> None:
        super().__init__()
        self.packed = [part for layer in layers for part in layer.packed]
        self.begins = [0, *accumulate(len(layer.packed) for layer in layers)]

    def forward(self, inputs: Tensor, at: int) -> Tensor:
        wide, begin, end = inputs.float(), self.begins[at], self.begins[at + 1]
        found = torch.ops.quantized.linear_dynamic_fp16(wide, self.packed[begin])
        if end > begin + 1:
            parts = [found]
            for place in range(begin + 1, end):
                parts.append(torch.ops.quantized.linear_dynamic_fp16(wide, self.packed[place]))
            found = torch.cat(parts, dim=-1)
        result: Tensor = found.to(inputs.dtype)
        return result


class Int4Products(Module):
    packed: list[Tensor]
    scales: list[Tensor]
    sizes: list[int]
    orders: list[Tensor | None]
    biases: list[Tensor | None]

    def __init__(self, layers: Sequence[Int4Linear]) -> None:
        super().__init__()
        self.packed = [layer.packed for layer in layers]
        self.scales = [layer.scales for layer in layers]
        self.sizes = [layer.kernel[1] for layer in layers]
        self.orders = [layer.order for layer in layers]
        self.biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]

    def forward(self, inputs: Tensor, at: int) -> Tensor:
        return int4_product(
            inputs, self.packed[at], self.sizes[at], self.scales[at], self.orders[at], self.biases[at]
        )


class TiledInt4Products(Int4Products):
    sums: list[bool]

    def __init__(self, layers: Sequence[TiledInt4Linear]) -> None:
        super().__init__(layers)
        self.sums = [layer.sums for layer in layers]

    def forward(self, inputs: Tensor, at: int) -> Tensor:
        return tiled_product(
            inputs,
            self.packed[at],
            self.sizes[at],
            self.scales[at],
            self.orders[at],
            self.biases[at],
            self.sums[at],
        )


PRODUCTS_OF: dict[type[Module], Callable[..., Module]] = {
    Linear: PlainProducts,
    WidenedLinear: WidenedProducts,
    OneDnnLinear: OneDnnProducts,
    FbgemmLinear: FbgemmProducts,
    Int4Linear: Int4Products,
    TiledInt4Linear: TiledInt4Products,
}


def products(layers: Sequence[Module]) -> Module:
    """Return the products of the same linear layer of each of a model's layers."""
    kinds = {type(layer) for layer in layers}
    made = PRODUCTS_OF.get(kinds.pop()) if len(kinds) == 1 else None
    has_hooks = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    is_plain_again = any(isinstance(layer, PackedLinear) and layer.plain is not None for layer in layers)
    if made is None or has_hooks or is_plain_again:
        return Other([operation(layer) for layer in layers])
    return made(layers)


def operation(module: Module) -> Callable[[Tensor], Tensor]:
    """Leave out what calling a module does around its forward pass, where it has nothing to do there."""
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
    found: Callable[[Tensor], Tensor] = module if has_hooks else module.forward
    return found


def rms_norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm, in as few operations as it takes."""
    wide = values.float()
    found = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return found.to(values.dtype).mul_(weight)


class RmsNorms(Module):
    weights: list[Tensor]
    epsilons: list[float]

    def __init__(self, weights: Sequence[Tensor], epsilons: Sequence[float]) -> None:
        super().__init__()
        self.weights, self.epsilons = list(weights), list(epsilons)

    def forward(self, values: Tensor, at: int) -> Tensor:
        return rms_norm(values, self.weights[at], self.epsilons[at])


def norms(layers: Sequence[Module]) -> Module:
    """Return root mean square norms where these are that, to the bit."""
    found = [_rms_norm(layer) for layer in layers]
    sound = [each for each in found if each is not None]
    if len(sound) < len(layers):
        return Other([operation(layer) for layer in layers])
    return RmsNorms([weight for weight, _ in sound], [epsilon for _, epsilon in sound])


def _rms_norm(module: Any) -> tuple[Tensor, float] | None:
    size = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if size is None or not hasattr(module, "weight"):
        return None
    weight, epsilon = module.weight.detach(), float(size)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, len(weight), generator=generator).to(weight.device, weight.dtype)
    with torch.inference_mode():
        is_that = torch.equal(rms_norm(sample, weight, epsilon), module(sample))
    return (weight, epsilon) if is_that else None


class Projection(Module):
    """Gives queries and keys, [tokens, heads of both, head size], and values [tokens, heads x head size]."""

    def __init__(
        self,
        query: Module,
        key: Module,
        value: Module,
        query_norm: Module | None,
        key_norm: Module | None,
        size: int,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.size = query, key, value, size
        self.query_norm, self.key_norm = query_norm, key_norm

    def forward(self, inputs: Tensor, at: int) -> tuple[Tensor, Tensor]:
        tokens = inputs.shape[0]
        queries = self.query.forward(inputs, at).view(tokens, -1, self.size)
        keys = self.key.forward(inputs, at).view(tokens, -1, self.size)
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm.forward(queries, at), self.key_norm.forward(keys, at)
        return torch.cat((queries, keys), dim=1), self.value.forward(inputs, at)


class JointProjection(Module):
    """Does the same by one product; `sizes` are the numbers of queries and of keys."""

    def __init__(
        self,
        whole: Module,
        query_norm: Module | None,
        key_norm: Module | None,
        sizes: tuple[int, int],
        size: int,
    ) -> None:
        super().__init__()
        self.whole, self.size = whole, size
        self.queries, self.both = sizes[0], sum(sizes)
        self.query_norm, self.key_norm = query_norm, key_norm

    def forward(self, inputs: Tensor, at: int) -> tuple[Tensor, Tensor]:
        tokens = inputs.shape[0]
        found = self.whole.forward(inputs, at)
        both, values = found[:, : self.both], found[:, self.both :]
        if self.query_norm is not None and self.key_norm is not None:
            queries = both[:, : self.queries].view(tokens, -1, self.size)
            keys = both[:, self.queries :].view(tokens, -1, self.size)
            heads = (self.query_norm.forward(queries, at), self.key_norm.forward(keys, at))
            return torch.cat(heads, dim=1), values
        return both.view(tokens, -1, self.size), values


class GatedMlp(Module):
    def __init__(self, gate: Module, up: Module, down: Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, values: Tensor, at: int) -> Tensor:
        gates, ups = self.gate.forward(values, at), self.up.forward(values, at)
        found: Tensor = self.down.forward(silu(gates).mul_(ups), at)
        return found


class JointGatedMlp(Module):
    """Does the same with gate and up as one product."""

    def __init__(self, whole: Module, down: Module) -> None:
        super().__init__()
        self.whole, self.down = whole, down

    def forward(self, values: Tensor, at: int) -> Tensor:
        both = self.whole.forward(values, at).chunk(2, dim=-1)
        found: Tensor = self.down.forward(silu(both[0]).mul_(both[1]), at)
        return found


class Rotary(Module):
    """Cosines and sines of positions [tokens], each [tokens, 1, head size], where their frequencies do not
    depend on what runs. The sign that turning takes is in the sines: so it is one roll and two products."""

    def __init__(self, frequencies: Tensor, scaling: float) -> None:
        super().__init__()
        self.frequencies, self.scaling = frequencies, scaling

    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions.float().unsqueeze(1) * self.frequencies).unsqueeze(1)
        cosine = (angles.cos() * self.scaling).to(hidden.dtype)
        sine = (angles.sin() * self.scaling).to(hidden.dtype)
        return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


class OtherRotary(Other):
    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        cosine, sine = self.operations[0](hidden.unsqueeze(1), positions.unsqueeze(1))  # type: ignore[call-arg]
        first, second = sine.chunk(2, dim=-1)
        return cosine, torch.cat((-first, second), dim=-1)


def rotary(module: Any, dtype: torch.dtype) -> Module:
    """Return what turns queries and keys of this type as a model's own module does, to the bit."""
    frequencies, scaling = getattr(module, "inv_freq", None), getattr(module, "attention_scaling", None)
    if not isinstance(frequencies, Tensor) or getattr(module, "rope_type", None) not in STATIC_ROPE:
        return OtherRotary([module])
    found = Rotary(frequencies.detach().float(), float(1.0 if scaling is None else scaling))
    hidden = torch.zeros((len(SAMPLED), 1), dtype=dtype, device=frequencies.device)
    positions = torch.tensor(SAMPLED, device=frequencies.device)
    with torch.inference_mode():
        pairs = zip(found(hidden, positions), OtherRotary([module])(hidden, positions), strict=True)
        is_that = all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)
    return found if is_that else OtherRotary([module])


class Window(NamedTuple):
    """Neighbouring rows of an arena, `first` and behind the last, and the columns that they attend to."""

    first: int
    last: int
    begin: int
    end: int
    mask: Tensor  # of products what is added to scores; else True where a token is attended to
    has_products: bool
    is_native: bool = False  # for `NativeAttention`, of one token each: the mask is [rows, columns]


class Block(NamedTuple):
    """Neighbouring rows of an arena, `first` and behind the last, of which each adds `width` tokens before
    the column `end`; `asked`: after how many of these, the last ones, logits are wanted."""

    first: int
    last: int
    width: int
    end: int
    windows: list[Window]
    asked: int


class Heads(NamedTuple):
    """`shared`: how many of keys and values."""

    heads: int
    shared: int
    size: int
    scale: float


def attend(query: Tensor, keys: Tensor, values: Tensor, window: Window, width: int, its: Heads) -> Tensor:
    """Attend with the queries [tokens, heads, size] of a window's rows, `width` of each, to keys and values
    [rows, shared, columns, size]. Returns [tokens, heads x size]."""
    rows, shared, size = keys.shape[0], its.shared, its.size
    group, columns = its.heads // shared, keys.shape[2]
    if window.has_products:
        query = query * its.scale
    # The queries of all tokens of a row stand together as those of their one head of keys: nothing is
    # repeated.
    if width == 1:
        query = query.view(rows, shared, group, size)
    else:
        query = query.view(rows, width, shared, group, size).permute(0, 2, 3, 1, 4)
        query = query.reshape(rows, shared, group * width, size)
    if window.has_products:
        # Products take whole memory. Left to themselves they copy it, ten times slower.
        keys = keys.contiguous().view(rows * shared, columns, size)
        values = values.contiguous().view(rows * shared, columns, size)
        scores = torch.bmm(query.view(rows * shared, group * width, size), keys.transpose(1, 2))
        scores = scores.view(rows, shared, group, width, columns).add_(window.mask)
        shares = torch.softmax(scores, dim=-1).view(rows * shared, group * width, columns)
        found = torch.bmm(shares, values)
    else:
        found = scaled_dot_product_attention(query, keys, values, attn_mask=window.mask, scale=its.scale)
    if width > 1:
        found = found.view(rows, shared, group, width, size).permute(0, 3, 1, 2, 4)
    return found.reshape(rows * width, its.heads * size)


class Attention(Module):
    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, window: Window, width: int, its: Heads
    ) -> Tensor:
        return attend(query, keys, values, window, width, its)


class Layers(NamedTuple):
    """The parts of all layers, in the order in which a layer has them."""

    depth: int
    before: Module
    project: Module
    output: Module
    between: Module
    mlp: Module


class Body(Module):
    """All of a model, on an arena's keys and values. To be compiled (`compiled`)."""

    def __init__(
        self, table: Tensor, turning: Module, attention: Module, layers: Layers, norm: Module, head: Module
    ) -> None:
        """`table` are the embeddings [vocabulary, size]."""
        super().__init__()
        self.table, self.turning, self.attention = table, turning, attention
        self.depth, self.before, self.project, self.output, self.between, self.mlp = layers
        self.norm, self.head = norm, head

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        blocks: list[Block],
        its: Heads,
    ) -> Tensor:
        """Return the logits [tokens asked for, vocabulary] of blocks, one after the other, whose `tokens` are
        at `positions` (both [all tokens]). Writes their keys and values."""
        shared, size = its.shared, its.size
        hidden = embedding(tokens, self.table)
        cosine, sine = self.turning(hidden, positions)
        for at in range(self.depth):
            both, value = self.project(self.before(hidden, at), at)
            both = turned(both, cosine, sine)
            query, key = both[:, : its.heads], both[:, its.heads :]
            held_keys, held_values = keys[at], values[at]
            found: list[Tensor] = []
            begin = 0
            for block in blocks:
                first, last, width, end = block.first, block.last, block.width, block.end
                rows = last - first
                stop = begin + rows * width
                of_keys = key[begin:stop].view(rows, width, shared, size).transpose(1, 2)
                of_values = value[begin:stop].view(rows, width, shared, size).transpose(1, 2)
                held_keys[first:last, :, end - width : end] = of_keys
                held_values[first:last, :, end - width : end] = of_values
                for window in block.windows:
                    found.append(
                        self.attention(
                            query[
                                begin + (window.first - first) * width : begin + (window.last - first) * width
                            ],
                            held_keys[window.first : window.last, :, window.begin : window.end],
                            held_values[window.first : window.last, :, window.begin : window.end],
                            window,
                            width,
                            its,
                        )
                    )
                begin = stop
            attended = found[0] if len(found) == 1 else torch.cat(found)
            hidden = hidden + self.output(attended, at)
            hidden = hidden + self.mlp(self.between(hidden, at), at)
        logits: Tensor = self.head(self.norm(asked_for(hidden, blocks), 0), 0)
        return logits


def asked_for(hidden: Tensor, blocks: list[Block]) -> Tensor:
    """Return the rows of `hidden` [all tokens, size] of which blocks want logits."""
    if len(blocks) == 1 and blocks[0].asked == blocks[0].width:
        return hidden
    found: list[Tensor] = []
    begin = 0
    for block in blocks:
        stop = begin + (block.last - block.first) * block.width
        own = hidden[begin:stop].view(block.last - block.first, block.width, -1)
        found.append(own[:, block.width - block.asked :].flatten(0, 1))
        begin = stop
    return torch.cat(found)


def turned(both: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn queries and keys [tokens, heads, size] by their positions; `sine` has the sign in it."""
    return (both * cosine + both.roll(both.shape[-1] // 2, -1) * sine).to(both.dtype)


def compiled(body: Body) -> Module | None:
    """Return the same as one call, or None where something in it is only Python's."""
    if others := [name for name, module in body.named_modules() if isinstance(module, Other)]:
        log.info("decoding steps are not compiled: %s differ between layers, or are Python's", others)
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found: Module = torch.jit.script(body.eval())
    except Exception as error:  # it is deprecated, so it may go: all runs without it, slower
        log.warning("decoding steps are not compiled: %s", error)
        return None
    return found
