"""The KV cache of a running batch: one arena per layer, shared by all rows.

    column      0                start                      end        capacity
    row 0       .  .  .  .  .  .  k0 k1 k2 k3 k4 k5 k6 k7 k8 |
    row 1       .  .  .  .  .  .  .  .  .  .  k0 k1 k2 k3 k4 |
    row 2       .  .  .  .  .  .  .  k0 k1 k2 k3 k4 k5 k6 k7 |

Rows 0..count-1 are running and all end at column `end`, so a step writes one column for all of them and
attention reads the one view [:count, :, start:end], left-padded as `generate` pads. Nothing is concatenated.

- join: prefill writes straight into new rows, right-aligned at `end`; no other row is copied unless the
  new one is longer than `end` (then all move right once).
- a prompt that is prefilled in parts lies in the row behind those that ran when it began, from column 0 on,
  where no step of the others looks; with its last part it becomes the last row, right-aligned.
- leave: the last row moves into the hole.
- when `end` meets the capacity, rows move left by `start`, or the arena gets some columns more, as long as
  its bytes allow (`room`); then it gives up rows for columns, or columns for rows. Who lets rows run sees to
  it that they fit, with `CONTEXT_SLACK` columns beyond the longest row, which make moves rare.

Columns are few more than the rows in use need: products over all of them, which lie in one piece, cost less
than a copy of those in use (`extent`). So capacity changes often, in memory that is set aside for twice as
many; on the host that is neither taken nor cleared before it is written.

What no row has written is finite, not garbage: a masked NaN would still poison attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from tidegate.engines.transformers.kv_layers import ArenaLayer, MixedLayer, StateLayer
from tidegate.engines.transformers.room import Room
from tidegate.sources.facts import CONTEXT_SLACK

FIRST_ROWS = 4
COLUMNS = 32  # capacity is a multiple of them: products take such windows faster
SPARE_SHARE = 16  # one column in so many is held beyond those in use, in which rows grow
WORTH_A_COPY = 1.5  # times as many columns as are in use: from there on a copy of those costs less


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a layer keeps of a row: keys and values for each token, a number of states, or nothing."""

    has_tokens: bool = True
    states: int = 0


def windows(starts: Sequence[int], most_unused: int) -> list[tuple[int, int, int]]:
    """Return runs of neighbouring rows, first and behind the last, with the first column of each that one of
    them holds; `starts` are the rows' own. What lies before the others' in a run is at most `most_unused`
    columns together."""
    found: list[tuple[int, int, int]] = []
    unused = 0
    for row, start in enumerate(starts):
        if found:
            first, last, begin = found[-1]
            both = min(begin, start)
            more = (last - first) * (begin - both) + start - both
            if unused + more <= most_unused:
                found[-1], unused = (first, row + 1, both), unused + more
                continue
        found.append((row, row + 1, start))
        unused = 0
    return found


