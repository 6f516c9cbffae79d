"""The context that every scenario gets: the options of the command line and where logs go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loadtests.machine import Processes
from loadtests.measure import Target


@dataclass(frozen=True, slots=True)
class Context:
    """`seconds` is the length of one measured window, `rounds` how often baseline and platform alternate.

    `external` is a platform that runs already (`--url`, `--key`): then nothing of it is started or stopped
    and its CPU seconds are only known for process ids that were named.
    """

    folder: Path
    seconds: float
    rounds: int
    external: Target | None = None
    demo_path: str = ""
    short_tokens: int = 1
    tidegate: str = "tidegate"
    profile_seconds: float = 0.0
    nice: int = 0
    alone: bool = False  # nothing else is measured beside the platform, where a scenario can do without

    def processes(self) -> Processes:
        return Processes(self.folder, self.nice)
