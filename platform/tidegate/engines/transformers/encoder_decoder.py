"""Runs the rows of encoder-decoders: together, or one by one as in `batch`.

The encoder reads a row's prompt once, when the row joins. What the decoder's layers keep of it, the keys and
values of cross attention, stays for as long as the row runs; beside it the answer grows in an arena as a
decoder's tokens do:

    answers  (arena, padded left)          prompts  (cross cache, padded right)
    row 0    .  .  k0 k1 k2 k3 |           row 0    c0 c1 c2 c3 c4 c5 c6
    row 1    k0 k1 k2 k3 k4 k5 |           row 1    c0 c1 c2 .  .  .  .

An encoder's padding stands right, as positions that are counted begin at 0. The decoder's stands left, where
distances between tokens (T5) are right as they are; positions that are counted (BART) are the same number for
all rows in transformers, so they are put in where the decoder looks them up.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
)
from transformers.modeling_outputs import BaseModelOutput

from tidegate.engines.base import EngineLoadError, is_out_of_memory
from tidegate.engines.transformers.batch import ERRORS, OneAtATime, RowByRow
from tidegate.engines.transformers.head import Head, InParts
from tidegate.engines.transformers.kv import FIRST_ROWS, Arena, LayerKind
from tidegate.engines.transformers.kv_size import KvSize, measure_rows, tensor_bytes
from tidegate.engines.transformers.room import Room

FIRST_COLUMNS = 256  # of prompts


def start_ids(model: Any) -> list[int]:
    """Return what the decoder of `model` starts every answer from. Raises `EngineLoadError`."""
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(found := getattr(config, name, None), int):
                return [found]
    raise EngineLoadError(
        "WeightsWrong",
        "Neither generation_config.json nor config.json names the token that an answer starts from: add "
        "decoder_start_token_id.",
    )


class Encoder:
    """Reads prompts with the encoder of `model`."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self._encoder = model.get_encoder()
        self._device = model.device
        self._pad_id = pad_id

    def __call__(self, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return the states [rows, longest, size] of prompts, and which of them are tokens (1)."""
        longest = max(map(len, sources))
        padded = [[*source, *[self._pad_id] * (longest - len(source))] for source in sources]
        known = [[1] * len(source) + [0] * (longest - len(source)) for source in sources]
        mask = torch.tensor(known, dtype=torch.long, device=self._device)
        ids = torch.tensor(padded, dtype=torch.long, device=self._device)
        with torch.inference_mode():
            states: Tensor = self._encoder(input_ids=ids, attention_mask=mask, return_dict=True)[0]
        return states, mask


class Decoder:
    """Calls `model` with what its encoder has read."""

    def __init__(self, model: Any) -> None:
        self._head = Head(model)
        self.device: torch.device = model.device
        embedding = getattr(model.get_decoder(), "embed_positions", None)
        can_place = isinstance(embedding, Module) and "position_ids" in _parameters(embedding)
        self._counted: Module | None = embedding if can_place else None

    def __call__(
        self,
        ids: Tensor,
        states: Tensor,
        source_mask: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        last: int = 1,
        every: InParts | None = None,
    ) -> Tensor:
        """Return logits [rows, columns, vocabulary] of the `last` columns; see `Head.run` for `every`.
        `positions` [rows, columns] are those of the tokens, where they differ from row to row."""
        inputs = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=states),
            "attention_mask": source_mask,
            "decoder_input_ids": ids,
            "decoder_attention_mask": mask,
            "past_key_values": cache,
            "use_cache": cache is not None,
            "return_dict": True,
        }
        with torch.inference_mode(), self._placed(positions):
            logits: Tensor = self._head.run(inputs, last=last, every=every).logits
        return logits

    @contextmanager
    def _placed(self, positions: Tensor | None) -> Iterator[None]:
        """Let the decoder look up these positions instead of those that it counts."""
        if self._counted is None or positions is None:
            yield
            return

        def ask(_module: Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"position_ids": positions.flatten()}

        def answer(_module: Module, _args: Any, found: Tensor) -> Tensor:
            return found.view(*positions.shape, -1)

        hooks = (
            self._counted.register_forward_pre_hook(ask, with_kwargs=True),
            self._counted.register_forward_hook(answer),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _parameters(module: Module) -> Mapping[str, Any]:
    return inspect.signature(module.forward).parameters


class CrossLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values of prompts, [rows, heads, columns, head size]. Models read `keys` and
    `values` of a layer that was filled, so these are views of the running rows."""

    def __init__(self, cross: CrossCache) -> None:
        super().__init__()
        self._cross = cross
        self._held: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self._cross.rows_held, self._cross.columns_held
        self._held = [
            part.new_zeros((rows, part.shape[1], columns, part.shape[3]))
            for part in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, last = self._cross.joining
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[first:last, :, : new.shape[2]] = new
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - cross attention has its own mask
        return self._cross.width, 0

    def get_seq_length(self) -> int:
        return self._cross.width

    def get_max_length(self) -> int:
        return -1

    def show(self, rows: int, columns: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (held[:rows, :, :columns] for held in self._held)

    def resize(self, rows: int, columns: int) -> None:
        for index, old in enumerate(self._held):
            new = old.new_zeros((rows, old.shape[1], columns, old.shape[3]))
            known = old[:rows, :, :columns]
            new[: known.shape[0], :, : known.shape[2]] = known
            self._held[index] = new

    def move_row(self, source: int, target: int, columns: int) -> None:
        for held in self._held:
            held[target, :, :columns] = held[source, :, :columns]

    def clear_row(self, row: int) -> None:
        for held in self._held:
            held[row] = 0


class CrossCache(Cache):  # type: ignore[misc]
    """What all layers keep of the prompts of a batch; row indices are the arena's."""

    def __init__(
        self, layers: int, max_rows: int, max_length: int, device: torch.device, room: Room | None = None
    ) -> None:
        self._room = room
        self._cross_layers = [CrossLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._cross_layers))
        self._max_rows, self._max_columns = max_rows, max_length
        self.rows_held, self.columns_held = min(FIRST_ROWS, max_rows), min(FIRST_COLUMNS, max_length)
        self._device = device
        self._lengths: list[int] = []  # tokens of each running row's prompt
        self.joining = (0, 0)  # rows that the forward pass in progress fills
        self.mask = torch.zeros((0, 0), dtype=torch.long, device=device)  # [rows, width] of running rows

    @property
    def width(self) -> int:
        return max(self._lengths, default=0)

    def begin_prefill(self, lengths: Sequence[int]) -> None:
        """Make room for the prompts of new rows, which run from `commit_prefill` on."""
        first = len(self._lengths)
        self.joining = (first, first + len(lengths))
        rows, columns = self.rows_held, self.columns_held
        if self.joining[1] > rows:
            rows = min(self._max_rows, max(self.joining[1], 2 * rows))
        if max(lengths) > columns:
            columns = min(self._max_columns, max(*lengths, 2 * columns))
        if self._room is not None and columns > self._room.columns(rows):
            rows, columns = self.joining[1], max(self.width, *lengths)
        if (rows, columns) != (self.rows_held, self.columns_held):
            for layer in self._cross_layers:
                layer.resize(rows, columns)
            self.rows_held, self.columns_held = rows, columns

    def commit_prefill(self, lengths: Sequence[int]) -> None:
        self._lengths += lengths
        self._show()

    def remove(self, row: int, *, clear: bool = False) -> None:
        """Free `row`; the last row takes its index. `clear` wipes it (its values may not be finite)."""
        last = len(self._lengths) - 1
        for layer in self._cross_layers:
            if clear:
                layer.clear_row(row)
            if row != last:
                layer.move_row(last, row, self._lengths[last])
        self._lengths[row] = self._lengths[last]
        self._lengths.pop()
        self._show()

    def _show(self) -> None:
        width = self.width
        columns = torch.arange(width, device=self._device)
        lengths = torch.tensor(self._lengths, dtype=torch.long, device=self._device)
        self.mask = (columns < lengths.unsqueeze(-1)).long()
        for layer in self._cross_layers:
            layer.show(len(self._lengths), width)


class EncoderDecoderBatch(OneAtATime):
    """Runs rows together. Implements `batch.Batch`."""

    def __init__(
        self,
        model: Any,
        *,
        layers: Sequence[LayerKind],
        max_rows: int,
        max_length: int,
        pad_id: int,
        room: Room | None = None,
    ) -> None:
        self._encoder, self._decoder = Encoder(model, pad_id), Decoder(model)
        device = self._decoder.device
        self._arena = Arena(layers, max_rows, max_length, device, room)
        self._cross = CrossCache(len(layers), max_rows, max_length, device, room)
        self._cache = EncoderDecoderCache(self._arena, self._cross)
        self._layers, self._pad_id = len(layers), pad_id
        self._positions: Tensor = torch.zeros(0, dtype=torch.long, device=device)
        self._stand_in: Tensor = torch.zeros(0, device=device)

    @property
    def count(self) -> int:
        return self._arena.count

    def join(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        sources: Sequence[Sequence[int]] = (),
        every: InParts | None = None,
    ) -> Tensor:
        lengths, read = [len(sequence) for sequence in sequences], [len(source) for source in sources]
        longest = max(lengths)
        with torch.inference_mode():
            states, source_mask = self._encoder(sources)
            mask = self._arena.begin_prefill(lengths).long()
            self._cross.begin_prefill(read)
            padded = [[self._pad_id] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
            ids = torch.tensor(padded, dtype=torch.long, device=self._decoder.device)
            positions = (mask.cumsum(-1) - 1).clamp_(min=0)
            self._is_filled(False)
            logits = self._decoder(
                ids, states, source_mask, mask=mask, positions=positions, cache=self._cache, every=every
            )
            self._arena.commit_prefill(lengths)
            self._cross.commit_prefill(read)
            self._positions = torch.cat((self._positions, positions[:, -1] + 1))
            # Of states that are cached models ask no more than the size.
            self._stand_in = states.new_zeros((1, 1, states.shape[-1]))
        return logits[:, -1]

    def decode(self, tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            mask = self._arena.begin_decode().long()
            self._is_filled(True)
            logits = self._decoder(
                tokens.unsqueeze(-1),
                self._stand_in.expand(*self._cross.mask.shape, -1),
                self._cross.mask,
                mask=mask,
                positions=self._positions.unsqueeze(-1),
                cache=self._cache,
            )
            self._positions += 1
        return logits[:, -1]

    def leave(self, row: int, *, clear: bool = False) -> None:
        with torch.inference_mode():
            self._arena.remove(row, clear=clear)
            self._cross.remove(row, clear=clear)
            if row < self._arena.count:
                self._positions[row] = self._positions[-1]
            self._positions = self._positions[:-1]

    def _is_filled(self, value: bool) -> None:
        """Tell the layers whether the prompts of this forward pass are in the cross cache already."""
        self._cache.is_updated = dict.fromkeys(range(self._layers), value)


class EncoderDecoderRows(RowByRow):
    """Runs each row by the hooks of transformers' own `generate`."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._encoder = Encoder(model, pad_id=0)

    def _read(self, source: Sequence[int]) -> dict[str, Any]:
        states, mask = self._encoder([source])
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}


def measure_kv(model: Any) -> KvSize:
    """Measure what a row holds for each token of the context, which is as long for the prompt as for the
    answer. See `kv_size.measure_kv`."""
    tokens = 2
    try:
        own, cross = DynamicCache(), DynamicCache()
        states, mask = Encoder(model, pad_id=0)([[0] * tokens])
        ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
        Decoder(model)(ids, states, mask, cache=EncoderDecoderCache(own, cross))
        layers = [*own.layers, *cross.layers]
        if len(own.layers) == len(cross.layers) and all(
            type(layer) is DynamicLayer and layer.is_initialized for layer in layers
        ):
            size = tensor_bytes([vars(layer) for layer in layers], set()) // tokens
            return KvSize((LayerKind(),) * len(own.layers), size)
    except ERRORS as error:
        if is_out_of_memory(error):
            raise

    def held(length: int) -> int:
        rows = EncoderDecoderRows(model)
        rows.join([[0] * length], sources=[[0] * length])
        return tensor_bytes(rows.rows[0].kwargs, set())

    return measure_rows(held)
