"""How long things took in the test cluster: noted by tests, judged by none, shown at the end of a run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FILE_VARIABLE = "TIDEGATE_CLUSTER_FIGURES"


class Figures:
    def __init__(self) -> None:
        self._noted: dict[str, dict[str, Any]] = {}

    def note(self, what: str, **figures: Any) -> None:
        self._noted.setdefault(what, {}).update(
            {name.replace("_", " "): value for name, value in figures.items()}
        )

    @contextmanager
    def seconds(self, what: str, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.note(what, **{name: f"{time.monotonic() - begun:.1f} s"})

    def table(self) -> list[str]:
        return [
            f"{what}: " + ", ".join(f"{name} {value}" for name, value in figures.items())
            for what, figures in self._noted.items()
        ]

    def show(self, terminal: pytest.TerminalReporter, environment: Mapping[str, str] = os.environ) -> None:
        """Print them; write them where TIDEGATE_CLUSTER_FIGURES says."""
        if not self._noted:
            return
        terminal.section("how long it took here")
        for line in self.table():
            terminal.write_line(line)
        if file := environment.get(FILE_VARIABLE):
            Path(file).write_text(json.dumps(self._noted, indent=2), encoding="utf-8")
