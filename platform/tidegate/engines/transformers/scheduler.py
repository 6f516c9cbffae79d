"""Decides which requests run: who holds a slot, who joins the batch in the next step, and with whom.

No device and no tensors: a sequence is a length here. A request passes `waiting` (first in, first out), one
step's `schedule`, and `running`, whose order is that of the batch's rows. In between a prompt longer than the
budget of a step is `staged`: each step prefills a part of it, and it joins with the last one.

How many run follows from the tokens that they hold (`room`). Who joins finds room for itself and for
`HEADROOM` more tokens of everybody. Where those that run grow beyond it, the youngest is given back to the
queue with what it has said; so is who waits behind one that finds no room, as another replica may have some.

What always holds.
- At most `slots` sequences run or are staged, whatever was added.
- Once `beyond_room` names nobody, all that run and the staged one have room for the tokens of the next step.
- The oldest is never given back: it has room alone, whatever its length. So all end, one after the other at
  the least.
- Whoever waits first joins first: nobody joins while one that came before is staged, and at most one is.
- A step prefills at most its `budget` of tokens, and in every step that has a slot the first in line joins or
  gets a part of the whole budget. So the n-th in line joins within as many such steps as the budget goes
  into what it and those before it have to prefill, and n more.
- Only where prompts cannot be prefilled in parts the first one joins however long it is, alone in its step.
- In a group that is prefilled together no prompt is padded by more than `PADDING_SHARE` of the longest, or
  `PADDING_TOKENS`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Protocol, TypeVar

PADDING_SHARE = 0.25  # of a joint prefill that may be padding
PADDING_TOKENS = 16  # or so many tokens per row, where prompts are short
HEADROOM = 64  # tokens
RECENT = 1 / 16  # by how much the last request counts in what is usual


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

    @property
    def width(self) -> int:
        """Count the tokens for which it takes room in the KV cache before the next one."""
        ...

    @property
    def widest(self) -> int:
        """Return what its width may become."""
        ...

    @property
    def age(self) -> tuple[float, str]:
        """Return what is less for who was asked sooner."""
        ...


class HasRoom(Protocol):
    def more(self, rows: Sequence[int], usual: int, /) -> int:
        """Return how many rows of `usual` tokens there is room for beside rows of so many."""
        ...


class Room(HasRoom, Protocol):
    """What `room.Room` is."""

    def holds(self, rows: Sequence[int], /) -> bool: ...

    def usage(self, rows: Sequence[int], /) -> float: ...


S = TypeVar("S", bound=Schedulable)


def none_held(_sequence: Schedulable) -> int:
    return 0


class Usual:
    """What is usual of the width of requests: `tokens` as long as none has shown it, `most` the context's."""

    def __init__(self, tokens: int, most: int) -> None:
        self._tokens, self._most = float(tokens), most

    def note(self, width: int) -> None:
        self._tokens += RECENT * (width - self._tokens)

    def more(self, room: HasRoom, here: Sequence[Schedulable]) -> int:
        """Return how many more there is room for beside these."""
        usual = sum(one.width for one in here) / len(here) if here else self._tokens
        return room.more(wanted(here), min(self._most, int(usual) + HEADROOM))


def wanted(sequences: Sequence[Schedulable]) -> list[int]:
    """Return the tokens for which each finds room when somebody joins."""
    return [min(one.width + HEADROOM, one.widest) for one in sequences]


@dataclass(frozen=True, slots=True)
class Plan(Generic[S]):
    """The prompts of a step. Each `join`s the scheduler before the next call, or ends (`forget` where it is
    staged) without having run."""

    parts: list[tuple[S, int]]  # with the tokens of each: alone, in this order. The last one may stay staged
    groups: list[list[S]]  # prefilled together
    tokens: int


