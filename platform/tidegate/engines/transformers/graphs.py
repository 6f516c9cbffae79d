"""Decoding steps that a GPU replays as one graph, instead of being told each of a thousand operations.

A graph does the same on the same memory. So it is captured for a number of rows, 1, 2, 4, ..., on buffers
that every step fills: tokens, positions, how much each row sees and where it writes. Rows behind those that
run are padding: what they compute is not read, and what they write lies in a page that is nobody's. The table
of pages is the pool's own memory, which it changes in place.

What captures is given (`Capture`), so that all but the capturing itself is the same on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from tidegate.engines.base import is_out_of_memory
from tidegate.engines.transformers.decoder_step import DecoderStep
from tidegate.engines.transformers.kv import Arena
from tidegate.engines.transformers.paged import PagedPool

log = logging.getLogger(__name__)

WARM_UPS = 2  # what is compiled or set up at a first run must not be captured

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""From what computes on buffers: what does so again, and where its result is then."""


def cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph.replay, found


class Buffers:
    """What a step of so many rows is computed from. Filled with padding."""

    def __init__(self, rows: int, pool: PagedPool, device: torch.device) -> None:
        self._padding = pool.padding
        self.tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.positions = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.seen = torch.ones(rows, dtype=torch.int32, device=device)
        self.written = torch.full((rows,), pool.padding, dtype=torch.long, device=device)

    def fill(self, tokens: Tensor, positions: Tensor, pool: PagedPool) -> None:
        """Take a step that the pool has begun."""
        rows = len(tokens)
        self.tokens[:rows], self.positions[:rows] = tokens, positions
        self.seen[:rows], self.written[:rows] = pool.seen, pool.written
        self.tokens[rows:], self.positions[rows:] = 0, 0
        self.seen[rows:], self.written[rows:] = 1, self._padding


class GraphedStep:
    """Does what a `DecoderStep` does, replaying those of one token a row where the pool has a kernel."""

    def __init__(self, step: DecoderStep, most_rows: int, capture: Capture) -> None:
        self._step = step
        self._most = most_rows
        self._capture = capture
        self._captured: dict[int, tuple[Buffers, Callable[[], None], Tensor]] = {}
        self._is_off = False

    def __call__(
        self, tokens: Tensor, positions: Tensor, seen: Tensor, arena: Arena | PagedPool, last: int = 1
    ) -> Tensor:
        """See `DecoderStep`."""
        rows, width = tokens.shape
        if width == 1 and not self._is_off and self._step.has_kernel(arena):
            try:
                buffers, replay, logits = self._of(rows, arena, tokens.device)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                log.warning("a decoding step cannot be captured, so each operation is launched: %s", error)
                self._is_off = True
            else:
                buffers.fill(tokens, positions, arena)
                replay()
                return logits[:rows].clone()  # the next step computes it in the same place
        return self._step(tokens, positions, seen, arena, last)

    def _of(
        self, rows: int, pool: PagedPool, device: torch.device
    ) -> tuple[Buffers, Callable[[], None], Tensor]:
        """Return what a step of so many rows is replayed by; captured when it is first asked for."""
        size = min(1 << (rows - 1).bit_length(), self._most)
        if size not in self._captured:
            buffers = Buffers(size, pool, device)

            def run() -> Tensor:
                with pool.held_still(buffers.seen, buffers.written):
                    return self._step(buffers.tokens, buffers.positions, buffers.seen, pool)

            self._captured[size] = (buffers, *self._capture(run))
        return self._captured[size]
