"""Looks at model sources, each in a process of its own, and keeps what they found while it is asked for.

A failure is forgotten after a while, so that the next round of the control loop asks again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable, Collection, Mapping, Sequence

from tidegate.control import source_answer
from tidegate.control.looks import Question
from tidegate.control.observed import SourceState
from tidegate.local import processes
from tidegate.local.home import Home
from tidegate.tasks import end_tasks

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
MAX_AT_ONCE = 2


class SourceChecks:
    """`changed` is called when a source is resolved, or failed to be."""

    def __init__(self, home: Home, changed: Callable[[], None]) -> None:
        self._home = home
        self._changed = changed
        self._states: dict[str, SourceState] = {}
        self._failed_at: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MAX_AT_ONCE)

    def states(self) -> Mapping[str, SourceState]:
        """Return what is known, by `Question.identity`."""
        now = time.monotonic()
        for name, at in list(self._failed_at.items()):
            if now >= at + RETRY_SECONDS:
                self.forget(name)
        return dict(self._states)

    def keep(self, asked: Collection[str]) -> None:
        """Forget the answers to all other questions: who asks again wants to know what is there then."""
        self._states = {name: state for name, state in self._states.items() if name in asked}

    def forget(self, name: str) -> None:
        """Look again, as after a person changed something."""
        self._failed_at.pop(name, None)
        if name in self._states and self._states[name].state == "failed":
            del self._states[name]

    def forget_failures(self) -> None:
        for name in list(self._failed_at):
            self.forget(name)

    def begin(self, question: Question) -> None:
        name = question.identity
        if name in self._states:
            return
        self._states[name] = SourceState("resolving")
        task = asyncio.create_task(self._check(name, question.arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        await end_tasks(*self._tasks)

    async def _check(self, name: str, arguments: Sequence[str]) -> None:
        async with self._room:
            state = await self._resolve(arguments)
        if name in self._states:
            self._states[name] = state
        if state.state == "failed":
            self._failed_at[name] = time.monotonic()
            log.warning("source %s: %s: %s", arguments[0], state.reason, state.message)
        self._changed()

    async def _resolve(self, arguments: Sequence[str]) -> SourceState:
        child = await processes.start(
            "source",
            [sys.executable, "-m", "tidegate.sources", "resolve", *arguments],
            instance=self._home.instance,
            log=self._home.logs / "sources.log",
            environment=os.environ,
            stdout=PIPE,
        )
        try:
            output, _ = await child.communicate()
        except asyncio.CancelledError:
            await processes.stop(child, grace_seconds=0.2)
            raise
        return read_answer(output)


def read_answer(output: bytes) -> SourceState:
    """Read what `python -m tidegate.sources resolve` printed."""
    return source_answer.read_answer(output.decode(errors="replace")) or SourceState(
        "failed",
        reason="SourceUnavailable",
        message="The look at the source ended without an answer; logs/sources.log says why.",
    )
