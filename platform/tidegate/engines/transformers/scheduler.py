"""Decides which requests run: who holds a slot, who joins the batch in the next step, and with whom.

No device and no tensors: a sequence is a length here. A request passes `waiting` (first in, first out), one
step's `schedule`, and `running`, whose order is that of the batch's rows.

What always holds.
- At most `slots` sequences run, whatever was added.
- Whoever waits first joins first, and the first one joins in every step that has a slot, however long its
  prompt: so the n-th in line joins within n such steps.
- Prompts that join in one step have at most `tokens_per_step` tokens together, but for a first one that is
  longer alone.
- In a group that is prefilled together no prompt is padded by more than `PADDING_SHARE` of the longest, or
  `PADDING_TOKENS`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

PADDING_SHARE = 0.25  # of a joint prefill that may be padding
PADDING_TOKENS = 16  # or so many tokens per row, where prompts are short


class Schedulable(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def length(self) -> int:
        """Count the tokens that must be in the KV cache before the next one."""
        ...

    @property
    def needs_all_logits(self) -> bool:
        """True where its prefill cannot be shared with others."""
        ...


S = TypeVar("S", bound=Schedulable)


class Scheduler(Generic[S]):
    def __init__(self, slots: int, tokens_per_step: int) -> None:
        self.waiting: deque[S] = deque()
        self.running: list[S] = []
        self._slots = slots
        self._tokens_per_step = tokens_per_step

    def free_slots(self) -> int:
        return self._slots - len(self.running) - len(self.waiting)

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: S) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[list[S]]:
        """Take those out of the line that join in this step, in groups that are prefilled together. Each
        group `join`s before the next call, or ends without having run."""
        joining: list[S] = []
        budget = self._tokens_per_step
        free = self._slots - len(self.running)
        while self.waiting and len(joining) < free:
            length = self.waiting[0].length
            if joining and length > budget:
                break
            budget -= length
            joining.append(self.waiting.popleft())
        return grouped(joining)

    def join(self, group: Sequence[S]) -> None:
        """Let a group run, as the batch's last rows."""
        self.running += group

    def leave(self, rows: Iterable[int]) -> list[int]:
        """Take rows out. As in the batch, the last row moves into the hole, from the highest hole down.
        Returns for each row that stays where it was."""
        order = list(range(len(self.running)))
        for row in sorted(rows, reverse=True):
            order[row] = order[-1]
            order.pop()
        self.running = [self.running[row] for row in order]
        return order

    def abort(self, request_id: str) -> int | None:
        """Take a request out of the line, or return the row that has to leave."""
        for sequence in self.waiting:
            if sequence.id == request_id:
                self.waiting.remove(sequence)
                return None
        return next((row for row, sequence in enumerate(self.running) if sequence.id == request_id), None)


def grouped(joining: Sequence[S]) -> list[list[S]]:
    """Put prompts of similar length together."""
    groups: list[list[S]] = []
    for sequence in sorted(joining, key=lambda one: one.length):
        group = groups[-1] if groups else None
        if (
            group is None
            or sequence.needs_all_logits
            or group[0].needs_all_logits
            or sequence.length - group[0].length > max(PADDING_TOKENS, PADDING_SHARE * sequence.length)
        ):
            groups.append([sequence])
        else:
            group.append(sequence)
    return groups


def run_width(ready: Sequence[int], longest: int, weights_tokens: int) -> int:
    """Choose how many tokens a step takes of a row at most: as many add most tokens for what the step costs.

    `ready`: tokens of each row that wait to be taken. A step computes as many for each row, and costs
    `weights_tokens` more.
    """
    widths = range(1, min(max(ready), longest) + 1)
    return max(
        widths,
        key=lambda width: sum(min(count, width) for count in ready) / (weights_tokens + len(ready) * width),
    )
