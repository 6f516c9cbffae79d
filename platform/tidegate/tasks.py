"""Ends tasks of the event loop."""

from __future__ import annotations

import asyncio
from typing import Any


async def end_tasks(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel these tasks and wait until they are over. What they end with is left in them: a failure that
    nobody asks for is logged by the event loop. The caller's own cancellation is not taken for theirs."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
