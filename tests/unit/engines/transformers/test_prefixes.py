"""The cache against a plain model of it: what is found was kept of the same tokens, and within bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.engines.transformers.prefixes import BLOCK, PrefixCache

HEADS, SIZE = 2, 3
BYTES_PER_TOKEN = 2 * HEADS * SIZE * 4
# Few tokens, so that prompts share what they begin with.
PROMPTS = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=6).map(
    lambda blocks: [token for block in blocks for token in [block] * BLOCK]
)


def row(tokens: list[int], salt: bytes) -> list[torch.Tensor]:
    """Keys and values that tell the tokens before them, as a model's do."""
    before = torch.tensor(tokens).cumsum(0) * 100 + torch.arange(len(tokens)) + (0.5 if salt == b"b" else 0)
    keys = before[None, :, None].expand(HEADS, -1, SIZE).float()
    return [keys, -keys]


def part_of(held: list[torch.Tensor]) -> Callable[[slice], list[torch.Tensor]]:
    return lambda columns: [one[:, columns] for one in held]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), PROMPTS, st.integers(0, BLOCK), st.sampled_from([b"a", b"b"])), max_size=30
    ),
    st.integers(0, 12),
)
def test_what_is_found_is_what_was_kept(
    script: list[tuple[bool, list[int], int, bytes]], blocks: int
) -> None:
    cache = PrefixCache(blocks * BLOCK * BYTES_PER_TOKEN + 1, BYTES_PER_TOKEN)
    kept: set[tuple[bytes, tuple[int, ...]]] = set()
    for is_kept, whole, rest, salt in script:
        tokens = whole + [7] * rest
        if is_kept:
            cache.keep(part_of(row(tokens, salt)), tokens, salt)
            kept |= {(salt, tuple(tokens[:end])) for end in range(BLOCK, len(tokens) + 1, BLOCK)}
            # What has just been kept is there, as far as there is room.
            assert cache.held([*tokens, 9], salt) == min(len(tokens) // BLOCK, blocks) * BLOCK
        held = cache.held(tokens, salt)
        assert held % BLOCK == 0
        assert held < len(tokens)
        if held:
            assert (salt, tuple(tokens[:held])) in kept
            found = [torch.zeros(HEADS, held, SIZE) for _ in range(2)]
            cache.fill(found, tokens[:held], salt)
            for one, expected in zip(found, row(tokens[:held], salt), strict=True):
                assert torch.equal(one, expected)
        assert all(len(pool) == blocks for pool in cache._pools)
    cache.clear()
    assert all(cache.held(tokens, salt) == 0 for _, tokens, _, salt in script)


def test_the_least_recently_used_makes_room_from_its_end() -> None:
    cache = PrefixCache(4 * BLOCK * BYTES_PER_TOKEN, BYTES_PER_TOKEN)
    first, second, third = ([token] * (2 * BLOCK) for token in (1, 2, 3))
    for tokens in (first, second):
        cache.keep(part_of(row(tokens, b"")), tokens, b"")
    cache.fill([torch.zeros(HEADS, 2 * BLOCK, SIZE) for _ in range(2)], first, b"")
    cache.keep(part_of(row(third[:BLOCK], b"")), third[:BLOCK], b"")
    held = [cache.held([*tokens, 0], b"") // BLOCK for tokens in (first, second, third)]
    assert held == [2, 1, 1]
