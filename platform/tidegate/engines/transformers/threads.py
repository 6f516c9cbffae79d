"""Chooses how many CPU threads one model operation uses: by trial for a decoding step, by size for a prefill.

A small model is slower with several threads than with one (handing out an operation costs more than it
saves, and beside other busy processes much more), a large one is faster. Where the border lies depends on
the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tidegate.engines.transformers.batch import Batch

TRIAL_ROWS = 8
TRIAL_PROMPT = 8  # tokens
FEWEST_STEPS, MOST_STEPS = 2, 24
TRIAL_SECONDS = 0.1  # per trial, where steps are slow: it is a part of every waking
PARALLEL_TOKENS = 128  # of a prefill, from which on its operations are worth handing out whatever the model
WORTH = 1.25  # more threads must be faster by this factor: other processes want the cores too


def choose_threads(batch: Batch, cores: int, most_rows: int) -> int:
    """Try 1 and `cores`, and set the process to whichever decodes faster. `batch` must be empty."""
    if cores == 1:
        torch.set_num_threads(1)
        return 1
    rows = min(TRIAL_ROWS, most_rows)
    prompts = [[0] * TRIAL_PROMPT for _ in range(rows)]
    logits = batch.join(prompts, sources=prompts)
    tokens = torch.zeros(rows, dtype=torch.long, device=logits.device)

    def step() -> None:
        batch.decode(tokens)

    torch.set_num_threads(1)
    alone = step_seconds(step)
    torch.set_num_threads(cores)
    together = step_seconds(step)
    for row in reversed(range(rows)):
        batch.leave(row)
    threads = cores if together * WORTH < alone else 1
    torch.set_num_threads(threads)
    return threads


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


def step_seconds(step: Callable[[], None]) -> float:
    """Take the fastest of a few steps: what else runs on the machine only ever slows one down."""
    step()  # the first after a change of threads starts them
    fastest, begin = float("inf"), time.perf_counter()
    for count in range(1, MOST_STEPS + 1):
        start = time.perf_counter()
        step()
        end = time.perf_counter()
        fastest = min(fastest, end - start)
        if count >= FEWEST_STEPS and end - begin > TRIAL_SECONDS:
            break
    return fastest
