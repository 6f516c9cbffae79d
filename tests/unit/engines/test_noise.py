from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.noise import uniform, uniforms

seeds = st.integers(-(2**63), 2**64)


@given(seeds, st.integers(0, 1 << 20))
def test_it_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    value = uniform(seed, position)
    assert 0 <= value < 1
    assert uniform(seed, position) == value


@given(st.integers(0, 2**63), st.integers(0, 1000))
def test_neighbours_do_not_resemble_each_other(seed: int, position: int) -> None:
    here = uniform(seed, position)
    assert here != uniform(seed, position + 1)
    assert here != uniform(seed + 1, position)


@given(st.lists(st.tuples(seeds, st.integers(0, 1 << 40)), max_size=100))
def test_many_at_once_are_those_of_each(requests: list[tuple[int, int]]) -> None:
    found = uniforms([seed for seed, _ in requests], [position for _, position in requests])
    assert found == [uniform(seed, position) for seed, position in requests]


def test_it_is_uniform() -> None:
    """Each tenth of the range gets its share: 10,000 +- 5 standard deviations (95 each)."""
    counts = [0] * 10
    for seed in range(100):
        for position in range(1000):
            counts[int(uniform(seed, position) * 10)] += 1
    assert all(abs(count - 10_000) < 475 for count in counts)