class Scheduler(Generic[S]):
    def __init__(self, slots: int, room: Room | None = None, usual: int = 0, most: int = 0) -> None:
        """`usual` and `most`: see `Usual`."""
        self.waiting: deque[S] = deque()
        self.staged: S | None = None
        self.running: list[S] = []
        self.left = 0  # tokens of the staged one
        self._slots = slots
        self._room = room
        self._usual = Usual(usual, most)
        self._is_short = False  # the first in line finds no room

    def free_slots(self) -> int:
        free = self._unused() - len(self.waiting)
        if self._room is None:
            return free
        return min(free, self._usual.more(self._room, [*self._here(), *self.waiting]))

    def usage(self) -> float:
        """Return what those that run take of their room, 0 to 1: by slots where it is not counted. On any
        thread."""
        running = [*self.running]
        if self._room is None:
            return len(running) / self._slots if self._slots else 0.0
        return self._room.usage([one.width for one in running])

    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.staged)

    def add(self, sequence: S) -> None:
        self.waiting.append(sequence)
        self._usual.note(sequence.width)

    def joining(self) -> list[int]:
        """Return how many tokens are to be prefilled of the one that is staged, and of each that waits for a
        slot that is there."""
        staged = [] if self.staged is None else [self.left]
        return staged + [one.length for one in islice(self.waiting, self._unused())]

    def schedule(
        self, budget: int, *, can_stage: bool = True, held: Callable[[S], int] = none_held
    ) -> Plan[S]:
        """Take those out of the line that join in this step, or are staged. `held`: tokens of a prompt that
        need no prefill, with which it goes alone."""
        parts: list[tuple[S, int]] = []
        joining: list[S] = []
        left, free = budget, self._unused()
        here = self._here()
        self._is_short = False
        if self.staged is not None:
            count = min(self.left, left)
            parts.append((self.staged, count))
            self.left -= count
            left -= count
        while self.waiting and free > 0 and not self.left:
            first = self.waiting[0]
            if here and self._room is not None and not self._room.holds(wanted([*here, first])):
                self._is_short = True
                break
            known = held(first) if can_stage else 0
            length = first.length - known
            if left < budget and length > left:
                break
            self.waiting.popleft()
            here.append(first)
            free -= 1
            if can_stage and (known or length > budget):
                count = min(length, left)
                parts.append((first, count))
                if count < length:
                    self.staged, self.left = first, length - count
            else:
                joining.append(first)
            left -= length
        return Plan(parts, grouped(joining), budget - max(left, 0))

    def join(self, group: Sequence[S]) -> None:
        """Let a group run, as the batch's last rows."""
        self.running += group
        if self.staged in group:
            self.forget()

    def forget(self) -> None:
        """Give up what is staged."""
        self.staged, self.left = None, 0

    def leave(self, rows: Iterable[int]) -> list[int]:
        """Take rows out. As in the batch, the last row moves into the hole, from the highest hole down.
        Returns for each row that stays where it was."""
        order = list(range(len(self.running)))
        for row in sorted(rows, reverse=True):
            order[row] = order[-1]
            order.pop()
        self.running = [self.running[row] for row in order]
        return order

    def beyond_room(self) -> S | None:
        """Return the youngest of those that run or are staged, where they lack room for the next step."""
        here = self._here()
        if self._room is None or len(here) < 2 or self._room.holds([one.width for one in here]):
            return None
        return max(here, key=lambda one: one.age)

    def may_run_ahead(self) -> bool:
        """Tell whether the step after next may begin as well: nobody waits to join it, and who runs has room
        for its tokens."""
        if self.waiting or self.staged is not None or not self.running:
            return False
        return self._room is None or self._room.holds([one.width + 1 for one in self.running])

    def surplus(self) -> list[S]:
        """Take those out of the line who wait behind one that has found no room."""
        taken: list[S] = []
        while self._is_short and len(self.waiting) > 1:
            taken.append(self.waiting.pop())
        return taken

    def abort(self, request_id: str) -> int | None:
        """Take a request out of the line or the stage, or return the row that has to leave."""
        if self.staged is not None and self.staged.id == request_id:
            self.forget()
            return None
        for sequence in self.waiting:
            if sequence.id == request_id:
                self.waiting.remove(sequence)
                return None
        return next((row for row, sequence in enumerate(self.running) if sequence.id == request_id), None)

    def _here(self) -> list[S]:
        return [*self.running, *([] if self.staged is None else [self.staged])]

    def _unused(self) -> int:
        return self._slots - len(self.running) - (self.staged is not None)


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
