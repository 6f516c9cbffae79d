from __future__ import annotations

import asyncio

import pytest

from tidegate.tasks import end_tasks


async def test_tasks_are_over_when_it_returns() -> None:
    is_cleaned_up = asyncio.Event()
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            is_cleaned_up.set()

    async def fail() -> None:
        raise ValueError("its own")

    running, failed = asyncio.create_task(work()), asyncio.create_task(fail())
    await started.wait()
    await asyncio.wait({failed})
    await end_tasks(running, None, failed)
    assert running.cancelled()
    assert is_cleaned_up.is_set()
    assert isinstance(failed.exception(), ValueError)  # left to who asks for it
    await end_tasks()


async def test_the_callers_own_cancellation_is_not_swallowed() -> None:
    stubborn_may_end = asyncio.Event()
    asked = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            asked.set()
            await stubborn_may_end.wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    ending = asyncio.create_task(end_tasks(task))
    await asked.wait()
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    stubborn_may_end.set()
    await task
