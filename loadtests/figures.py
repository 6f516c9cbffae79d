"""Figures, what the issue asks of them, and the small statistics between. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Goal:
    """The bounds of a figure: it must reach `must` and should reach `aim` (None: there is only a must)."""

    better: Better
    must: float
    aim: float | None = None

    def verdict(self, value: float | None) -> str:
        """ "aim met", "must met", "NOT met", or "not measured"."""
        if value is None or math.isnan(value):
            return "not measured"
        if self.aim is not None and self._reaches(value, self.aim):
            return "aim met"
        return "must met" if self._reaches(value, self.must) else "NOT met"

    def _reaches(self, value: float, bound: float) -> bool:
        return value >= bound if self.better == "higher" else value <= bound


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. Without a goal it is there to be read, not judged."""

    name: str
    value: float | None
    unit: str = ""
    goal: Goal | None = None
    digits: int = 2

    def shown(self) -> str:
        if self.value is None or math.isnan(self.value):
            return "–"
        return f"{self.value:.{self.digits}f}" + (f" {self.unit}" if self.unit else "")


@dataclass(slots=True)
class Section:
    """The findings of one scenario: judged figures, tables to read, remarks."""

    scenario: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[max(0, rank - 1)]


def middle(values: Sequence[float]) -> float:
    """Median; NaN of nothing."""
    return median(values) if values else math.nan


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def spread(values: Sequence[float], digits: int = 3) -> str:
    """All rounds in one cell: how far they lie apart is part of the answer."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def company(cores: Sequence[float]) -> str:
    """The other load of the machine: figures of a busy one say little about tails."""
    return (
        f"Processes outside the test took {middle(cores):.2f} cores meanwhile (rounds: {spread(cores, 2)})."
        if cores
        else "What else ran on the machine is not known."
    )
