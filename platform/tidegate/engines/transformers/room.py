"""Counts what rows take of the KV cache's bytes: how many run follows from the tokens that they hold. Pure.

Rows of an arena are padded to the longest of them; rows of a paged pool take whole pages; rows that run one
by one take what they hold.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.sources.facts import CONTEXT_SLACK

USUAL_TOKENS = 256  # with which a request comes, as long as none has shown what is usual here
LEAST_TOKENS = 64  # for which a slot is counted


@dataclass(frozen=True, slots=True)
class Room:
    """`per_row` bytes are beside its tokens: the states of recurrent layers. `page`: a row takes whole pages
    of so many tokens; 0: rows are padded to the longest, with `CONTEXT_SLACK` columns more."""

    bytes: int
    per_token: int
    per_row: int = 0
    page: int = 0

    def of_row(self, tokens: int) -> int:
        """Return what a row takes, padded to so many tokens."""
        held = -(-tokens // self.page) * self.page if self.page else tokens + CONTEXT_SLACK
        return max(1, self.per_row + held * self.per_token)

    def holds(self, rows: Sequence[int]) -> bool:
        """Tell whether there is room for rows of so many tokens, together."""
        return not rows or self._taken(rows) <= self.bytes

    def usage(self, rows: Sequence[int]) -> float:
        """Return what rows of so many tokens take of the whole, 0 to 1."""
        return min(1.0, self._taken(rows) / self.bytes) if rows else 0.0

    def more(self, rows: Sequence[int], usual: int) -> int:
        """Return how many rows of `usual` tokens there is room for beside these; fewer than none where these
        are too many."""
        if self.page:
            return (self.bytes - self._taken(rows)) // self.of_row(usual)
        return self.bytes // self.of_row(max([usual, *rows])) - len(rows)

    def columns(self, rows: int) -> int:
        """Return how many columns so many padded rows may have."""
        left = self.bytes // rows - self.per_row
        if not self.per_token:  # rows that are states alone: a column takes nothing
            return sys.maxsize if left >= 0 else 0
        return max(0, left) // self.per_token

    def _taken(self, rows: Sequence[int]) -> int:
        if self.page:
            return sum(map(self.of_row, rows))
        return len(rows) * self.of_row(max(rows))
