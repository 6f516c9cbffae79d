"""The table of figures that a run ends with, as Markdown, in the order in which they were found."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Figures:
    def __init__(self) -> None:
        self._rows: dict[str, dict[str, str]] = {}
        self._columns: list[str] = []

    def add(self, row: str, column: str, value: str) -> None:
        if column not in self._columns:
            self._columns.append(column)
        self._rows.setdefault(row, {})[column] = value

    def table(self) -> str:
        """Empty while nothing was found."""
        if not self._rows:
            return ""
        lines = [["", *self._columns], ["---"] * (len(self._columns) + 1)]
        lines += [
            [row, *(found.get(column, "") for column in self._columns)] for row, found in self._rows.items()
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
