"""Chooses how many CPU threads one model operation uses: by trial for decoding steps, by size for a prefill.

A small model may be slower with several threads than with one (handing out an operation costs more than it
saves, and beside other busy processes much more), a large one is faster. Where the border lies depends on the
machine, on how many rows a step has, and on what else runs just now. So it is tried while requests run: no
waking waits for it, and what it finds is never older than the next trial, which comes at once where steps
have become slower than they were at the last one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch

TRIAL_STEPS = 6  # of which the first, that starts threads, does not count
FIRST_WAIT, LONGEST_WAIT = 8, 1024  # steps between two trials
HOPELESS = 2.0  # times as long as before: the trial ends at once
SLOWER = 1.25  # times as long as at the last trial: it is time for the next, as after any change
WORTH = 1.04  # more threads must be faster by this factor: other processes want the cores too
PARALLEL_TOKENS = 128  # of a prefill, from which on its operations are worth handing out whatever the model
PARALLEL_BYTES = 1 << 28  # of weights, from which on a step begins with all threads before any trial


@dataclass(slots=True)
class Tried:
    """What is known of steps with about so many rows. Numbers of threads are places in the options."""

    chosen: int
    rival: int | None = None  # on trial now
    wait: int = FIRST_WAIT  # steps between the last trial and the next
    left: int = FIRST_WAIT
    is_upward: bool = True  # whether the next rival has more threads
    usual: float = math.inf  # seconds of chosen steps at the last trial
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=TRIAL_STEPS))  # seconds of chosen steps
    trial: list[float] = field(default_factory=list)  # seconds of the rival's


class StepThreads:
    """Chooses for each decoding step between 1, 2, 4, ... and `most` threads.

    A trial takes `TRIAL_STEPS` steps. The time to the next one doubles as long as nothing changes, so that in
    the long run it is less than 1 % of the steps that may be slower than they could be.
    """

    def __init__(self, most: int, weights_bytes: int) -> None:
        self.options = sorted({most, *(1 << power for power in range(most.bit_length()))})
        self._first = len(self.options) - 1 if weights_bytes >= PARALLEL_BYTES else 0
        self._tried: dict[int, Tried] = {}  # by the power of two that the rows come to

    def begin(self, rows: int) -> int:
        """Return how many threads the next step with so many rows takes; 0: it begins with a prefill."""
        if not rows:  # a prefill is no smaller than a step
            return self.options[max((each.chosen for each in self._tried.values()), default=self._first)]
        found = self._tried.setdefault(rows.bit_length(), Tried(self._first))
        return self.options[found.chosen if found.rival is None else found.rival]

    def note(self, rows: int, seconds: float) -> None:
        """Take how long the step took that was begun with so many rows."""
        found = self._tried[rows.bit_length()]
        if found.rival is not None:
            found.trial.append(seconds)
            self._judge(found)
            return
        found.recent.append(seconds)
        found.left -= 1
        if len(found.recent) == TRIAL_STEPS and median(found.recent) > SLOWER * found.usual:
            found.left, found.wait, found.is_upward = 0, FIRST_WAIT, False  # what is busy wants a core
        if found.left <= 0 and len(self.options) > 1:
            if not 0 <= (rival := found.chosen + (1 if found.is_upward else -1)) < len(self.options):
                rival = found.chosen + (-1 if found.is_upward else 1)
            found.rival = rival
            found.trial.clear()

    def _judge(self, found: Tried) -> None:
        assert found.rival is not None
        before, (_, *counted) = median(found.recent), found.trial
        if not counted or (len(found.trial) < TRIAL_STEPS and counted[-1] < HOPELESS * before):
            return
        is_more = found.rival > found.chosen
        found.is_upward = is_more
        if median(counted) * (WORTH if is_more else 1.0) < before:
            found.chosen, found.wait = found.rival, FIRST_WAIT
            found.recent = deque(counted, maxlen=TRIAL_STEPS)
            found.usual = median(counted)
        else:
            found.usual = before
            found.is_upward = not is_more
            found.wait = min(2 * found.wait, LONGEST_WAIT)
        found.rival, found.left = None, found.wait


def set_threads(count: int) -> None:
    """Let operations use so many threads; asking is cheaper than setting."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@contextmanager
def prefill_threads(tokens: int, cores: int) -> Iterator[None]:
    """Let a prefill of so many tokens use all `cores`, where it is long enough; 0: it has no say."""
    before = torch.get_num_threads()
    is_raised = tokens >= PARALLEL_TOKENS and before < cores
    if is_raised:
        torch.set_num_threads(cores)
    try:
        yield
    finally:
        if is_raised:
            torch.set_num_threads(before)
