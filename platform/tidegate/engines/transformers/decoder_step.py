"""One decoding step of a plain decoder, without the Python that a model's own forward pass goes through.

Most families are the same decoder in another file: a norm, attention with rotary positions, a norm, a gated
MLP, each added to what came in. For one token a row that forward pass spends more on its own calls than on
its products. `DecoderStep` does the same operations on the model's own modules, in the same order and
precision, and leaves out what a step does not need.

It is never chosen by a family's name. `read_decoder` looks at what modules a model has; a model that has
others, or the same with a factor, a cap or a window of its own beside them, is found out by the self-check,
which compares logits with the model's own, and runs through its own forward pass. So do long prefills; short
ones, and short parts of long ones, take the step where it is compiled: for those too that forward pass is
mostly calls, and copies of keys and values for each head.

On a CPU that multiplies bfloat16, attention has a form of its own. PyTorch's flash kernel there prepares a
product for each row and head, which takes longer than the products themselves; two batched ones take half of
its time or less, also where the window has to be copied for them (ADR 0025 has the figures).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import embedding, pad

from tidegate.engines.transformers.attention import NativeAttention, is_native
from tidegate.engines.transformers.decoder_parts import (
    Attention,
    Block,
    Body,
    GatedMlp,
    Heads,
    JointGatedMlp,
    JointProjection,
    Layers,
    Other,
    Projection,
    Window,
    compiled,
    norms,
    operation,
    products,
    rotary,
    turned,
)
from tidegate.engines.transformers.kv import Arena
from tidegate.engines.transformers.packed import has_product, joint
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
# Tokens of prompts that the step prefills at once, and what attention may have of scores meanwhile, one for
# each head, token and column: the model's own forward pass keeps none.
MOST_OF_A_STEP, MOST_SCORES = 512, 1 << 24
SILU = ("SiLU", "SiLUActivation")
# What forward passes call that changes nothing until numbers are large or positions are far: the self-check's
# prompts need not get there.
BEYOND_A_CHECK = {"clamp", "clamp_", "clip", "clip_", "minimum", "maximum", "get_llama_4_attn_scale"}

Operation = Callable[[Tensor], Tensor]


class DecoderStep:
    """Adds one token or a few to each row of an arena. Made by `read_decoder`."""

    def __init__(self, model: Any) -> None:
        body = model.model
        first = body.layers[0].self_attn
        self._embedding: Tensor = body.embed_tokens.weight
        self._head_size: int = first.head_dim
        self._heads = first.q_proj.out_features // self._head_size
        self._shared = first.k_proj.out_features // self._head_size  # heads of keys and values
        self._scale: float = first.scaling
        is_bfloat = self._embedding.dtype == torch.bfloat16
        self._is_on_cpu = self._embedding.device.type == "cpu"
        self._has_products = is_bfloat and self._is_on_cpu and has_product(torch.bfloat16)
        norm, head = norms([body.norm]), products([model.lm_head])
        turning = rotary(body.rotary_emb, self._embedding.dtype)
        self._is_native = is_native(self._embedding.dtype, self._embedding.device, self._head_size)
        attention = NativeAttention() if self._is_native else Attention()
        layers = _layers(body.layers)
        self._body = Body(self._embedding.detach(), turning, attention, layers, norm, head)

    def __call__(
        self, tokens: Tensor, positions: Tensor, seen: Tensor, arena: Arena | PagedPool, last: int = 1
    ) -> Tensor:
        """Return logits [rows, last, vocabulary] after the `last` of `tokens` [rows, width] at `positions`
        [rows, width]. `arena` has opened columns for them; `seen` [rows, width, window] are those that each
        token attends to."""
        rows, width = tokens.shape
        tokens, positions = tokens.flatten(), positions.flatten()
        if isinstance(arena, Arena) and self.compiled is not None:
            found = self.compute(tokens, positions, arena, [self.running(seen, arena, last)])
        else:
            windows = [] if self.has_kernel(arena) else self._windows(seen, arena)
            found = self._one_by_one(tokens, positions, arena, windows, width, last)
        return found.view(rows, last, -1)

    def prefill(self, tokens: Tensor, positions: Tensor, seen: Tensor, arena: Arena) -> Tensor:
        """Return logits [rows, 1, vocabulary] after `tokens` [rows, width] at `positions` of rows that do not
        run yet; `seen` as in `joining`."""
        blocks = [self.joining(seen, arena)]
        return self.compute(tokens.flatten(), positions.flatten(), arena, blocks).unsqueeze(1)

    def running(self, seen: Tensor, arena: Arena, asked: int = 1) -> Block:
        """Return the rows that run, for which `arena` has opened columns; `seen` as in a call. Logits are
        asked for after the last `asked` tokens of each."""
        windows = self._windows(seen, arena)
        return Block(0, len(seen), seen.shape[1], arena.end, windows, asked)

    def joining(self, seen: Tensor, arena: Arena, asked: int = 1) -> Block:
        """Return rows that do not run yet, for which `arena` has opened columns; `seen` [rows, width,
        columns] are those of its `seen` that each token attends to, and each to one at least."""
        first, columns = arena.first_row, arena.seen
        window = self._window(first, first + len(seen), columns.start, seen, arena)
        return Block(first, first + len(seen), seen.shape[1], columns.stop, [window], asked)

    def prefills(self, tokens: int, columns: int, arena: Arena) -> bool:
        """Tell whether so many tokens of rows that are `joining`, which attend to `columns`, are computed
        sooner than by the model's own forward pass."""
        has_room = tokens <= MOST_OF_A_STEP and self._heads * tokens * columns <= MOST_SCORES
        return has_room and self.compiled is not None and all(held.is_initialized for held in arena.layers)

    def compute(self, tokens: Tensor, positions: Tensor, arena: Arena, blocks: list[Block]) -> Tensor:
        """Return the logits [tokens asked for, vocabulary] of blocks by one pass; their `tokens` and
        `positions` stand one after the other (both [all tokens])."""
        assert self.compiled is not None
        keys = [held.keys for held in arena.layers]
        values = [held.values for held in arena.layers]
        its = Heads(self._heads, self._shared, self._head_size, self._scale)
        found: Tensor = self.compiled(tokens, positions, keys, values, blocks, its)
        return found

    @cached_property
    def compiled(self) -> Module | None:
        """The step as one call, on a CPU: on a GPU a graph does more."""
        return compiled(self._body) if self._is_on_cpu else None

    def _one_by_one(
        self,
        tokens: Tensor,
        positions: Tensor,
        arena: Arena | PagedPool,
        windows: Sequence[Window],
        width: int,
        last: int,
    ) -> Tensor:
        """Do what `Body` does, of any parts and on a pool too, with rows that run."""
        shared, size = self._shared, self._head_size
        rows, body = len(tokens) // width, self._body
        hidden = embedding(tokens, self._embedding)
        cosine, sine = body.turning.forward(hidden, positions)
        pool = arena if self.has_kernel(arena) else None
        for at, held in enumerate(arena.layers):
            both, value = body.project.forward(body.before.forward(hidden, at), at)
            query, key = torch.split(turned(both, cosine, sine), [self._heads, shared], dim=1)
            held.write(key.view(rows, width, shared, size), value.view(rows, width, shared, size))
            if pool is not None:
                attended = pool.attend(query.contiguous(), held.keys, held.values, self._scale).flatten(1)
            else:
                attended = self._attended(query, held, arena, windows, width)
            hidden = hidden + body.output.forward(attended, at)
            hidden = hidden + body.mlp.forward(body.between.forward(hidden, at), at)
        if last < width:
            hidden = hidden.view(rows, width, -1)[:, -last:].reshape(rows * last, -1)
        logits: Tensor = body.head.forward(body.norm.forward(hidden, 0), 0)
        return logits

    def has_kernel(self, arena: Arena | PagedPool) -> TypeGuard[PagedPool]:
        """Tell whether it attends by the table of pages, whatever the window."""
        return isinstance(arena, PagedPool) and arena.has_kernel(self._embedding)

    def _attended(
        self, query: Tensor, held: Any, arena: Arena | PagedPool, windows: Sequence[Window], width: int
    ) -> Tensor:
        its = Heads(self._heads, self._shared, self._head_size, self._scale)
        found = []
        for window in windows:
            rows, columns = slice(window.first, window.last), slice(window.begin, window.end)
            keys, values = (arena.window(each, rows, columns) for each in (held.keys, held.values))
            asking = query[window.first * width : window.last * width]
            found.append(self._body.attention.forward(asking, keys, values, window, width, its))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _windows(self, seen: Tensor, arena: Arena | PagedPool) -> list[Window]:
        """Return which rows attend together. One long row does not make the others' windows as wide as its
        own."""
        runs = [(0, len(seen), arena.start)]
        if self._is_on_cpu:  # elsewhere it is calls that cost
            runs = arena.windows(MOST_UNUSED)
        return [
            self._window(first, last, start, seen[first:last, :, start - arena.start :], arena)
            for first, last, start in runs
        ]

    def _window(self, first: int, last: int, start: int, seen: Tensor, arena: Arena | PagedPool) -> Window:
        """Return the window of rows `first` to `last`, to columns from `start` on, of which each token sees
        `seen`."""
        rows, width, columns = seen.shape
        if self._is_native and width == 1:
            return Window(first, last, start, start + columns, seen[:, 0], False, is_native=True)
        if self._has_products and rows * self._heads * columns * self._head_size >= FEWEST_PRODUCTS:
            begin, end = arena.extent(start, start + columns)
            seen = pad(seen, (start - begin, end - start - columns))
            bias = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)
            return Window(first, last, begin, end, bias[:, None, None], has_products=True)
        mask = seen if width == 1 else seen.repeat(1, self._heads // self._shared, 1)
        return Window(first, last, start, start + columns, mask.unsqueeze(1), has_products=False)


def read_decoder(model: Any) -> DecoderStep | None:
    """Return the step of a model that has the modules of a plain decoder, or None."""
    body = getattr(model, "model", None)
    parts = ("layers", "embed_tokens", "norm", "rotary_emb")
    if body is None or not all(hasattr(body, part) for part in parts) or not hasattr(model, "lm_head"):
        return None
    if not len(body.layers) or not all(_is_plain(layer) for layer in body.layers):
        return None
    attentions = [layer.self_attn for layer in body.layers]
    sizes = {(each.head_dim, each.scaling, each.k_proj.out_features) for each in attentions}
    if len(sizes) > 1 or len({frozenset(_children(each)) for each in attentions}) > 1:
        return None
    turning = getattr(body.rotary_emb, "inv_freq", None)  # one for each pair of a head's numbers that turn
    if not isinstance(turning, Tensor) or 2 * len(turning) != attentions[0].head_dim:
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
    has_norms = len(_children(attention) & {*NORMS})
    has_both = has_norms in (0, len(NORMS))
    has_sizes = all(hasattr(attention, name) for name in ("head_dim", "scaling"))
    if found != ATTENTION or not has_both or not has_sizes or _has_more(layer) or _has_more(attention):
        return False
    # A norm of all heads' numbers together is another one.
    return all(len(getattr(attention, name).weight) == attention.head_dim for name in NORMS if has_norms)


def _has_more(module: Any) -> bool:
    """Tell whether its forward pass has a cap, or a factor of far positions, which no check may meet."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = set(code.co_names) if code is not None else set()
    if "clip_qkv" in names and getattr(module.config, "clip_qkv", None) is None:  # OLMo's, turned off
        names -= BEYOND_A_CHECK
    return bool(names & BEYOND_A_CHECK)


def _children(module: Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _layers(layers: Sequence[Any]) -> Layers:
    attentions = [layer.self_attn for layer in layers]
    return Layers(
        len(layers),
        norms([layer.input_layernorm for layer in layers]),
        _projection(attentions),
        products([attention.o_proj for attention in attentions]),
        norms([layer.post_attention_layernorm for layer in layers]),
        _mlp([layer.mlp for layer in layers]),
    )


def _projection(attentions: Sequence[Any]) -> Module:
    size = attentions[0].head_dim
    parts = [[getattr(attention, name) for attention in attentions] for name in PROJECTIONS]
    query_norm, key_norm = (
        norms([getattr(attention, name) for attention in attentions])
        if hasattr(attentions[0], name)
        else None
        for name in NORMS
    )
    if (whole := _joint(*parts)) is not None:
        sizes = (parts[0][0].out_features, parts[1][0].out_features)
        return JointProjection(whole, query_norm, key_norm, sizes, size)
    query, key, value = map(products, parts)
    return Projection(query, key, value, query_norm, key_norm, size)


def _joint(*parts: Sequence[Module]) -> Module | None:
    """Return the products of all these at once, where every layer has them packed together."""
    wholes = [joint(*layer) for layer in zip(*parts, strict=True)]
    sound = [whole for whole in wholes if whole is not None]
    return products(sound) if len(sound) == len(wholes) else None


def _mlp(modules: Sequence[Any]) -> Module:
    if any(
        _children(module) != MLP or type(module.act_fn).__name__ not in SILU or _has_more(module)
        for module in modules
    ):
        return Other([_alone(operation(module)) for module in modules])
    gates, ups, downs = ([getattr(module, name) for module in modules] for name in (*GATES, "down_proj"))
    if (whole := _joint(gates, ups)) is not None:
        return JointGatedMlp(whole, products(downs))
    return GatedMlp(products(gates), products(ups), products(downs))


def _alone(inner: Operation) -> Operation:
    """Give a module its tokens as rows of one: it may want [rows, columns, size], as experts do."""

    def mlp(values: Tensor) -> Tensor:
        return inner(values.unsqueeze(1)).squeeze(1)

    return mlp
