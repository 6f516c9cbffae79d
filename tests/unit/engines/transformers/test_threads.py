from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.transformers.threads import (
    FIRST_WAIT,
    LONGEST_WAIT,
    PARALLEL_BYTES,
    PARALLEL_TOKENS,
    TRIAL_STEPS,
    StepThreads,
    prefill_threads,
    set_threads,
)

SMALL = 1


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(chosen: StepThreads, steps: int, seconds: Callable[[int], float], rows: int = 4) -> list[int]:
    """Run steps that take `seconds` with so many threads. Returns the threads of each."""
    taken = []
    for _ in range(steps):
        threads = chosen.begin(rows)
        taken.append(threads)
        chosen.note(rows, seconds(threads))
    return taken


@pytest.mark.parametrize(("together", "expected"), [(0.6, 2), (0.98, 1), (1.5, 1)])
def test_more_threads_have_to_be_worth_it(together: float, expected: int) -> None:
    chosen = StepThreads(2, SMALL)
    run(chosen, FIRST_WAIT + TRIAL_STEPS, {1: 1.0, 2: together}.__getitem__)
    assert chosen.begin(4) == expected


def test_fewer_threads_have_to_be_faster() -> None:
    chosen = StepThreads(2, PARALLEL_BYTES)
    assert run(chosen, 1, lambda _: 1.0) == [2]
    run(chosen, FIRST_WAIT + TRIAL_STEPS, {1: 0.9, 2: 1.0}.__getitem__)
    assert chosen.begin(4) == 1


@given(st.sampled_from([2, 3, 4, 6, 16]), st.data())
def test_the_fastest_number_is_found_where_times_fall_towards_it(most: int, data: st.DataObject) -> None:
    options = StepThreads(most, SMALL).options
    assert options[0] == 1
    assert options[-1] == most
    best = data.draw(st.sampled_from(options))

    def seconds(threads: int) -> float:
        return float(1.5 ** abs(options.index(threads) - options.index(best)))

    chosen = StepThreads(most, data.draw(st.sampled_from([SMALL, PARALLEL_BYTES])))
    run(chosen, 500, seconds)
    taken = run(chosen, 4000, seconds)
    assert taken.count(best) > 0.97 * len(taken)


def test_what_has_changed_is_found_by_the_next_trial() -> None:
    chosen = StepThreads(2, SMALL)
    assert run(chosen, 20_000, {1: 1.0, 2: 1.3}.__getitem__)[-1] == 1
    taken = run(chosen, LONGEST_WAIT + 2 * TRIAL_STEPS, {1: 1.0, 2: 0.7}.__getitem__)
    assert taken[-1] == 2


def test_steps_that_become_slower_are_tried_at_once() -> None:
    chosen = StepThreads(2, SMALL)
    run(chosen, 20_000, {1: 1.0, 2: 0.7}.__getitem__)
    beside_a_busy_one = run(chosen, 100, {1: 1.0, 2: 1.8}.__getitem__)
    assert beside_a_busy_one.index(1) <= TRIAL_STEPS
    assert beside_a_busy_one.count(1) > 70
    again = run(chosen, 200, {1: 1.0, 2: 0.7}.__getitem__)
    assert again.count(2) > 100


def test_steps_that_become_slower_with_any_number_are_tried_once() -> None:
    chosen = StepThreads(2, SMALL)
    run(chosen, 20_000, {1: 1.0, 2: 0.7}.__getitem__)
    taken = run(chosen, 1000, {1: 2.0, 2: 1.4}.__getitem__)
    assert taken[-1] == 2
    assert taken.count(1) < 8 * TRIAL_STEPS


def test_a_hopeless_trial_ends_at_once() -> None:
    chosen = StepThreads(2, SMALL)
    taken = run(chosen, FIRST_WAIT + TRIAL_STEPS, {1: 0.003, 2: 0.115}.__getitem__)
    assert taken.count(2) == 2


def test_one_slow_step_decides_nothing() -> None:
    chosen = StepThreads(2, SMALL)
    times = iter([1.0] * FIRST_WAIT + [0.6, 0.6, 1.9, 0.6, 0.6, 0.6])
    run(chosen, FIRST_WAIT + TRIAL_STEPS, lambda _: next(times))
    assert chosen.begin(4) == 2


def test_steps_of_few_and_of_many_rows_are_tried_apart() -> None:
    chosen = StepThreads(2, SMALL)
    run(chosen, 50, {1: 1.0, 2: 0.5}.__getitem__, rows=40)
    run(chosen, 50, {1: 1.0, 2: 2.5}.__getitem__, rows=2)
    assert chosen.begin(33) == chosen.begin(63) == 2
    assert chosen.begin(3) == 1


def test_a_prefill_alone_takes_as_many_as_any_step_does() -> None:
    chosen = StepThreads(2, SMALL)
    assert chosen.begin(0) == 1
    run(chosen, 50, {1: 1.0, 2: 0.5}.__getitem__, rows=40)
    assert chosen.begin(0) == 2
    assert StepThreads(2, PARALLEL_BYTES).begin(0) == 2


def test_one_core_is_never_tried_against_itself() -> None:
    assert set(run(StepThreads(1, SMALL), 3 * FIRST_WAIT, lambda _: 1.0)) == {1}


def test_a_long_prefill_takes_all_cores_and_gives_them_back() -> None:
    set_threads(1)
    with prefill_threads(PARALLEL_TOKENS, 2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1
    with prefill_threads(PARALLEL_TOKENS - 1, 2):
        assert torch.get_num_threads() == 1
