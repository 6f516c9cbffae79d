"""One decoding step of a plain decoder, without the Python that a model's own forward pass goes through.

Most families are the same decoder in another file: a norm, attention with rotary positions, a norm, a gated
MLP, each added to what came in. For one token a row that forward pass spends more on its own calls than on
its products. `DecoderStep` does the same operations on the model's own modules, in the same order and
precision, and leaves out what a step does not need.

It is never chosen by a family's name. `read_decoder` looks at what modules a model has; a model that has
others, or the same with a factor, a cap or a window of its own beside them, is found out by the self-check,
which compares logits with the model's own, and runs through its own forward pass. So does every prefill.

Attention on CPU in bfloat16 has a form of its own. PyTorch's flash kernel there prepares a product for each
row and head, which takes longer than the products themselves; two batched ones take half of its time or less,
also where the window has to be copied for them (ADR 0025 has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import embedding, pad, scaled_dot_product_attention, silu

from tidegate.engines.transformers.kv import Arena
from tidegate.engines.transformers.packed import joint
from tidegate.engines.transformers.paged import PagedPool

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ATTENTION = {*PROJECTIONS, "o_proj"}
NORMS = ("q_norm", "k_norm")
GATES = ("gate_proj", "up_proj")
MLP = {*GATES, "down_proj", "act_fn"}
# Multiplications of attention from which on batched products are faster than the flash kernel.
FEWEST_PRODUCTS = 1 << 18
MOST_UNUSED = 1024  # columns of padding that cost less to read than another call to attention

Operation = Callable[[Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# Gives queries and keys, [tokens, heads of both, head size], and values [tokens, heads x head size].
Projection = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Layer:
    before: Operation
    project: Projection
    output: Operation
    between: Operation
    mlp: Operation


class DecoderStep:
    """Adds one token or a few to each row of an arena. Made by `read_decoder`."""

    def __init__(self, model: Any) -> None:
        body = model.model
        first = body.layers[0].self_attn
        self._embedding: Tensor = body.embed_tokens.weight
        self._rotary = body.rotary_emb
        self._head_size: int = first.head_dim
        self._heads = first.q_proj.out_features // self._head_size
        self._shared = first.k_proj.out_features // self._head_size  # heads of keys and values
        self._scale: float = first.scaling
        self._layers = [_layer(layer) for layer in body.layers]
        self._norm = _norm(body.norm)
        self._head = _operation(model.lm_head)
        self._has_products = self._embedding.dtype == torch.bfloat16 and self._embedding.device.type == "cpu"

    def __call__(
        self, tokens: Tensor, positions: Tensor, seen: Tensor, arena: Arena | PagedPool, last: int = 1
    ) -> Tensor:
        """Return logits [rows, last, vocabulary] after the `last` of `tokens` [rows, width] at `positions`
        [rows, width]. `arena` has opened columns for them; `seen` [rows, width, window] are those that each
        token attends to."""
        (rows, width), heads, shared, size = tokens.shape, self._heads, self._shared, self._head_size
        each = rows * width
        hidden = embedding(tokens.view(each), self._embedding)
        cosine, sine = self._rotary(hidden.unsqueeze(1), positions.reshape(each, 1))
        half = size // 2
        # With the sign in it, turning is one roll and two products.
        sine = torch.cat((-sine[..., :half], sine[..., half:]), dim=-1)
        attend = self._attention(seen, arena)
        for layer, held in zip(self._layers, arena.layers, strict=True):
            both, value = layer.project(layer.before(hidden))
            both = both * cosine + both.roll(half, -1) * sine
            query, key = both.split((heads, shared), dim=1)
            held.write(key.view(rows, width, shared, size), value.view(rows, width, shared, size))
            hidden = hidden + layer.output(attend(query, held.keys, held.values))
            hidden = hidden + layer.mlp(layer.between(hidden))
        if last < width:
            hidden = hidden.view(rows, width, -1)[:, -last:].reshape(rows * last, -1)
        return self._head(self._norm(hidden)).view(rows, last, -1)

    def has_kernel(self, arena: Arena | PagedPool) -> TypeGuard[PagedPool]:
        """Tell whether it attends by the table of pages, whatever the window."""
        return isinstance(arena, PagedPool) and arena.has_kernel(self._embedding)

    def _attention(self, seen: Tensor, arena: Arena | PagedPool) -> Attention:
        """Return what attends: queries [rows x width, heads, head size] to keys and values of the arena,
        giving [rows x width, heads x head size]. One long row does not make the others' windows as wide as
        its own."""
        if self.has_kernel(arena):
            return lambda query, keys, values: arena.attend(
                query.contiguous(), keys, values, self._scale
            ).flatten(1)
        runs = [(0, len(seen), arena.start)]
        if seen.device.type == "cpu":  # elsewhere it is calls that cost
            runs = arena.windows(MOST_UNUSED)
        attend = [
            self._attend(first, last, start, seen[first:last, :, start - arena.start :], arena)
            for first, last, start in runs
        ]
        if len(attend) == 1:
            return attend[0]
        return lambda query, keys, values: torch.cat([one(query, keys, values) for one in attend])

    def _attend(self, first: int, last: int, start: int, seen: Tensor, arena: Arena | PagedPool) -> Attention:
        """Return what attends for rows `first` to `last`, to columns from `start` on, of which each token
        sees `seen`."""
        heads, shared, size, scale = self._heads, self._shared, self._head_size, self._scale
        group, (rows, width, window) = heads // shared, seen.shape
        queries = slice(first * width, last * width)
        within = group * width  # queries of a head of keys

        def by_head(query: Tensor) -> Tensor:
            """Put the queries of all tokens of a row together, [rows, shared, group x width, head size]."""
            if width == 1:
                return query.view(rows, shared, group, size)
            query = query.view(rows, width, shared, group, size).permute(0, 2, 3, 1, 4)
            return query.reshape(rows, shared, within, size)

        def by_token(found: Tensor) -> Tensor:
            if width > 1:
                found = found.view(rows, shared, group, width, size).permute(0, 3, 1, 2, 4)
            return found.reshape(rows * width, heads * size)

        if self._has_products and rows * heads * window * size >= FEWEST_PRODUCTS:
            begin, end = arena.extent(start)
            wide = end - begin
            seen = pad(seen, (start - begin, end - start - window))
            bias = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)
            bias = bias[:, None, None]

            def in_one_piece(held: Tensor) -> Tensor:
                # Batched products take whole memory. Left to themselves they copy it, ten times slower.
                held = arena.window(held, slice(first, last), slice(begin, end))
                return held.contiguous().view(rows * shared, wide, size)

            def batched(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                query = by_head(query[queries] * scale).view(rows * shared, within, size)
                scores = torch.bmm(query, in_one_piece(keys).transpose(1, 2))
                shares = torch.softmax(scores.view(rows, shared, group, width, wide).add_(bias), dim=-1)
                return by_token(torch.bmm(shares.view(rows * shared, within, wide), in_one_piece(values)))

            return batched
        mask = (seen if width == 1 else seen.repeat(1, group, 1)).unsqueeze(1)

        def flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            # The query heads of a group stand as queries of their one head of keys: nothing is repeated.
            found = scaled_dot_product_attention(
                by_head(query[queries]),
                arena.window(keys, slice(first, last), slice(start, arena.end)),
                arena.window(values, slice(first, last), slice(start, arena.end)),
                attn_mask=mask,
                scale=scale,
            )
            return by_token(found)

        return flash


def read_decoder(model: Any) -> DecoderStep | None:
    """Return the step of a model that has the modules of a plain decoder, or None."""
    body = getattr(model, "model", None)
    parts = ("layers", "embed_tokens", "norm", "rotary_emb")
    if body is None or not all(hasattr(body, part) for part in parts) or not hasattr(model, "lm_head"):
        return None
    if not len(body.layers) or not all(_is_plain(layer) for layer in body.layers):
        return None
    attentions = [layer.self_attn for layer in body.layers]
    if len({(each.head_dim, each.scaling, each.k_proj.out_features) for each in attentions}) > 1:
        return None
    rotary = getattr(body.rotary_emb, "inv_freq", None)  # one for each pair of a head's numbers that turn
    if not isinstance(rotary, Tensor) or 2 * len(rotary) != attentions[0].head_dim:
        return None
    return DecoderStep(model)


def of_same_inputs(model: Any) -> Iterator[list[Module]]:
    """Return the layers of a plain decoder that it calls with the same inputs."""
    for layer in getattr(getattr(model, "model", None), "layers", ()):
        if _is_plain(layer):
            yield [getattr(layer.self_attn, name) for name in PROJECTIONS]
            if _children(layer.mlp) == MLP:
                yield [getattr(layer.mlp, name) for name in GATES]


def _is_plain(layer: Module) -> bool:
    if _children(layer) != LAYER:
        return False
    attention: Any = layer.self_attn
    found = _children(attention) - {*NORMS}
    has_both = len(_children(attention) & {*NORMS}) in (0, len(NORMS))
    has_sizes = all(hasattr(attention, name) for name in ("head_dim", "scaling"))
    return found == ATTENTION and has_both and has_sizes


def _children(module: Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _layer(layer: Any) -> Layer:
    attention = layer.self_attn
    return Layer(
        _norm(layer.input_layernorm),
        _projection(attention),
        _operation(attention.o_proj),
        _norm(layer.post_attention_layernorm),
        _mlp(layer.mlp),
    )


def _projection(attention: Any) -> Projection:
    size = attention.head_dim
    parts = [getattr(attention, name) for name in PROJECTIONS]
    query, key, value = (_operation(part) for part in parts)
    query_norm, key_norm = (
        _norm(getattr(attention, name)) if hasattr(attention, name) else None for name in NORMS
    )
    sizes = [parts[0].out_features + parts[1].out_features, parts[2].out_features]
    if (whole := joint(*parts)) is not None and query_norm is None:
        project = whole.forward

        def at_once(inputs: Tensor) -> tuple[Tensor, Tensor]:
            both, values = torch.split(project(inputs), sizes, dim=1)
            return both.view(len(inputs), -1, size), values

        return at_once

    def one_by_one(inputs: Tensor) -> tuple[Tensor, Tensor]:
        queries = query(inputs).view(len(inputs), -1, size)
        keys = key(inputs).view(len(inputs), -1, size)
        if query_norm is not None and key_norm is not None:
            queries, keys = query_norm(queries), key_norm(keys)
        return torch.cat((queries, keys), dim=1), value(inputs)

    return one_by_one


def _operation(module: Any) -> Operation:
    """Leave out what calling a module does around its forward pass, where it has nothing to do there."""
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
    found: Operation = module if has_hooks else module.forward
    return found


def _norm(module: Any) -> Operation:
    """Return a root mean square norm in as few operations as it takes, and any other as it is."""
    size = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if size is None or not hasattr(module, "weight"):
        return _operation(module)
    weight, epsilon = module.weight.detach(), float(size)

    def norm(values: Tensor) -> Tensor:
        wide = values.float()
        found: Tensor = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return found.to(values.dtype).mul_(weight)

    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, len(weight), generator=generator).to(weight.device, weight.dtype)
    with torch.inference_mode():
        return norm if torch.equal(norm(sample), module(sample)) else _operation(module)


def _mlp(module: Any) -> Operation:
    if _children(module) != MLP or type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        inner = _operation(module)  # may want [rows, columns, size], as experts do

        def mlp(values: Tensor) -> Tensor:
            return inner(values.unsqueeze(1)).squeeze(1)

        return mlp
    gate, up, down = (_operation(getattr(module, name)) for name in (*GATES, "down_proj"))
    whole = joint(*(getattr(module, name) for name in GATES))
    project = None if whole is None else whole.forward

    def gated(values: Tensor) -> Tensor:
        gates, ups = (gate(values), up(values)) if project is None else project(values).chunk(2, dim=-1)
        return down(silu(gates).mul_(ups))

    return gated
