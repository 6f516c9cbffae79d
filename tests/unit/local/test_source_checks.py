"""The answer of the process that looks at a source."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.control.builders import model
from tests.waiting import await_until
from tidegate.control.looks import Question
from tidegate.control.observed import SourceState
from tidegate.local.home import Home
from tidegate.local.source_checks import SourceChecks, read_answer


def test_a_failure_carries_its_reason_and_sentence() -> None:
    found = read_answer(b'{"error": {"reason": "NoSpace", "message": "The disk is full."}}')
    assert found == SourceState("failed", reason="NoSpace", message="The disk is full.")


@pytest.mark.parametrize("output", [b"", b"Traceback", b"[]", b'{"path": "x"}'])
def test_no_answer_is_a_failure(output: bytes) -> None:
    assert read_answer(output).reason == "SourceUnavailable"


NOWHERE = "/nowhere/at/all"


def question(uri: str = NOWHERE) -> Question:
    return Question(model(source={"uri": uri}))


async def test_a_look_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    news = asyncio.Event()
    checks = SourceChecks(home, news.set)
    try:
        checks.begin(question())
        assert checks.states()[NOWHERE].state == "resolving"
        async with asyncio.timeout(60):
            await news.wait()
        assert checks.states()[NOWHERE].reason == "SourceNotFound"
        checks.forget_failures()
        assert checks.states() == {}
    finally:
        await checks.close()


async def test_closing_ends_the_looks(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    checks = SourceChecks(home, lambda: None)
    checks.begin(question())
    await checks.close()
    await await_until(lambda: not checks._tasks)
    assert checks.states()[NOWHERE].state in ("resolving", "failed")


async def test_an_answer_is_kept_while_it_is_asked_for(tmp_path: Path) -> None:
    """Who asks again later wants to know what is there then."""
    home = Home(tmp_path / "home")
    home.make()
    checks = SourceChecks(home, lambda: None)
    checks.begin(question())
    checks.begin(question("/other"))
    try:
        checks.keep([NOWHERE])
        assert checks.states().keys() == {NOWHERE}
    finally:
        await checks.close()
