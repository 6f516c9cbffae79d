from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.transformers.pace import FRESH_STEPS, LATELY, SHARE, Pace


def settled(pace: Pace, seconds: Callable[[int], float]) -> int:
    """Let steps take what `seconds` says of their prompt tokens, until the budget has settled."""
    pace.note(1, seconds(0), 0)
    for _ in range(40):
        budget = pace.budget([5000], 1)
        pace.note(1, seconds(budget), budget)
    return budget


@pytest.mark.parametrize("seconds_per_token", [1e-2, 1e-3, 1e-4])
def test_prompts_take_their_share_of_a_step(seconds_per_token: float) -> None:
    budget = settled(Pace(1, 4096), lambda tokens: 0.1 + seconds_per_token * tokens)
    assert budget * seconds_per_token == pytest.approx(SHARE * 0.1, rel=0.1)


@pytest.mark.parametrize(("seconds_per_token", "expected"), [(1.0, 2), (1e-9, 4096)])
def test_the_budget_keeps_to_its_bounds(seconds_per_token: float, expected: int) -> None:
    assert settled(Pace(16, 4096), lambda tokens: 0.1 + seconds_per_token * tokens) == expected


def test_what_a_forward_pass_costs_by_itself_does_not_make_prompts_crawl() -> None:
    assert settled(Pace(16, 4096), lambda tokens: 0.1 + (0.15 if tokens else 0)) == 16


def test_a_running_row_waits_at_most_three_times_as_long() -> None:
    budget = settled(Pace(16, 4096), lambda tokens: 0.1 + 0.02 * tokens)
    assert 0.1 + 0.02 * budget < 0.3


def test_a_step_for_which_nobody_waits_takes_most() -> None:
    pace = Pace(16, 4096)
    settled(pace, lambda tokens: 0.1 + tokens)
    assert pace.budget([5000], 0) == 4096


def test_a_few_tokens_that_cost_little_say_nothing_of_many() -> None:
    pace = Pace(16, 4096)
    budget = settled(pace, lambda tokens: 0.1 + 1e-3 * tokens)
    for _ in range(40):
        pace.note(1, 0.101, 1)
    assert pace.budget([5000], 1) == budget


def test_one_step_that_was_held_up_changes_little() -> None:
    pace = Pace(16, 4096)
    before = settled(pace, lambda tokens: 0.1 + 1e-3 * tokens)
    pace.note(1, 60.0, 0)
    pace.note(1, 60.0, before)
    assert pace.budget([5000], 1) >= before // 2
    after = [settled(pace, lambda tokens: 0.1 + 1e-3 * tokens) for _ in range(9)]
    assert after[-1] == pytest.approx(before, rel=0.1)


@given(
    st.integers(1, 300),
    st.integers(1, 5000),
    st.lists(
        st.tuples(st.integers(0, 256), st.floats(0, 1e3), st.integers(0, 5000), st.booleans()), max_size=50
    ),
)
def test_whatever_is_measured_a_step_goes_on_and_has_a_bound(
    fewest: int, most: int, steps: list[tuple[int, float, int, bool]]
) -> None:
    pace = Pace(fewest, most)
    for rows, seconds, tokens, is_told in steps:
        pace.note(rows, seconds, tokens, seconds / 2 if is_told else None)
        assert 1 <= pace.budget([5000], 1) <= most


def test_a_burst_may_take_as_many_times_more_as_more_wait_to_join_than_run() -> None:
    pace = Pace(16, 4096)
    alone = pace.budget([1000], 8)
    assert pace.budget([1000] * 8, 8) == alone
    assert pace.budget([1000] * 32, 8) == 4 * alone
    assert pace.budget([1000] * 64, 1) == 4096


def test_half_of_a_burst_joins_first() -> None:
    pace = Pace(16, 4096)
    assert pace.budget([40] * 64, 0) == 32 * 40
    assert pace.budget([40] * 3, 0) == 128, "of fewer each would cost more"
    assert pace.budget([1000, 40, 40], 0) == 1000, "who is the first in line is not cut up for it"
    assert pace.budget([5000, 40], 0) == 4096, "more than a step could take"


def test_rows_of_a_burst_do_not_hold_up_the_rest_of_it() -> None:
    pace = Pace(16, 4096)
    ordinary = pace.budget([40], 32)
    assert pace.budget([40] * 32, 32) == ordinary
    pace.joined(32)
    assert pace.budget([40] * 32, 32) == 16 * 40 > ordinary
    assert pace.budget([4000] * 32, 32) == ordinary, "long prompts go on as ever"
    assert pace.budget([40] * 32, 64) == ordinary, "who ran before counts"
    for _ in range(FRESH_STEPS):
        pace.joined(0)
    assert pace.budget([40] * 32, 32) == ordinary, "in the end they ran before, too"


def test_steps_of_more_rows_are_not_taken_for_prompts_that_cost_much() -> None:
    """A step of many rows takes longer than one of few: what is known of these says nothing of those."""
    pace = Pace(16, 4096)
    before = settled(pace, lambda tokens: 0.01 + 1e-4 * tokens)
    for rows in range(8, 64):
        pace.note(rows, 0.001 * rows + 1e-4 * 32, 32)
    assert pace.budget([5000], 1) >= before // 2


@pytest.mark.parametrize("rows", [1, 60])
def test_what_prompts_took_is_told_apart_where_it_can_be(rows: int) -> None:
    pace = Pace(1, 4096)
    pace.note(1, 0.001, 0)
    for _ in range(40):
        budget = pace.budget([5000], 1)
        pace.note(rows, 0.1 + 1e-3 * budget, budget, 1e-3 * budget)
    assert 1e-3 * budget == pytest.approx(SHARE * 0.1, rel=0.1)


def test_what_a_step_takes_without_prompts_is_measured_again_in_time() -> None:
    """However long prompts go on to come: such a step is then told apart, for its number of rows."""
    pace = Pace(16, 4096)
    assert not pace.knows(8)
    pace.note(8, 0.01, 0)
    assert pace.knows(9) and not pace.knows(16)
    for _ in range(LATELY):
        assert pace.knows(8)
        pace.note(8, 0.03, 32)
    assert not pace.knows(8)
    pace.note(8, 0.08, 32, 0.04)
    assert pace.knows(8)
