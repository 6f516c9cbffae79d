"""The arena and the pool against a plain model of them: each row is the list of the numbers that were written
for it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.engines.transformers.kv import Arena, LayerKind
from tidegate.engines.transformers.paged import NOBODYS, PagedPool
from tidegate.engines.transformers.room import Room
from tidegate.sources.facts import CONTEXT_SLACK

MAX_ROWS, MAX_LENGTH, LAYERS = 9, 300, 2
CELLS = 16  # bytes of a column of one row
ROOM = Room(MAX_ROWS * (MAX_LENGTH + CONTEXT_SLACK) * CELLS, CELLS)  # for as many rows as there may be
operations = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.lists(st.integers(1, 200), min_size=1, max_size=3)),
        st.tuples(st.just("decode"), st.integers(1, 70)),
        st.tuples(st.just("run"), st.integers(0, 1 << 20)),
        st.tuples(st.just("leave"), st.integers(0, 8)),
        st.tuples(st.just("stage"), st.integers(1, 250)),
        st.tuples(st.just("part"), st.integers(1, 120)),
        st.tuples(st.just("drop"), st.just(0)),
    ),
    max_size=25,
)


class Model:
    """Writes numbered keys through all layers and checks what attention would see."""

    def __init__(self, room: Room = ROOM) -> None:
        self.room = room
        layers, device = [LayerKind()] * LAYERS, torch.device("cpu")
        self.arena: Arena | PagedPool
        if room.page:
            self.arena = PagedPool(layers, MAX_ROWS, MAX_LENGTH, device, room)
        else:
            self.arena = Arena(layers, MAX_ROWS, MAX_LENGTH, device, room)
        self.rows: list[list[float]] = []
        self.number = 0.0
        self.staged: list[float] | None = None
        self.wanted = 0  # tokens of the staged row

    def numbers(self, count: int) -> list[float]:
        self.number += count
        return [self.number - count + index for index in range(count)]

    def join(self, lengths: list[int]) -> None:
        new = [self.numbers(length) for length in lengths]
        mask = self.arena.begin_prefill(lengths)
        longest = max(lengths)
        assert mask.sum(-1).tolist() == lengths
        assert all(bool(mask[row, longest - length :].all()) for row, length in enumerate(lengths))
        padded = [[-1.0] * (longest - len(row)) + row for row in new]
        states = torch.tensor(padded)[:, None, :, None]
        for layer in range(LAYERS):
            keys, values = self.arena.update(states, -states, layer)
            assert torch.equal(keys, states)
            assert torch.equal(values, -states)
        self.arena.commit_prefill(lengths)
        self.rows += new

    def decode(self) -> None:
        mask = self.arena.begin_decode()
        new = [self.numbers(1) for _ in self.rows]
        states = torch.tensor(new)[:, None, :, None]
        window = max(map(len, self.rows)) + 1
        for layer in range(LAYERS):
            assert self.arena.get_seq_length(layer) == window - 1
            keys, values = self.arena.update(states, -states, layer)
            assert keys.shape == (len(self.rows), 1, window, 1)
            for row, held in enumerate(self.rows):
                expected = held + new[row]
                assert keys[row, 0, mask[row], 0].tolist() == expected
                assert values[row, 0, mask[row], 0].tolist() == [-number for number in expected]
        for row, added in enumerate(new):
            self.rows[row] += added
        if isinstance(self.arena, Arena):
            for most in (0, 50):
                self.check_windows(self.arena, most)
        for row, held in enumerate(self.rows):
            part = slice(len(held) // 3, len(held))
            keys, values = self.arena.tensors(row, part)[-2:]
            assert keys[0, :, 0].tolist() == held[part]
            assert torch.equal(values, -keys)

    def run(self, chance: int) -> None:
        """Let each row take some tokens, and forget some of those again."""
        draw = random.Random(chance)
        longest = min(map(len, self.rows)) + 1
        if isinstance(self.arena, PagedPool):
            longest = min(longest, self.arena.spare())
        counts = [draw.randint(1, max(1, min(9, longest, MAX_LENGTH - len(row)))) for row in self.rows]
        mask, width = self.arena.begin_run(counts), max(counts)
        self.rows = [row + self.numbers(count) for row, count in zip(self.rows, counts, strict=True)]
        states = torch.tensor([row[-width:] for row in self.rows])[:, None, :, None]
        for layer in range(LAYERS):
            keys, values = self.arena.update(states, -states, layer)
            for row, expected in enumerate(self.rows):
                assert keys[row, 0, mask[row], 0].tolist() == expected
                assert values[row, 0, mask[row], 0].tolist() == [-number for number in expected]
        unsaid = [draw.randint(0, count - 1) for count in counts]
        self.arena.take_back(unsaid)
        self.rows = [row[: len(row) - count] for row, count in zip(self.rows, unsaid, strict=True)]
        if isinstance(self.arena, Arena):
            self.check_windows(self.arena, 50)

    def check_windows(self, arena: Arena, most_unused: int) -> None:
        lengths, end, seen = arena.lengths(), arena.end, 0
        begin, behind = arena.extent(arena.start, arena.end)
        assert begin <= arena.start < end <= behind
        whole = arena.window(arena.layers[0].keys, slice(0, len(lengths)), slice(begin, behind))
        assert (begin, behind) == (arena.start, end) or whole.is_contiguous()
        assert whole.isfinite().all()
        for first, last, begin in arena.windows(most_unused):
            assert first == seen < last
            held = lengths[first:last]
            assert end - begin == max(held)
            assert sum(max(held) - length for length in held) <= most_unused
            seen = last
        assert seen == len(lengths)

    def stage(self, length: int) -> None:
        self.arena.begin_staged(length)
        self.staged, self.wanted = [], length

    def part(self, count: int) -> None:
        assert self.staged is not None
        count = min(count, self.wanted - len(self.staged))
        self.arena.begin_part(count)  # the forward pass raises, and is tried again
        self.arena.begin_part(count)
        self.staged += self.numbers(count)
        states = torch.tensor(self.staged[-count:])[None, None, :, None]
        for layer in range(LAYERS):
            keys, values = self.arena.update(states, -states, layer)
            assert keys[0, 0, :, 0].tolist() == self.staged
            assert torch.equal(values, -keys)
        self.arena.commit_part(count)
        if len(self.staged) == self.wanted:
            self.arena.commit_staged()
            self.rows.append(self.staged)
            self.staged = None

    def drop(self) -> None:
        self.arena.drop_staged()
        self.staged = None

    def has_room(self, *more: int, tokens: int = 0) -> bool:
        """Tell what a scheduler sees to: room for these rows beside the others, after so many steps."""
        staged = [] if self.staged is None else [self.wanted]
        return self.room.holds([*(len(row) + tokens for row in self.rows), *staged, *more])

    def make_room(self) -> None:
        while self.rows and not self.has_room(tokens=1):
            self.leave(len(self.rows) - 1)

    def leave(self, row: int) -> None:
        if is_broken := row % 2 == 0:
            for held in self.arena.tensors(row, slice(len(self.rows[row]) - 1, len(self.rows[row]))):
                held.fill_(torch.nan)
        self.arena.remove(row, clear=is_broken)
        self.rows[row] = self.rows[-1]
        self.rows.pop()


@settings(deadline=None, max_examples=120)
@given(operations, st.floats(1, MAX_ROWS), st.sampled_from([0, 1, 16, 50]))
def test_every_row_sees_just_its_own_tokens(
    script: list[tuple[str, list[int] | int]], whole_rows: float, page: int
) -> None:
    """In room for one row of full length, or so many more."""
    room = replace(ROOM, bytes=int(whole_rows * (MAX_LENGTH + CONTEXT_SLACK)) * CELLS, page=page)
    model = Model(room)
    for name, argument in script:
        if isinstance(argument, list):
            is_free = len(model.rows) + len(argument) + (model.staged is not None) <= MAX_ROWS
            if is_free and model.has_room(*argument):
                model.join(argument)
        elif name == "stage":
            if model.staged is None and len(model.rows) < MAX_ROWS and model.has_room(argument):
                model.stage(argument)
        elif name == "part":
            if model.staged is not None:
                model.part(argument)
        elif name == "drop":
            model.drop()
        elif name == "run":
            model.make_room()
            if model.rows and max(map(len, model.rows)) < MAX_LENGTH:
                model.run(argument)
        elif name == "leave":
            if model.rows:
                model.leave(argument % len(model.rows))
        else:
            for _ in range(argument):
                for row in reversed(range(len(model.rows))):
                    if len(model.rows[row]) + 1 > MAX_LENGTH:
                        model.leave(row)
                model.make_room()
                if model.rows:
                    model.decode()
        if isinstance(model.arena, Arena):
            assert model.arena.rows_held * model.arena.columns_held * CELLS <= room.bytes
        assert model.arena.lengths() == [len(row) for row in model.rows]
    if isinstance(model.arena, Arena):
        assert model.arena.rows_held <= MAX_ROWS
        assert model.arena.columns_held <= MAX_LENGTH + CONTEXT_SLACK
        return
    while model.rows:
        model.leave(0)
    model.drop()
    model.arena._release_joining()
    assert sorted(model.arena._free) == list(range(NOBODYS, model.arena.pages)), "no page is lost"


@pytest.mark.parametrize("page", [0, 16])
def test_a_prefill_that_fails_leaves_no_trace(page: int) -> None:
    model = Model(replace(ROOM, page=page))
    model.join([5, 3])
    model.decode()
    model.arena.begin_prefill([100])  # the forward pass raises, nothing is committed
    model.decode()
    model.join([4])
    model.decode()
    assert model.arena.lengths() == [8, 6, 5]


def test_a_prompt_that_is_not_finite_leaves_nothing_behind() -> None:
    """Though the arena has changed its columns since it was written, in the same memory."""
    model = Model()
    model.join([3])
    model.stage(100)
    model.part(50)
    assert isinstance(model.arena, Arena)
    for held in model.arena._tensors(model.arena._staged_row, slice(0, 50)):
        held.fill_(torch.nan)
    columns, memory = model.arena.columns_held, model.arena.layers[0].keys.data_ptr()
    while model.arena.columns_held == columns:
        model.decode()
    assert model.arena.layers[0].keys.data_ptr() == memory
    model.drop()
    assert all(memory.isfinite().all() for memory in model.arena.layers[0]._memory.values())


def test_columns_for_rows_that_have_left_are_given_up() -> None:
    model = Model()
    model.join([200, 2])
    assert isinstance(model.arena, Arena)
    model.leave(0)
    for _ in range(40):
        model.decode()
    assert model.arena.columns_held < 100


def test_many_short_requests_beside_a_long_one_need_no_more_columns() -> None:
    model = Model()
    model.join([2])
    for _ in range(MAX_LENGTH - 3):
        model.decode()
        if len(model.rows) > 1:
            model.leave(1)
        model.join([3])
    assert isinstance(model.arena, Arena)
    assert model.arena.columns_held <= MAX_LENGTH + CONTEXT_SLACK
