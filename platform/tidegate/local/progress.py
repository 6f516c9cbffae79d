"""Progress as a person sees it while the platform starts and stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec


class Progress(msgspec.Struct, frozen=True):
    """One slow step and how far it is. `step` is a stable word: files, redis, ray, gateway, source, model,
    stop. `name` tells several of a kind apart (a model's name)."""

    step: str
    state: Literal["running", "done", "failed"]
    message: str
    name: str = ""
    task: str = ""  # of a model
    seconds: float = 0.0  # how long a step that is done took, where it was measured


OnProgress = Callable[[Progress], None]


def quiet(_: Progress) -> None:
    """For who wants none."""


class ProgressFile:
    """Hands progress from a detached host to the command that waits for it: one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def reset(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(b"")
        self._position = 0

    def write(self, progress: Progress) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(progress) + b"\n")

    def read_new(self) -> list[Progress]:
        """Return what was written since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        if not whole:
            return []
        self._position += len(whole) + 1
        return [msgspec.json.decode(line, type=Progress) for line in whole.split(b"\n")]
