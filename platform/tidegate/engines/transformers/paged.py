"""The KV cache in pages: rows take the memory of the tokens that they hold, wherever it is free.

    row 0   pages 4, 1       page   1 | k4 k5 .  . |   2 | k8 .  .  . |   3 | k4 k5 k6 k7 |   ...
    row 1   pages 5, 3, 2           4 | k0 k1 k2 k3|   5 | k0 k1 k2 k3|

A pool takes the place of an arena (`kv`) for models whose layers hold keys and values of tokens and nothing
else. No row is ever copied or moved: one that leaves gives its pages back, and the last row's list of pages
takes its place. A prompt that is prefilled in parts has pages like any row.

Who attends reads the pages through the table: on CUDA the kernel that PyTorch has for it (`attend`), for
which a page is a multiple of 256 tokens; elsewhere, and in forward passes of the model's own, a copy in which
rows end at one column as in an arena (`window`). Two pages are nobody's: page 0 stays zero, and what pads a
row is read there; what pads a batch (`held_still`) writes into page 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.cache_utils import Cache, DummyLayer

from tidegate.engines.transformers.kv import LayerKind, windows
from tidegate.engines.transformers.kv_layers import TokenLayer, zeros
from tidegate.engines.transformers.room import Room
from tidegate.engines.transformers.row_values import sent

PAGE = {"cpu": 16, "cuda": 256}  # tokens
NOBODYS = 2  # pages


def paged_room(room: Room, device: str, context_length: int) -> Room | None:
    """Return the room of a pool in the bytes of `room`; None where it would not hold one request of full
    context, beside the page that is nobody's."""
    page = PAGE[device]
    found = replace(room, page=page, bytes=room.bytes - page * room.per_token)
    return found if found.holds([context_length]) else None


