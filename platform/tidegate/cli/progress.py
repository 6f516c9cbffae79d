"""Progress of slow steps for the person who waits: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tidegate.cli.output import printable, say, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.status import Status

    from tidegate.local.progress import Progress as Report

MARKS = {"running": "…", "done": "✓", "failed": "✗"}


class Steps:
    """Steps that begin and end. On a terminal the ones under way are named on one live line, except where
    log lines share the screen (`plain`)."""

    def __init__(self, *, plain: bool = False) -> None:
        self._is_plain = plain or not sys.stderr.isatty()
        self._began = time.monotonic()
        self._under_way: dict[str, str] = {}
        self._live: Status | None = None

    def __enter__(self) -> Self:
        if not self._is_plain:
            from rich.console import Console

            self._live = Console(stderr=True, highlight=False).status("")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Report) -> None:
        key = progress.name or progress.step
        text = f"{progress.name}: {progress.message}" if progress.name else progress.message
        if progress.state == "running":
            if self._live is None and key not in self._under_way:
                self._print(MARKS["running"], text)
            self._under_way[key] = text
        else:
            self._under_way.pop(key, None)
            self._print(MARKS[progress.state], text)
        if self._live is not None:
            self._live.update(" ".join(self._under_way.values()))

    def _print(self, mark: str, text: str) -> None:
        line = f"{time.monotonic() - self._began:6.1f} s  {mark} {text}"
        if self._live is None:
            say(line)
        else:
            self._live.console.print(printable(line), markup=False, soft_wrap=True)


class Transfers:
    """One bar per file on a terminal, a line per finished file elsewhere."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._done: set[str] = set()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                console=Console(stderr=True),
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def moved(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """`total_bytes` 0: not known."""
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total_bytes or None)
            self._bars.update(self._tasks[name], completed=done_bytes, total=total_bytes or None)
        elif total_bytes and done_bytes >= total_bytes and name not in self._done:
            self._done.add(name)
            say(f"  ✓ {name}: {size(total_bytes)}")
