"""Chooses how many tokens of prompts a step takes beside the rows that decode.

Whoever decodes waits for the prompts that join in the same step. How long that is depends on model, machine
and neighbours, so it is measured: what prompts took of a step, or, where one pass computes both or a device
works behind the host, what the step took longer than one of about as many rows without prompts. From one step
to the next the number of tokens follows, until that is `SHARE` of a step without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

SHARE = 1.25  # of a step without prompts, that prompts may take: a running row waits 2.25 times as long
MOST_SHARE = 1.75  # of it, before there are fewer tokens than cost hardly more than one
FEWEST_CHANGE, MOST_CHANGE = 0.5, 2.0  # factors in one step: something else may have held it up
SMALLEST_BURST = 8  # times as many tokens as cost hardly more than one: of fewer each costs more
FRESH_STEPS = 8  # after which a row that has joined counts as one that was there before
WEIGHT = 0.2  # of a new measurement in the average
LATELY = 32  # steps, after which one tells prompts apart again


class Pace:
    """`fewest` tokens cost hardly more than one, unless many are before them. `most` bound a step for which
    nobody waits."""

    def __init__(self, fewest: int, most: int) -> None:
        self._fewest, self._most = min(fewest, most), most
        self._least = max(1, self._fewest // 8)
        self._tokens = min(4.0 * fewest, most)  # until there is something to go by
        # Of a step without prompts, on average, by the power of two that its rows come to.
        self._plain_seconds: dict[int, float] = {}
        self._untold: dict[int, int] = {}  # steps since then, by the same
        self._joined: deque[int] = deque(maxlen=FRESH_STEPS)  # rows, by steps

    def budget(self, joining: Sequence[int], running: int) -> int:
        """Return how many tokens of prompts the next step may take, where so many `joining` have to be
        prefilled of each request in line: more where more requests wait for their first token than for the
        next one. So a burst of short prompts joins soon, and one long prompt as those that run can bear.

        Of a burst that one step could take half joins first: their first tokens need not wait for the others'
        prompts. Those who have just joined do not hold up the rest of it.
        """
        is_burst = len(joining) > 1 and sum(joining) <= self._most
        waits = running - sum(self._joined) if is_burst else running
        wanted = self._most
        if waits > 0:
            wanted = min(wanted, int(self._tokens * max(1.0, len(joining) / waits)))
        if is_burst:
            wanted = min(wanted, max(joining[0], sum(joining) // 2, SMALLEST_BURST * self._fewest))
        return wanted

    def joined(self, rows: int) -> None:
        """Take how many rows joined in a step."""
        self._joined.append(rows)

    def knows(self, rows: int) -> bool:
        """Tell whether it was measured lately what a step of about so many rows takes without prompts."""
        size = rows.bit_length()
        return size in self._plain_seconds and self._untold[size] < LATELY

    def note(self, rows: int, seconds: float, tokens: int, prompt_seconds: float | None = None) -> None:
        """Learn from a step in which so many rows decoded, and `tokens` of prompts joined, which took
        `prompt_seconds` of it where that can be told."""
        size = rows.bit_length()
        if not tokens or prompt_seconds is not None:
            own = seconds - (prompt_seconds or 0.0)
            known = self._plain_seconds.get(size) or own
            self._plain_seconds[size] = known + WEIGHT * (min(own, MOST_CHANGE * known) - known)
            self._untold[size] = 0
        else:
            own = self._plain_seconds.get(size, 0.0)
            self._untold[size] = self._untold.get(size, 0) + 1
        if not tokens or own <= 0:
            return
        # A burst may take more.
        relative = own * max(1.0, tokens / self._tokens) / max(seconds - own, 1e-9)
        wanted = self._tokens * max(FEWEST_CHANGE, min(MOST_CHANGE, SHARE * relative))
        if wanted < self._fewest:
            factor = max(FEWEST_CHANGE, min(MOST_CHANGE, MOST_SHARE * relative))
            wanted = min(self._fewest, self._tokens * factor)
        # A few tokens that cost little say nothing of many.
        if wanted < self._tokens or 2 * tokens > self._tokens:
            self._tokens = max(self._least, min(self._most, wanted))
