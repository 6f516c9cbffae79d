"""The last lines of log files, and those that follow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

MOST_TAIL_BYTES = 8 * 1024 * 1024  # what is looked at for the last lines of one file

Files = Callable[[], Mapping[Path, str]]  # each file with the name of who writes it


class Tail:
    """Reads lines of files as they grow. A file that was replaced or cut is read from its start again."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._rest: dict[Path, bytes] = {}

    def last_lines(self, path: Path, count: int) -> list[str]:
        """The last `count` whole lines; reading goes on after them."""
        file = self._opened(path)
        if file is None:
            return []
        size = path.stat().st_size
        file.seek(max(0, size - MOST_TAIL_BYTES))
        lines = self._lines(path, file)
        return lines[-count:] if count else []

    def new_lines(self, path: Path) -> list[str]:
        file = self._opened(path)
        return [] if file is None else self._lines(path, file)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _opened(self, path: Path) -> BinaryIO | None:
        file = self._files.get(path)
        try:
            now = path.stat()
        except FileNotFoundError:
            return None
        if file is not None:
            mine = os.fstat(file.fileno())
            if (mine.st_dev, mine.st_ino) == (now.st_dev, now.st_ino) and now.st_size >= file.tell():
                return file
            file.close()
        self._rest.pop(path, None)
        self._files[path] = path.open("rb")
        return self._files[path]

    def _lines(self, path: Path, file: BinaryIO) -> list[str]:
        *whole, rest = (self._rest.pop(path, b"") + file.read()).split(b"\n")
        if rest:
            self._rest[path] = rest
        return [line.decode(errors="replace") for line in whole]


def read_logs(files: Files, folders: list[Path], lines: int, follow: bool) -> Iterator[tuple[str, str]]:
    """(writer, line) of the last lines of each file, then of every line that is added while `follow`."""
    tail = Tail()
    try:
        for path, writer in files().items():
            for line in tail.last_lines(path, lines):
                yield writer, line
        if not follow:
            return
        import watchfiles

        for _ in watchfiles.watch(*folders, watch_filter=None, debounce=200, step=50, raise_interrupt=True):
            for path, writer in files().items():
                for line in tail.new_lines(path):
                    yield writer, line
    finally:
        tail.close()
