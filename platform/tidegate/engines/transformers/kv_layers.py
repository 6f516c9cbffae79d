"""What an arena (`kv`) and a pool of pages (`paged`) hold of each layer, as transformers' cache layers.

Layers of state-space models and of linear attention hold no columns but one state for each row: what their
convolution still sees, and what their recurrence has summed up. It lies in the same rows (`StateLayer`).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer


class Rows(Protocol):
    """What a layer follows: the rows of an arena, and which of them the forward pass in progress writes."""

    rows_held: int
    columns_held: int
    first_row: int
    last_row: int
    seen: slice
    is_prefilling: bool

    def reserved(self, rows: int, columns: int) -> int:
        """Return how many columns memory is set aside for, where so many rows hold `columns`."""

    def in_use(self, rows: int) -> Iterator[tuple[slice, slice, slice]]:
        """Return where rows lie, where they will among so many `rows`, and their columns that hold
        something."""


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return zeros of the type and device of `like`."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # Pages that the system clears when they are first written. PyTorch would write them all at once.
    pages = mmap.mmap(-1, max(1, math.prod(shape)) * like.element_size())
    return torch.frombuffer(pages, dtype=like.dtype, count=math.prod(shape)).view(shape)


class TokenLayer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers asks a cache layer of keys and values about its size."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0  # columns that attention sees, as a DynamicCache would count them

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class ArenaLayer(TokenLayer):
    """One layer's keys and values, [rows, heads, columns, head size], as transformers' cache layer."""

    def __init__(self, arena: Rows) -> None:
        super().__init__()
        self.arena = arena
        self._memory: dict[str, Tensor] = {}  # that keys and values lie in

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.arena.rows_held, self.arena.columns_held
        for name, states in (("keys", key_states), ("values", value_states)):
            setattr(self, name, self._laid(name, (rows, states.shape[1], columns, states.shape[3]), states))
        self.is_initialized = True

    def _laid(self, name: str, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        """Return the keys or values in this shape: in the memory that they have, or in new one where that is
        too small."""
        rows, heads, columns, size = shape
        memory = self._memory.get(name)
        if memory is None or len(memory) < math.prod(shape):
            memory = zeros((rows * heads * self.arena.reserved(rows, columns) * size,), like)
            self._memory[name] = memory
        return memory[: math.prod(shape)].view(shape)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        arena, width = self.arena, key_states.shape[2]
        first, last, start, end = arena.first_row, arena.last_row, arena.seen.start, arena.seen.stop
        self.keys[first:last, :, end - width : end] = key_states
        self.values[first:last, :, end - width : end] = value_states
        self.length += width
        if arena.is_prefilling:
            return key_states, value_states
        return self.keys[first:last, :, start:end], self.values[first:last, :, start:end]

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Put the tokens of the forward pass in progress, [rows, width, heads, head size], in place."""
        arena, width = self.arena, keys.shape[1]
        first, last, end = arena.first_row, arena.last_row, arena.seen.stop
        self.keys[first:last, :, end - width : end] = keys.transpose(1, 2)
        self.values[first:last, :, end - width : end] = values.transpose(1, 2)

    def begin(self) -> None:
        """Follow the rows that the arena's forward pass is about to write."""

    def resize(self, rows: int, columns: int) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = self._laid(name, (rows, old.shape[1], columns, old.shape[3]), old)
            moved = []
            for source, target, used in self.arena.in_use(rows):
                part = old[source, :, used]
                if new.data_ptr() == old.data_ptr():
                    part = part.clone()
                    old[source, :, used] = 0  # what is not finite would stay for whoever gets that place
                moved.append((target, used, part))
            for target, used, part in moved:
                new[target, :, used] = part
            setattr(self, name, new)

    def shift(self, rows: int, source: slice, target: slice) -> None:
        for held in (self.keys, self.values):
            moved = held[:rows, :, source]
            if apart := source.stop <= target.start or target.stop <= source.start:
                held[:rows, :, target] = moved
            else:
                moved = moved.clone()
            held[:rows, :, source] = 0  # see `resize`
            if not apart:
                held[:rows, :, target] = moved

    def move_row(self, source: int, target: int, columns: slice, by: int = 0) -> None:
        """Copy a row's columns, `by` columns to the right."""
        to = slice(columns.start + by, columns.stop + by)
        for held in (self.keys, self.values):
            moved = held[source, :, columns]
            if source == target:
                moved = moved.clone()
                held[source, :, columns] = 0  # see `resize`
            held[target, :, to] = moved

    def clear_row(self, row: int, columns: slice = slice(None)) -> None:
        if self.is_initialized:
            for held in (self.keys, self.values):
                held[row, :, columns] = 0


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """One layer's states, [rows, ...] each, as transformers' cache layer: it sees those of the rows that the
    forward pass in progress writes, as views, and writes them in place."""

    def __init__(self, arena: Rows, states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        self.arena = arena
        self.length = 0  # of keys and values, of which it has none
        self._held: dict[tuple[str, int], Tensor] = {}

    def lazy_initialization(self, *_keys_and_values: Tensor, **given: Any) -> None:
        state_idx = given.get("state_idx", 0)
        LinearAttentionLayer.lazy_initialization(self, **given)
        for name in ("conv_states", "recurrent_states"):
            if given.get(name) is not None:
                size = getattr(self, name)[state_idx].shape[1:]
                self._held[name, state_idx] = given[name].new_zeros((self.arena.rows_held, *size))
        self._show()

    def begin(self) -> None:
        for index in self.has_previous_state:
            self.has_previous_state[index] = not self.arena.is_prefilling
        self._show()
        if self.arena.is_prefilling:  # a row that was here before has left its own
            for held in self._held.values():
                held[self.arena.first_row : self.arena.last_row] = 0

    def _show(self) -> None:
        for (name, index), held in self._held.items():
            getattr(self, name)[index] = held[self.arena.first_row : self.arena.last_row]

    def resize(self, rows: int, columns: int) -> None:  # noqa: ARG002 - states have none
        for key, old in self._held.items():
            if len(old) == rows:
                continue
            self._held[key] = old.new_zeros((rows, *old.shape[1:]))
            for source, target, _ in self.arena.in_use(rows):
                self._held[key][target] = old[source]

    def shift(self, rows: int, source: slice, target: slice) -> None:
        pass

    def move_row(self, source: int, target: int, columns: slice, by: int = 0) -> None:  # noqa: ARG002
        for held in self._held.values():
            held[target] = held[source]

    def clear_row(self, row: int, columns: slice = slice(None)) -> None:  # noqa: ARG002
        for held in self._held.values():
            held[row] = 0


class MixedLayer(StateLayer, ArenaLayer):
    """A layer that has both."""

    is_compileable = False

    def __init__(self, arena: Rows, states: int) -> None:
        ArenaLayer.__init__(self, arena)
        StateLayer.__init__(self, arena, states)

    def lazy_initialization(self, *keys_and_values: Tensor, **given: Any) -> None:
        if keys_and_values:
            ArenaLayer.lazy_initialization(self, *keys_and_values)
        else:
            StateLayer.lazy_initialization(self, **given)

    def resize(self, rows: int, columns: int) -> None:
        ArenaLayer.resize(self, rows, columns)
        StateLayer.resize(self, rows, columns)

    def shift(self, rows: int, source: slice, target: slice) -> None:
        if self.is_initialized:
            ArenaLayer.shift(self, rows, source, target)

    def move_row(self, source: int, target: int, columns: slice, by: int = 0) -> None:
        StateLayer.move_row(self, source, target, columns)
        if self.is_initialized:
            ArenaLayer.move_row(self, source, target, columns, by)

    def clear_row(self, row: int, columns: slice = slice(None)) -> None:
        StateLayer.clear_row(self, row)
        ArenaLayer.clear_row(self, row, columns)
