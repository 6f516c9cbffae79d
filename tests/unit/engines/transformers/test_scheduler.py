"""Random arrivals, ends and aborts against what `scheduler` promises."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tidegate.engines.transformers.scheduler import (
    PADDING_SHARE,
    PADDING_TOKENS,
    Scheduler,
    grouped,
    run_width,
)


@dataclass(frozen=True)
class Prompt:
    id: str
    length: int
    needs_all_logits: bool = False


LENGTHS = st.one_of(st.integers(1, 40), st.integers(1, 5000))
PROMPTS = st.lists(st.tuples(LENGTHS, st.booleans()), max_size=40).map(
    lambda drawn: [Prompt(str(index), length, alone) for index, (length, alone) in enumerate(drawn)]
)


def a_scheduler(*lengths: int, slots: int = 8, tokens_per_step: int = 100) -> Scheduler[Prompt]:
    scheduler: Scheduler[Prompt] = Scheduler(slots, tokens_per_step)
    for index, length in enumerate(lengths):
        scheduler.add(Prompt(str(index), length))
    return scheduler


def joined(scheduler: Scheduler[Prompt]) -> list[list[str]]:
    """One step: the ids that join it, in their groups."""
    groups = scheduler.schedule()
    for group in groups:
        scheduler.join(group)
    return [[prompt.id for prompt in group] for group in groups]


def test_all_that_fits_the_budget_joins_in_one_step() -> None:
    scheduler = a_scheduler(50, 50, 1)
    assert joined(scheduler) == [["0", "1"]]
    assert joined(scheduler) == [["2"]]


def test_a_prompt_longer_than_the_budget_joins_alone_in_its_step() -> None:
    scheduler = a_scheduler(5, 1000, 5)
    assert [joined(scheduler) for _ in range(4)] == [[["0"]], [["1"]], [["2"]], []]


def test_a_short_prompt_does_not_overtake_a_long_one() -> None:
    scheduler = a_scheduler(60, 60, 5)
    assert joined(scheduler) == [["0"]]
    assert joined(scheduler) == [["2"], ["1"]]  # the same step


def test_lengths_far_apart_are_prefilled_apart() -> None:
    scheduler = a_scheduler(4, 4000, 20, 3500, tokens_per_step=10_000)
    assert joined(scheduler) == [["0", "2"], ["3", "1"]]


def test_who_waits_for_a_slot_joins_when_one_is_free() -> None:
    scheduler = a_scheduler(5, 5, 5, slots=2)
    assert joined(scheduler) == [["0", "1"]]
    assert joined(scheduler) == []
    assert scheduler.free_slots() == -1
    scheduler.leave([0])
    assert joined(scheduler) == [["2"]]
    assert [prompt.id for prompt in scheduler.running] == ["1", "2"]


def test_an_abort_finds_a_request_in_the_line_and_in_the_batch() -> None:
    scheduler = a_scheduler(60, 60)
    joined(scheduler)
    assert scheduler.abort("1") is None
    assert list(scheduler.waiting) == []
    assert scheduler.abort("0") == 0
    assert scheduler.abort("unknown") is None


@given(PROMPTS)
def test_groups_hold_each_prompt_once_and_pad_within_the_bound(prompts: list[Prompt]) -> None:
    groups = grouped(prompts)
    assert sorted((prompt for group in groups for prompt in group), key=prompts.index) == prompts
    for group in groups:
        longest = max(prompt.length for prompt in group)
        shortest = min(prompt.length for prompt in group)
        assert longest - shortest <= max(PADDING_TOKENS, PADDING_SHARE * longest)
        assert len(group) == 1 or not any(prompt.needs_all_logits for prompt in group)


class Steps(RuleBasedStateMachine):
    """The model: the line in its order of arrival, and rows moved one by one as `Batch.leave` does."""

    @initialize(slots=st.integers(1, 6), tokens_per_step=st.sampled_from([1, 30, 4096]))
    def start(self, slots: int, tokens_per_step: int) -> None:
        self.slots, self.tokens_per_step = slots, tokens_per_step
        self.scheduler: Scheduler[Prompt] = Scheduler(slots, tokens_per_step)
        self.line: list[Prompt] = []
        self.rows: list[Prompt] = []
        self.added = 0
        self.steps_waited: dict[str, int] = {}  # with a free slot
        self.ahead: dict[str, int] = {}  # in the line at the arrival

    @rule(length=LENGTHS, alone=st.booleans())
    def add(self, length: int, alone: bool) -> None:
        prompt = Prompt(str(self.added), length, alone)
        self.added += 1
        self.steps_waited[prompt.id], self.ahead[prompt.id] = 0, len(self.line)
        self.line.append(prompt)
        self.scheduler.add(prompt)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        had_slot = len(self.rows) < self.slots
        groups = self.scheduler.schedule()
        joining = [prompt for group in groups for prompt in group]
        first = self.line[: len(joining)]
        assert set(joining) == set(first), "the first in line join, and nobody else"
        assert bool(joining) == (had_slot and bool(self.line))
        assert len(joining) <= 1 or sum(prompt.length for prompt in joining) <= self.tokens_per_step
        self.line = self.line[len(joining) :]
        for prompt in self.line:
            self.steps_waited[prompt.id] += had_slot
        for prompt in joining:
            assert self.steps_waited[prompt.id] <= self.ahead[prompt.id]
        for group in groups:
            if data.draw(st.integers(0, 9)):  # else its prefill failed
                self.scheduler.join(group)
                self.rows += group

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        before = list(self.rows)
        over = data.draw(st.sets(st.sampled_from(range(len(before))))) if before else set()
        for row in sorted(over, reverse=True):
            self.rows[row] = self.rows[-1]
            self.rows.pop()
        order = self.scheduler.leave(over)
        assert [before[row] for row in order] == self.rows

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        known = [*self.line, *self.rows]
        if not known:
            return
        prompt = data.draw(st.sampled_from(known))
        row = self.scheduler.abort(prompt.id)
        if prompt in self.line:
            assert row is None
            self.line.remove(prompt)
        else:
            assert row == self.rows.index(prompt)

    @invariant()
    def agrees(self) -> None:
        scheduler = self.scheduler
        assert list(scheduler.waiting) == self.line
        assert scheduler.running == self.rows
        assert len(scheduler.running) <= self.slots
        assert scheduler.free_slots() == self.slots - len(self.rows) - len(self.line)
        assert scheduler.has_work() == bool(self.rows or self.line)


TestSteps = Steps.TestCase
TestSteps.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


@pytest.mark.parametrize(
    ("ready", "longest", "weights_tokens", "expected"),
    [
        ([1, 1], 9, 16, 1),
        ([8], 9, 16, 8),
        ([8], 5, 16, 5),  # no row may be shorter
        ([8] * 16, 9, 16, 8),
        ([8] + [1] * 63, 9, 16, 1),  # 64 rows would compute eight tokens for the sake of one
        ([8] + [1] * 63, 9, 1 << 20, 8),
        ([8, 2, 2, 2], 9, 16, 2),
    ],
)
def test_a_step_takes_as_many_forced_tokens_as_are_worth_it(
    ready: list[int], longest: int, weights_tokens: int, expected: int
) -> None:
    assert run_width(ready, longest, weights_tokens) == expected
