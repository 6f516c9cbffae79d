"""Random arrivals, ends and aborts against what `scheduler` promises."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tidegate.engines.transformers.room import Room
from tidegate.engines.transformers.scheduler import (
    HEADROOM,
    PADDING_SHARE,
    PADDING_TOKENS,
    Scheduler,
    grouped,
    run_width,
)
from tidegate.sources.facts import CONTEXT_SLACK


@dataclass(frozen=True)
class Prompt:
    id: str
    length: int
    needs_all_logits: bool = False
    created: float = 0.0
    answer: int = 0  # tokens, beside those of `length`

    @property
    def width(self) -> int:
        return self.length

    @property
    def widest(self) -> int:
        return self.length + self.answer

    @property
    def age(self) -> tuple[float, str]:
        return self.created, self.id


LENGTHS = st.one_of(st.integers(1, 40), st.integers(1, 5000))
PROMPTS = st.lists(st.tuples(LENGTHS, st.booleans()), max_size=40).map(
    lambda drawn: [Prompt(str(index), length, alone) for index, (length, alone) in enumerate(drawn)]
)


def a_scheduler(*lengths: int, slots: int = 8) -> Scheduler[Prompt]:
    scheduler: Scheduler[Prompt] = Scheduler(slots)
    for index, length in enumerate(lengths):
        scheduler.add(Prompt(str(index), length))
    return scheduler


def joined(scheduler: Scheduler[Prompt], budget: int = 100, *, can_stage: bool = True) -> list[list[str]]:
    """One step: the ids that join it, in their groups."""
    plan = scheduler.schedule(budget, can_stage=can_stage)
    ended = [prompt for prompt, _ in plan.parts if prompt is not scheduler.staged or not scheduler.left]
    groups = [[prompt] for prompt in ended] + plan.groups
    for group in groups:
        scheduler.join(group)
    return [[prompt.id for prompt in group] for group in groups]


def test_all_that_fits_the_budget_joins_in_one_step() -> None:
    scheduler = a_scheduler(50, 50, 1)
    assert joined(scheduler) == [["0", "1"]]
    assert joined(scheduler) == [["2"]]


def test_a_prompt_longer_than_the_budget_is_prefilled_over_several_steps() -> None:
    scheduler = a_scheduler(5, 250, 50, 1)
    assert [joined(scheduler) for _ in range(5)] == [[["0"]], [], [], [["1"], ["2"]], [["3"]]]


def test_a_staged_prompt_follows_the_budget() -> None:
    scheduler = a_scheduler(250)
    counts = [scheduler.schedule(budget).parts for budget in (100, 10, 500)]
    assert [[count for _, count in parts] for parts in counts] == [[100], [10], [140]]


def test_what_is_still_to_be_prefilled_is_told_of_each_that_has_a_slot() -> None:
    scheduler = a_scheduler(250, 30, 40, 50, slots=3)
    assert scheduler.joining() == [250, 30, 40]
    joined(scheduler)
    assert scheduler.joining() == [150, 30, 40]


def test_a_prompt_that_cannot_be_staged_joins_alone_in_its_step() -> None:
    scheduler = a_scheduler(5, 1000, 5)
    steps = [joined(scheduler, can_stage=False) for _ in range(4)]
    assert steps == [[["0"]], [["1"]], [["2"]], []]


def test_what_is_held_of_a_prompt_needs_no_budget() -> None:
    scheduler = a_scheduler(900, 950, 60, 5)
    held = {"0": 880, "1": 900}
    plan = scheduler.schedule(100, held=lambda prompt: held.get(prompt.id, 0))
    assert [(prompt.id, count) for prompt, count in plan.parts] == [("0", 20), ("1", 50)]
    assert (plan.groups, plan.tokens) == ([], 70)


def test_a_short_prompt_does_not_overtake_a_long_one() -> None:
    scheduler = a_scheduler(60, 60, 5)
    assert joined(scheduler) == [["0"]]
    assert joined(scheduler) == [["2"], ["1"]]  # the same step


def test_lengths_far_apart_are_prefilled_apart() -> None:
    scheduler = a_scheduler(4, 4000, 20, 3500)
    assert joined(scheduler, 10_000) == [["0", "2"], ["3", "1"]]


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


def test_an_abort_finds_a_staged_request() -> None:
    scheduler = a_scheduler(150, 50)
    assert joined(scheduler) == []
    assert scheduler.free_slots() == 6
    assert scheduler.abort("0") is None
    assert (scheduler.free_slots(), joined(scheduler)) == (7, [["1"]])


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
    """The model: the line in its order of arrival with what each has still to prefill, and rows moved one by
    one as `Batch.leave` does."""

    @initialize(slots=st.integers(1, 6), can_stage=st.booleans())
    def start(self, slots: int, can_stage: bool) -> None:
        self.slots, self.can_stage = slots, can_stage
        self.scheduler: Scheduler[Prompt] = Scheduler(slots)
        self.line: list[Prompt] = []  # with the staged one
        self.left: dict[str, int] = {}
        self.rows: list[Prompt] = []
        self.added = 0

    @rule(length=LENGTHS, alone=st.booleans())
    def add(self, length: int, alone: bool) -> None:
        prompt = Prompt(str(self.added), length, alone)
        self.added += 1
        self.line.append(prompt)
        self.left[prompt.id] = length
        self.scheduler.add(prompt)

    @rule(data=st.data(), budget=st.sampled_from([1, 30, 500, 4096]), share=st.floats(0, 1))
    def step(self, data: st.DataObject, budget: int, share: float) -> None:
        had_slot = len(self.rows) < self.slots
        staged = self.scheduler.staged
        plan = self.scheduler.schedule(
            budget,
            can_stage=self.can_stage,
            held=lambda prompt: int(share * (prompt.length - 1)) if prompt.length % 3 == 0 else 0,
        )
        for prompt in self.line:
            if self.can_stage and prompt.length % 3 == 0 and prompt is not staged:
                self.left[prompt.id] = prompt.length - int(share * (prompt.length - 1))
        taken = [prompt for prompt, _ in plan.parts] + [one for group in plan.groups for one in group]
        assert set(taken) == set(self.line[: len(taken)]), "the first in line, and nobody else"
        assert bool(taken) == (had_slot and bool(self.line))
        first = self.left[self.line[0].id] if taken else 0
        for prompt, count in plan.parts:
            assert 0 < count <= self.left[prompt.id]
            self.left[prompt.id] -= count
        tokens = sum(count for _, count in plan.parts)
        tokens += sum(self.left[one.id] for group in plan.groups for one in group)
        assert min(first, budget) <= tokens
        if tokens > budget:
            assert (self.can_stage, len(taken)) == (False, 1)
        else:
            assert plan.tokens == tokens
        assert not any(self.left[prompt.id] for prompt, _ in plan.parts[:-1])
        whole = [[prompt] for prompt, _ in plan.parts if not self.left[prompt.id]]
        assert len(whole) == len(plan.parts) or not plan.groups
        for group in (*whole, *plan.groups):
            self.line = [prompt for prompt in self.line if prompt not in group]
            if data.draw(st.integers(0, 9)):  # else its prefill failed
                self.scheduler.join(group)
                self.rows += group
            elif group[0] is self.scheduler.staged:
                self.scheduler.forget()

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
        staged = [] if scheduler.staged is None else [scheduler.staged]
        assert [*staged, *scheduler.waiting] == self.line
        assert scheduler.running == self.rows
        assert len(scheduler.running) + len(staged) <= self.slots
        assert scheduler.free_slots() == self.slots - len(self.rows) - len(self.line)
        assert scheduler.has_work() == bool(self.rows or self.line)


@dataclass
class Growing:
    """A request that grows by a token a step."""

    id: str
    length: int
    widest: int
    age: tuple[float, str]
    needs_all_logits: bool = False

    @property
    def width(self) -> int:
        return self.length


@settings(deadline=None, max_examples=150)
@given(
    asked=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=25),
    tokens=st.integers(600, 2000),
    page=st.sampled_from([0, 1, 32]),
    budget=st.sampled_from([50, 4096]),
    slots=st.integers(1, 12),
)
def test_all_end_however_small_the_room(
    asked: list[tuple[int, int]], tokens: int, page: int, budget: int, slots: int
) -> None:
    room = Room((tokens + CONTEXT_SLACK) * 16, 16, page=page)
    scheduler: Scheduler[Growing] = Scheduler(slots, room, 64, 600)
    queue = [
        Growing(str(n), length, length + answer, (n, str(n))) for n, (length, answer) in enumerate(asked)
    ]
    begun: dict[str, int] = {}  # the step in which each found room last
    for step in range(sum(length + answer for length, answer in asked) * 2 + len(asked)):
        for _ in range(max(0, scheduler.free_slots())):
            if queue:
                scheduler.add(queue.pop(0))
        if not scheduler.has_work():
            break
        oldest = min(
            (*scheduler.running, *filter(None, [scheduler.staged])), key=lambda one: one.age, default=None
        )
        back = []
        while (one := scheduler.beyond_room()) is not None:
            assert one is not oldest
            assert step - begun[one.id] > HEADROOM, "nobody goes back and forth"
            if (row := scheduler.abort(one.id)) is not None:
                scheduler.leave([row])
            back.append(one)
        here = [*scheduler.running, *filter(None, [scheduler.staged])]
        assert len(here) <= slots
        assert room.holds([one.width for one in here])
        staged = scheduler.staged
        plan = scheduler.schedule(budget)
        surplus = scheduler.surplus()
        assert len(scheduler.waiting) == 1 or not surplus
        for one in (*(one for one, _ in plan.parts), *(one for group in plan.groups for one in group)):
            if not staged or one is not staged:
                begun[one.id] = step
            if one is not scheduler.staged or not scheduler.left:
                scheduler.join([one])
        over = []
        for row, one in enumerate(scheduler.running):
            one.length += 1
            if one.length == one.widest:
                over.append(row)
        scheduler.leave(over)
        queue = sorted([*queue, *back, *surplus], key=lambda one: one.age)
    assert not queue
    assert not scheduler.has_work()


def test_who_waits_behind_one_without_room_is_given_back() -> None:
    room = Room(16 * 1000, 16, page=1)
    scheduler: Scheduler[Prompt] = Scheduler(8, room, 100, 1000)
    for name, length in (("runs", 500), ("waits", 600), ("first", 10), ("second", 10)):
        scheduler.add(Prompt(name, length, answer=100))
    assert joined(scheduler, 4096) == [["runs"]]
    assert {one.id for one in scheduler.surplus()} == {"first", "second"}
    assert scheduler.free_slots() < 0
    scheduler.leave([0])
    assert joined(scheduler, 4096) == [["waits"]]


def test_slots_follow_from_what_is_usual_here() -> None:
    room = Room(16 * 2000, 16, page=1)
    scheduler: Scheduler[Prompt] = Scheduler(100, room, 136, 2000)
    assert scheduler.free_slots() == 10
    for name in range(40):
        scheduler.add(Prompt(str(name), 936))
        joined(scheduler, 4096)
        scheduler.leave([0])
    assert scheduler.free_slots() == 2


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
