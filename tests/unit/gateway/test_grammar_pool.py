"""The process that checks forms of answers: each form once, nobody shut out, and what it does not survive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.waiting import await_until
from tidegate.errors import GenerationFailed, QueueFull
from tidegate.gateway.constraints import Constraint
from tidegate.gateway.grammar_pool import MOST_OF_A_KEY, GrammarPool, _size


def of_text(text: str) -> Constraint:
    return Constraint("json", {"const": text}, "field")


@pytest.fixture
async def pool() -> AsyncIterator[GrammarPool]:
    pool = GrammarPool()
    yield pool
    await pool.close()


async def test_calls_that_come_together_have_a_form_checked_once(pool: GrammarPool) -> None:
    found = await asyncio.gather(*[pool.grammar(of_text("a"), f"key{at}") for at in range(8)])
    assert all(checked is found[0] for checked in found)
    assert pool._known_bytes == _size(found[0])


async def test_a_key_takes_its_own_places_in_the_line(pool: GrammarPool) -> None:
    async with pool._turn:
        ours = [asyncio.create_task(pool.grammar(of_text(str(at)), "ours")) for at in range(MOST_OF_A_KEY)]
        await await_until(lambda: pool._waiting["ours"] == MOST_OF_A_KEY)
        with pytest.raises(QueueFull):
            await pool.grammar(of_text("one more"), "ours")
        stranger = asyncio.create_task(pool.grammar(of_text("strange"), "stranger"))
        await await_until(lambda: pool._waiting["stranger"] == 1)
    assert (await stranger).grammar
    assert all(checked.grammar for checked in await asyncio.gather(*ours))
    assert not pool._waiting


async def test_a_process_that_died_is_no_fault_of_the_next_form(pool: GrammarPool) -> None:
    await pool.grammar(of_text("a"), "key")
    assert pool._process is not None
    pool._process.kill()
    await pool._process.wait()
    assert (await pool.grammar(of_text("b"), "key")).grammar


async def test_a_check_that_broke_off_says_nothing_of_the_form(pool: GrammarPool) -> None:
    await pool.grammar(of_text("a"), "key")
    process = pool._process
    assert process is not None and process.stdout is not None
    process.stdout.feed_eof()  # as where it ends in the middle
    with pytest.raises(GenerationFailed):
        await pool.grammar(of_text("b"), "key")
    assert (await pool.grammar(of_text("b"), "key")).grammar


async def test_numbers_of_any_size(pool: GrammarPool) -> None:
    schema = {"type": "integer", "maximum": 10**30}
    assert "1e30" in (await pool.grammar(Constraint("json", schema, "field"), "key")).grammar
