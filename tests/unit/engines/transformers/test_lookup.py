from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.transformers.lookup import LONGEST, SEEN, SHORTEST, Lookup, lookup_width

NUMBERS = st.one_of(st.integers(0, 3), st.sampled_from([0x0101, 0x01010101, 0x00010100]))
TOKENS = st.lists(NUMBERS, max_size=40)


def plainly(tokens: list[int], most: int) -> list[int]:
    """What the lookup is to find, one place after the other."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for begin in range(len(tokens) - length - 1, -1, -1):
            if tokens[begin : begin + length] == tokens[-length:]:
                said = list(tokens)
                for place in range(most):
                    said.append(said[begin + length + place])
                return said[len(tokens) :]
    return []


@given(TOKENS, st.integers(1, 12))
def test_it_proposes_what_followed_the_last_time(tokens: list[int], most: int) -> None:
    found = Lookup(tokens)
    assert found.propose(most) == plainly(tokens, most)
    for token in tokens:
        found.add(token)
    assert found.propose(most) == plainly(tokens * 2, most)


def test_it_looks_through_the_last_tokens_alone() -> None:
    found = Lookup([1, 2, 3, 4, 5, *range(10, SEEN + 20)])
    for token in (1, 2, 3):
        found.add(token)
    assert found.propose(2) == []
    for token in range(3 * SEEN):
        found.add(token)
    assert len(found._seen) <= 8 * SEEN + 4
    for token in (3 * SEEN - 3, 3 * SEEN - 2):
        found.add(token)
    assert found.propose(1) == [3 * SEEN - 1]


def test_what_fails_is_tried_less_and_later_again() -> None:
    found = Lookup([])
    assert lookup_width([8], [found.rate], 99, 16) == 5
    for _ in range(8):
        found.note(8, 0)
    assert lookup_width([8] * 4, [found.rate] * 4, 99, 16) == 1
    for _ in range(200):
        found.note(0, 0)
    assert lookup_width([8] * 4, [found.rate] * 4, 99, 16) > 1
    for _ in range(20):
        found.note(8, 8)
    assert found.rate > 0.95


def test_a_step_is_no_wider_than_it_gains() -> None:
    assert lookup_width([8] + [0] * 63, [0.95] + [0.0] * 63, 99, 16) == 1
    assert lookup_width([4] * 3, [0.9] * 3, 3, 16) == 3
    assert lookup_width([0, 0], [0.9, 0.9], 9, 16) == 1
    assert lookup_width([3, 0], [0.99, 0.0], 9, 256) == 4