class PagedLayer(TokenLayer):
    """One layer's keys and values, [tokens of all pages, heads, head size], as transformers' cache layer."""

    def __init__(self, pool: PagedPool) -> None:
        super().__init__()
        self.pool = pool

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        tokens = self.pool.pages * self.pool.page
        self.keys = zeros((tokens, key_states.shape[1], key_states.shape[3]), key_states)
        self.values = zeros((tokens, value_states.shape[1], value_states.shape[3]), value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.write(key_states.transpose(1, 2), value_states.transpose(1, 2))
        self.length += key_states.shape[2]
        if self.pool.is_prefilling:
            return key_states, value_states
        return self.pool.gather(self.keys), self.pool.gather(self.values)

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Put the tokens of the forward pass in progress, [rows, width, heads, head size], in place."""
        pool = self.pool
        for held, new in ((self.keys, keys), (self.values, values)):
            flat = new.reshape(-1, *held.shape[1:])
            held.index_copy_(0, pool.written, flat if pool.picked is None else flat[pool.picked])


class PagedPool(Cache):  # type: ignore[misc]
    """All layers of a batch, in as many pages as `room` has. Does what `kv.Arena` does."""

    has_states = False

    def __init__(
        self, layers: Sequence[LayerKind], max_rows: int, max_length: int, device: torch.device, room: Room
    ) -> None:
        made = [PagedLayer(self) if kind.has_tokens else DummyLayer() for kind in layers]
        super().__init__(layers=made)
        self._paged_layers = [layer for layer in made if isinstance(layer, PagedLayer)]
        self.has_tokens = bool(self._paged_layers)
        self.page = room.page
        self.pages = room.bytes // room.of_row(room.page) + NOBODYS
        self._device = device
        self._free = list(range(self.pages - 1, NOBODYS - 1, -1))
        self._tables: list[list[int]] = []  # of running rows
        self._lengths: list[int] = []
        self._joining: list[list[int]] = []  # of rows whose prefill is in progress, or has failed
        self._staged: list[int] | None = None
        self._staged_length = 0
        self._last_row = max_rows  # of the table: the staged one's
        self._table = torch.zeros(
            (max_rows + 1, -(-max_length // self.page) + 1), dtype=torch.int32, device=device
        )
        # The forward pass in progress.
        self.is_prefilling = False  # it begins its rows, which hold nothing before
        self.written = torch.zeros(0, dtype=torch.long, device=device)  # where each of its tokens lies
        self.picked: Tensor | None = None  # which of its columns are tokens; None: all
        self.start = 0  # columns that it sees, as in an arena
        self.end = 0
        self._rows: slice = slice(0, 0)
        self._width = 0
        self._seen = torch.zeros(0, dtype=torch.int32, device=device)  # [rows], tokens with its own
        self._read: Tensor | None = None  # [rows, window], where they lie

    @property
    def count(self) -> int:
        return len(self._tables)

    def begin_prefill(self, lengths: Sequence[int]) -> Tensor:
        """See `Arena.begin_prefill`."""
        self._release_joining()
        for row, length in enumerate(lengths, self.count):
            pages: list[int] = []
            self._joining.append(pages)
            self._grow(row, pages, length)
        mask = self._open(self.count, lengths, max(lengths))
        self.picked = None if min(lengths) == max(lengths) else mask.flatten().nonzero().flatten()
        return mask

    def commit_prefill(self, lengths: Sequence[int]) -> None:
        self._tables += self._joining
        self._lengths += lengths
        self._joining = []

    def begin_decode(self) -> Tensor:
        """See `Arena.begin_decode`."""
        return self.begin_run([1] * self.count)

    def begin_run(self, counts: Sequence[int]) -> Tensor:
        """See `Arena.begin_run`."""
        self._release_joining()
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        for row, length in enumerate(self._lengths):
            self._grow(row, self._tables[row], length)
        return self._open(0, self._lengths, max(counts))

    def take_back(self, counts: Sequence[int]) -> None:
        """See `Arena.take_back`."""
        for row, count in enumerate(counts):
            self._lengths[row] -= count
            pages, needed = self._tables[row], -(-self._lengths[row] // self.page)
            self._give_back(pages[needed:], clear=False)
            del pages[needed:]

    def begin_staged(self, length: int) -> None:
        """See `Arena.begin_staged`."""
        self._release_joining()
        self._staged, self._staged_length = [], 0
        self._grow(self._last_row, self._staged, length)

    def begin_part(self, tokens: int) -> None:
        """See `Arena.begin_part`."""
        self._open(self._last_row, [self._staged_length + tokens], tokens)

    def commit_part(self, tokens: int) -> None:
        self._staged_length += tokens

    def commit_staged(self) -> None:
        assert self._staged is not None
        self._table[self.count] = self._table[self._last_row]
        self._tables.append(self._staged)
        self._lengths.append(self._staged_length)
        self._staged = None

    def fill_staged(self, tokens: int, fill: Callable[[list[Tensor]], None]) -> None:
        """See `Arena.fill_staged`."""
        self._open(self._last_row, [tokens], tokens)
        new = [
            held.new_empty((held.shape[1], tokens, held.shape[2]))
            for layer in self._paged_layers
            for held in (layer.keys, layer.values)
        ]
        fill(new)
        pairs = zip(new[::2], new[1::2], strict=True)
        for layer, (keys, values) in zip(self._paged_layers, pairs, strict=True):
            layer.write(keys.transpose(0, 1), values.transpose(0, 1))
        self._staged_length = tokens

    def drop_staged(self) -> None:
        if self._staged is not None:
            self._give_back(self._staged, clear=True)
        self._staged = None

    def tensors(self, row: int, tokens: slice) -> list[Tensor]:
        """Return copies of what a running row holds of these tokens; see `Arena.tensors`."""
        places = torch.arange(self._lengths[row], device=self._device)[tokens]
        places = self._places(self._table[row].long().unsqueeze(0), places.unsqueeze(0)).flatten()
        return [
            held.index_select(0, places).transpose(0, 1)
            for layer in self._paged_layers
            for held in (layer.keys, layer.values)
        ]

    def lengths(self) -> list[int]:
        return list(self._lengths)

    def spare(self) -> int:
        """Return how many tokens each row may add with the pages that are free."""
        fewest = min((-length % self.page for length in self._lengths), default=0)
        return fewest + len(self._free) // max(1, self.count) * self.page

    def remove(self, row: int, *, clear: bool = False) -> None:
        """See `Arena.remove`."""
        self._give_back(self._tables[row], clear=clear)
        last = self.count - 1
        if row != last:
            self._tables[row], self._lengths[row] = self._tables[last], self._lengths[last]
            self._table[row] = self._table[last]
        self._tables.pop()
        self._lengths.pop()

    def windows(self, most_unused: int) -> list[tuple[int, int, int]]:
        """See `Arena.windows`."""
        return windows([self.end - length for length in self._lengths], most_unused)

    def extent(self, start: int, end: int) -> tuple[int, int]:
        """See `Arena.extent`."""
        return start, end

    def window(self, held: Tensor, rows: slice, columns: slice) -> Tensor:
        """See `Arena.window`: here it is a copy, padded left."""
        if self._read is None:
            lengths = self._seen.long().unsqueeze(1)
            tokens = torch.arange(self.end, device=self._device) - (self.end - lengths)
            places = self._places(self._table[self._rows].long(), tokens.clamp(min=0))
            self._read = places.masked_fill_(tokens < 0, 0)
        read = self._read[rows, columns]
        found = held.index_select(0, read.flatten()).view(*read.shape, *held.shape[1:])
        return found.transpose(1, 2)

    def gather(self, held: Tensor) -> Tensor:
        """Return keys or values of all rows of the forward pass, as `window` does."""
        return self.window(held, slice(0, len(self._seen)), slice(0, self.end))

    @contextmanager
    def held_still(self, seen: Tensor, written: Tensor) -> Iterator[None]:
        """Let a decoding step be one of the first `len(seen)` rows of the table, whoever they are, with what
        these tensors hold of them whenever it runs: what `_open` has to say of a step, but of any."""
        before = self._rows, self._width, self.end, self._seen, self.written, self.picked, self.is_prefilling
        self._rows, self._width = slice(0, len(seen)), 1
        self.end = self._table.shape[1] * self.page
        self._seen, self.written, self.picked, self.is_prefilling = seen, written, None, False
        try:
            yield
        finally:
            self._rows, self._width, self.end, self._seen, self.written, self.picked, self.is_prefilling = (
                before
            )

    @property
    def seen(self) -> Tensor:
        """Return how many tokens each row of the forward pass sees, [rows]."""
        return self._seen

    @property
    def padding(self) -> int:
        """Return where a token may lie that is nobody's."""
        return self.page

    def has_kernel(self, held: Tensor) -> bool:
        """Tell whether `attend` runs for keys and values like these."""
        is_half = held.dtype in (torch.float16, torch.bfloat16)
        return held.device.type == "cuda" and is_half and self.page % PAGE["cuda"] == 0

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attend from the tokens of the forward pass, [rows x width, heads, head size], to what their rows
        hold up to each. Returns the same shape. In one split: the same bits, whoever else runs."""
        rows, shape = len(self._seen), (self.pages, self.page)
        begins = torch.arange(
            0, (rows + 1) * self._width, self._width, dtype=torch.int32, device=self._device
        )
        ends = torch.cat((self._seen.new_zeros(1), self._seen.cumsum(0, dtype=torch.int32)))
        found = varlen_attn(
            query,
            keys.view(*shape, *keys.shape[1:]),
            values.view(*shape, *values.shape[1:]),
            begins,
            ends,
            self._width,
            self.end,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=self._seen,
            block_table=self._table[self._rows],
            num_splits=1,
        )
        assert isinstance(found, Tensor)
        return found

    def _open(self, first: int, lengths: Sequence[int], width: int) -> Tensor:
        """Begin a forward pass of the rows from `first` on, each with so many tokens, of which it writes the
        last `width`. Returns the attention mask [rows, window]."""
        self._rows, self._width = slice(first, first + len(lengths)), width
        self.start, self.end = 0, max(lengths)
        self._seen = sent(torch.tensor(lengths, dtype=torch.int32), self._device)
        self._read = self.picked = None
        self.is_prefilling = width == self.end
        for layer in self._paged_layers:
            layer.length = self.end - width
        ends = self._seen.long().unsqueeze(1)
        written = torch.arange(-width, 0, device=self._device) + ends
        places = self._places(self._table[self._rows].long(), written.clamp(min=0))
        self.written = places[written >= 0] if min(lengths) < width else places.flatten()
        return torch.arange(-self.end, 0, device=self._device) + ends >= 0

    def _places(self, table: Tensor, tokens: Tensor) -> Tensor:
        """Return where tokens [rows, any], counted in their rows, lie in the pool."""
        return table.gather(1, tokens // self.page) * self.page + tokens % self.page

    def _grow(self, row: int, pages: list[int], tokens: int) -> None:
        """Give a row pages for so many tokens."""
        count = -(-tokens // self.page) - len(pages)
        if count > len(self._free):
            raise RuntimeError(f"{tokens} tokens of a row need {count} pages, and {len(self._free)} are free")
        if new := [self._free.pop() for _ in range(count)]:
            places = slice(len(pages), len(pages) + len(new))
            self._table[row, places] = sent(torch.tensor(new, dtype=torch.int32), self._device)
            pages += new

    def _give_back(self, pages: list[int], *, clear: bool) -> None:
        """`clear` wipes them: their values may not be finite."""
        if clear:
            for layer in self._paged_layers:
                if layer.is_initialized:
                    for held in (layer.keys, layer.values):
                        held.view(self.pages, self.page, *held.shape[1:])[pages] = 0
        self._free += pages

    def _release_joining(self) -> None:
        for pages in self._joining:
            self._give_back(pages, clear=True)
        self._joining = []
