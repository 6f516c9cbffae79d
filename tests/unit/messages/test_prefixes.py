"""Chains: what begins alike has hashes in common, what does not has none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.messages.prefixes import HASH_BYTES, LENGTHS_BYTES, MOST_HASHES, prefix_chain, prefix_salt
from tidegate.messages.work import (
    ChatPrompt,
    Embed,
    Generate,
    Inputs,
    Prompt,
    Sampling,
    TextPrompt,
    TokenPrompt,
)

SAMPLING = Sampling(seed=1)


def hashes(prompt: Prompt, tenant: str = "t", adapter: str = "") -> list[bytes]:
    chain = prefix_chain(prefix_salt(tenant, adapter), Generate(prompt, SAMPLING))
    return [chain[at : at + HASH_BYTES] for at in range(0, len(chain), HASH_BYTES)]


@given(length=st.integers(0, 300_000), more=st.integers(0, 5000), pieces=st.integers(1, 4))
def test_texts_have_in_common_the_hashes_up_to_where_they_differ(length: int, more: int, pieces: int) -> None:
    alike = "ab" * (length // 2)
    one, two = hashes(TextPrompt(alike + "1" * more)), hashes(TextPrompt(alike + "2" * (more + 7 * pieces)))
    within = [size for size in LENGTHS_BYTES if size <= len(alike)]
    lengths_of_one = [size for size in LENGTHS_BYTES if size <= len(alike) + more][-MOST_HASHES:]
    lengths_of_two = [size for size in LENGTHS_BYTES if size <= len(alike) + more + 7 * pieces][-MOST_HASHES:]
    assert (len(one), len(two)) == (len(lengths_of_one), len(lengths_of_two))
    expected = set(within) & set(lengths_of_one) & set(lengths_of_two)
    assert len(set(one) & set(two)) == len(expected)


def test_a_conversation_that_goes_on_begins_with_itself() -> None:
    first = [{"role": "system", "content": "s" * 3000}, {"role": "user", "content": "u" * 1500}]
    more = [{"role": "assistant", "content": "a" * 2000}, {"role": "user", "content": "more"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    one, two = hashes(ChatPrompt(first, tools=tools)), hashes(ChatPrompt([*first, *more], tools=tools))
    assert one[1:] == two[:-1], "one length more is reached, and the shortest is no longer kept"
    assert not set(two) & set(hashes(ChatPrompt([*first, *more])))
    longer = [{"role": "system", "content": "s" * 3000}, {"role": "user", "content": "u" * 1500 + "!"}]
    assert hashes(ChatPrompt(longer, tools=tools)) == one, "a value's length is no part of it"


def test_tenants_and_adapters_share_nothing() -> None:
    prompt = TextPrompt("x" * 5000)
    assert hashes(prompt) == hashes(prompt)
    assert hashes(prompt, "t", "a") == hashes(prompt, "t", "a")
    others = [
        hashes(prompt, *each) for each in [("another",), ("t", "a"), ("t", "b"), ("another", "a"), ("ta",)]
    ]
    assert len({one for each in [hashes(prompt), *others] for one in each}) == 6 * MOST_HASHES


def test_token_ids_begin_alike_too() -> None:
    ids = list(range(1000, 3000))
    one, two = hashes(TokenPrompt(ids)), hashes(TokenPrompt([*ids, 7, 8]))
    assert len(one) == MOST_HASHES and one == two


@pytest.mark.parametrize(
    "prompt",
    [
        TextPrompt("x" * 1023),
        TextPrompt(""),
        TokenPrompt([]),
        ChatPrompt([]),
        ChatPrompt([{"role": "user", "content": "x", "number": 1 << 80}]),
        ChatPrompt([{"role": "user", "content": "\ud800" * 2000}]),
    ],
    ids=["short", "empty", "no ids", "no messages", "a huge number", "half of pairs"],
)
def test_some_have_none(prompt: Prompt) -> None:
    assert hashes(prompt) == []


def test_half_a_pair_in_a_text_is_a_beginning_as_well() -> None:
    assert len(hashes(TextPrompt("\ud800" * 2000))) == MOST_HASHES


def test_what_is_not_generated_from_has_none() -> None:
    assert prefix_chain(b"t", Embed(Inputs([TextPrompt("x" * 5000)]))) == b""


def test_of_a_long_prompt_the_longest_are_kept() -> None:
    shorter, longer = (hashes(TextPrompt("x" * size)) for size in (LENGTHS_BYTES[4], LENGTHS_BYTES[-1]))
    assert len(longer) == MOST_HASHES and not set(shorter) & set(longer)
    assert hashes(TextPrompt("x" * 2 * LENGTHS_BYTES[-1])) == longer