class Arena(Cache):  # type: ignore[misc]
    """All layers of a batch. `max_rows`, `max_length` (tokens of the longest row) and the bytes of `room`
    bound its growth."""

    def __init__(
        self,
        layers: Sequence[LayerKind],
        max_rows: int,
        max_length: int,
        device: torch.device,
        room: Room | None = None,
    ) -> None:
        made = [self._made(kind) for kind in layers]
        super().__init__(layers=made)
        self._arena_layers = [layer for layer in made if not isinstance(layer, DummyLayer)]
        self.has_tokens = any(kind.has_tokens for kind in layers)
        self.has_states = any(kind.states for kind in layers)
        self._max_rows, self._max_columns = max_rows, max_length + CONTEXT_SLACK
        self._room = room
        self.rows_held = min(FIRST_ROWS, max_rows)
        self.columns_held = min(COLUMNS, self._most_columns(self.rows_held))
        self._mask = torch.zeros((self.rows_held, self.columns_held), dtype=torch.bool, device=device)
        self._starts: list[int] = []  # first column of each running row
        self.start = 0
        self.end = 0
        self.first_row = 0  # rows that the forward pass in progress writes
        self.last_row = 0
        self.seen = slice(0, 0)  # columns that it sees; the last ones of them it writes
        self.is_prefilling = False  # it begins its rows, which hold nothing before
        self._staged: int | None = None  # tokens held of the prompt that is prefilled in parts; None: none is
        self._staged_row = 0
        self._staged_columns = 0  # that it needs at least

    def _made(self, kind: LayerKind) -> Any:
        if kind.states:
            return MixedLayer(self, kind.states) if kind.has_tokens else StateLayer(self, kind.states)
        return ArenaLayer(self) if kind.has_tokens else DummyLayer()

    @property
    def count(self) -> int:
        return len(self._starts)

    def begin_prefill(self, lengths: Sequence[int]) -> Tensor:
        """Make room for new rows of these lengths; return their attention mask [rows, longest].
        They run from `commit_prefill` on; without it nothing has changed for the others."""
        longest, first = max(lengths), self.count
        self._begin_anew()
        self._make_room(first + len(lengths), longest)
        if longest > self.end:
            self._move(longest - self.end)
        if self._staged is not None and self._staged_row < first + len(lengths):
            self._move_staged(self.rows_held - 1)
        self._open(first, first + len(lengths), slice(self.end - longest, self.end), 0)
        mask = self._mask[first : self.last_row]
        mask.zero_()
        for row, length in enumerate(lengths):
            mask[row, self.end - length : self.end] = True
        return mask[:, self.end - longest : self.end]

    def commit_prefill(self, lengths: Sequence[int]) -> None:
        self._starts += [self.end - length for length in lengths]

    def begin_decode(self) -> Tensor:
        """Open one more column for all rows; return the attention mask [rows, window] with it."""
        self.start = min(self._starts)
        if self.end == self.columns_held:
            self._make_column()
        self._mask[: self.count, self.end] = True
        self.end += 1
        self._open(0, self.count, slice(self.start, self.end), self.end - self.start - 1)
        return self._mask[: self.count, self.start : self.end]

    def begin_run(self, counts: Sequence[int]) -> Tensor:
        """Open room for `counts[row]` tokens of each row; return the attention mask [rows, window] with them.
        All rows write the last `max(counts)` columns: what a row had there already it writes once more, so
        none may be shorter than that. A row that takes more than the fewest moves left."""
        width, fewest = max(counts), min(counts)
        if self.end + fewest > self.columns_held:
            self.start = min(self._starts)
            self._make_column()
            if self.end + fewest > self._most_columns(self.count + (self._staged is not None)):
                self._move(-self.start)
        more = [count - fewest for count in counts]
        if (short := max(by - start for by, start in zip(more, self._starts, strict=True))) > 0:
            self._move(short)
        self._hold_columns(self.end + fewest)
        for row, by in enumerate(more):
            if by:
                start = self._starts[row]
                self._starts[row] = start - by
                for layer in self._arena_layers:
                    layer.move_row(row, row, slice(start, self.end), -by)
                self._mask[row, start - by : start] = True
        self._mask[: self.count, self.end : self.end + fewest] = True
        self.end += fewest
        self.start = min(self._starts)
        self._open(0, self.count, slice(self.start, self.end), self.end - self.start - width)
        return self._mask[: self.count, self.start : self.end]

    def take_back(self, counts: Sequence[int]) -> None:
        """Forget the last `counts[row]` tokens of each row. One that loses more than the fewest moves
        right."""
        fewest = min(counts)
        self.end -= fewest
        self._mask[: self.count, self.end : self.end + fewest] = False
        for row, count in enumerate(counts):
            if by := count - fewest:
                start = self._starts[row]
                for layer in self._arena_layers:
                    layer.move_row(row, row, slice(start, self.end - by), by)
                self._mask[row, start : start + by] = False
                self._starts[row] = start + by
        self.start = min(self._starts)

    def begin_staged(self, length: int) -> None:
        """Make room for one more row of `length` tokens, which `begin_part` fills part by part."""
        self._begin_anew()
        self._staged, self._staged_row, self._staged_columns = 0, self.count, length
        self._make_room(self.count, length + CONTEXT_SLACK)  # which the first steps behind it take

    def begin_part(self, tokens: int) -> None:
        """Open room for the next `tokens` of the staged row. They are held from `commit_part` on; without it
        they may be opened once more."""
        assert self._staged is not None
        held, row = self._staged, self._staged_row
        self._open(row, row + 1, slice(0, held + tokens), held)

    def commit_part(self, tokens: int) -> None:
        assert self._staged is not None
        self._staged += tokens

    def commit_staged(self) -> None:
        """Let the staged row run, as the last one."""
        length, staged, row = self._staged, self._staged_row, self.count
        assert length is not None
        self._begin_anew()
        if length > self.end:
            self._move(length - self.end)
        by = self.end - length
        for layer in self._arena_layers if by or staged != row else ():
            layer.move_row(staged, row, slice(0, length), by)
            if staged != row:  # what is not finite would stay for whoever gets that row
                layer.clear_row(staged, slice(0, length))
        self._mask[row] = False
        self._mask[row, self.end - length : self.end] = True
        self._starts.append(self.end - length)
        self._staged, self._staged_columns = None, 0

    def fill_staged(self, tokens: int, fill: Callable[[list[Tensor]], None]) -> None:
        """Let `fill` write the keys and values [heads, tokens, head size] of all layers of the staged row's
        first tokens, which somebody has computed."""
        self._staged = tokens
        fill(self._tensors(self._staged_row, slice(0, tokens)))

    def tensors(self, row: int, tokens: slice) -> list[Tensor]:
        """Return the keys and values of some of a running row's tokens, [heads, tokens, head size] of all
        layers."""
        start = self._starts[row]
        return self._tensors(row, slice(start + tokens.start, start + tokens.stop))

    def _tensors(self, row: int, columns: slice) -> list[Tensor]:
        return [held[row, :, columns] for layer in self._arena_layers for held in (layer.keys, layer.values)]

    def drop_staged(self) -> None:
        """Forget the staged row."""
        if self._staged is not None and self.rows_held > self._staged_row:  # there was room for it
            for layer in self._arena_layers:
                layer.clear_row(self._staged_row)  # its values may not be finite
        self._staged, self._staged_columns = None, 0

    def _move_staged(self, row: int) -> None:
        for layer in self._arena_layers if self._staged else ():
            layer.move_row(self._staged_row, row, slice(0, self._staged))
            layer.clear_row(self._staged_row, slice(0, self._staged))
        self._staged_row = row

    def windows(self, most_unused: int) -> list[tuple[int, int, int]]:
        """Return `windows` of the running rows."""
        return windows(self._starts, most_unused)

    def extent(self, start: int, end: int) -> tuple[int, int]:
        """Return the columns, first and behind the last, that products over rows which hold `start` to `end`
        take best: all, which lie in one piece, or where those are too many only those in use."""
        if self.columns_held <= WORTH_A_COPY * (end - start):
            return 0, self.columns_held
        return start, end

    def window(self, held: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return keys or values of these rows and columns, [rows, heads, columns, head size]."""
        return held[rows, :, columns]

    def reserved(self, rows: int, columns: int) -> int:
        return max(columns, min(2 * columns, self._most_columns(rows)))

    def in_use(self, rows: int) -> Iterator[tuple[slice, slice, slice]]:
        if self._starts:
            running = slice(0, self.count)
            yield running, running, slice(min(self._starts), self.end)
        if self._staged:
            row, to = self._staged_row, min(self._staged_row, rows - 1)
            yield slice(row, row + 1), slice(to, to + 1), slice(0, self._staged)

    def lengths(self) -> list[int]:
        """Tokens held of each running row."""
        return [self.end - start for start in self._starts]

    def remove(self, row: int, *, clear: bool = False) -> None:
        """Free `row`; the last row takes its index. `clear` wipes it (its values may not be finite)."""
        if clear:
            for layer in self._arena_layers:
                layer.clear_row(row)
        last = self.count - 1
        if row != last:
            columns = slice(self._starts[last], self.end)
            for layer in self._arena_layers:
                layer.move_row(last, row, columns)
            self._mask[row] = self._mask[last]
            self._starts[row] = self._starts[last]
        self._mask[last] = False
        self._starts.pop()

    def _open(self, first_row: int, last_row: int, seen: slice, length: int) -> None:
        """Begin a forward pass of these rows, which hold `length` of the columns that it sees."""
        self.first_row, self.last_row, self.seen = first_row, last_row, seen
        self.is_prefilling = not length
        for layer in self._arena_layers:
            layer.length = length
            layer.begin()

    def _begin_anew(self) -> None:
        """Let rows begin at the first column, where none runs."""
        if not self._starts:
            self.end = self.start = 0
            self._narrow()

    def _narrow(self) -> None:
        """Give up columns that were for rows which have left."""
        enough = self._with_spare(max(1, self.end, self._staged_columns), self.rows_held)
        if 2 * enough <= self.columns_held:
            self._resize(self.rows_held, enough)

    def _make_column(self) -> None:
        """Rows have reached the last column: move them left, or grow where that would gain little."""
        growth = self._most_columns(self.count + (self._staged is not None)) - self.columns_held
        if self.start >= min(self.columns_held // 8, growth):
            self._move(-self.start)
            self._narrow()
        else:
            self._hold_columns(self.columns_held + 1)

    def _move(self, by: int) -> None:
        """Move all rows `by` columns to the right (left where negative)."""
        self._hold_columns(self.end + by)
        if self.count and by:
            source = slice(min(self._starts), self.end)
            target = slice(source.start + by, self.end + by)
            for layer in self._arena_layers:
                layer.shift(self.count, source, target)
            moved = self._mask[: self.count, source].clone()
            self._mask[: self.count] = False
            self._mask[: self.count, target] = moved
            self._starts = [start + by for start in self._starts]
        self.end += by
        self.start += by

    def _make_room(self, rows: int, columns: int) -> None:
        """Hold so many rows, and columns for one of so many. Where room is short, what no row needs goes."""
        is_short = self._most_columns(rows + (self._staged is not None)) < max(columns, self.end)
        if is_short and self._starts:
            self.start = min(self._starts)
            self._move(-self.start)
        self._hold(rows, columns)

    def _hold_columns(self, columns: int) -> None:
        self._hold(self.count, columns)

    def _hold(self, rows: int, columns: int) -> None:
        """Hold so many rows of so many columns, and one row more where one is staged."""
        rows += self._staged is not None
        if rows <= self.rows_held and columns <= self.columns_held:
            return
        more, wide = self.rows_held, self.columns_held
        if rows > more:
            more = min(self._max_rows, max(rows, 2 * more))
        if columns > wide:
            wide = self._with_spare(columns, rows)
        if wide > self._most_columns(more):
            wide = self._with_spare(max(columns, self.end, self._staged_columns), rows)
            more = max(rows, min(self._max_rows, rows * self._most_columns(rows) // wide))
            if self._most_columns(more) < wide:
                more = rows
        self._resize(more, wide)

    def _with_spare(self, columns: int, rows: int) -> int:
        """Return how many columns so many rows hold where they need `columns`."""
        wide = columns + columns // SPARE_SHARE
        wide += -wide % COLUMNS
        return max(columns, min(wide, self._most_columns(rows)))

    def _most_columns(self, rows: int) -> int:
        if self._room is None:
            return self._max_columns
        return min(self._max_columns, self._room.columns(rows))

    def _resize(self, rows: int, columns: int) -> None:
        for layer in self._arena_layers:
            layer.resize(rows, columns)
        self._staged_row = min(self._staged_row, rows - 1)
        mask = self._mask.new_zeros((rows, columns))
        known = self._mask[:rows, :columns]
        mask[: known.shape[0], : known.shape[1]] = known
        self._mask, self.rows_held, self.columns_held = mask, rows, columns
