"""The tables of figures that a run ends with, as Markdown, in the order in which they were found."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Figures:
    """A table for each `of`, which is the head of its first column."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, dict[str, str]]] = {}

    def add(self, row: str, column: str, value: str, of: str = "") -> None:
        self._tables.setdefault(of, {}).setdefault(row, {})[column] = value

    def table(self) -> str:
        """Empty while nothing was found."""
        return "\n\n".join(_table(of, rows) for of, rows in self._tables.items())


def _table(of: str, rows: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for found in rows.values() for column in found))
    lines = [[of, *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(found.get(column, "") for column in columns)] for row, found in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
