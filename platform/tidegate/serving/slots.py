"""Counts how many requests a replica may claim. Pure: the loop says what it did and what it was told.

The engine's own count arrives late: a delivery knows of the requests handed over up to its ticket. So room is
what was free at the last delivery, less the hand-overs that it did not know, less the requests that are still
being prepared: each of those holds the slot that it was claimed for. Requests whose next token is
their last are made room for ahead, or each slot would stand empty for a step.

What always holds (late binding: whoever is claimed too early waits here while another replica is free).
Requests claimed and not over exceed the engine's slots by no more than those that end with their very
next token, and never by more than the slots themselves: of requests for one token each all end so. Where room
is memory, an engine counts slots by the usual length of requests, and gives back what it has no room for.
"""

from __future__ import annotations

import math
from collections import deque

from tidegate.messages.work import Claim, Generate


class Slots:
    """Knows requests by the ticket of their hand-over (see `engine_thread`); before, it only counts them."""

    def __init__(self, slots: int, free: int) -> None:
        self.total = slots
        self._free = free  # as of the last delivery; negative where requests wait before the engine
        self._preparing = 0
        self._unacknowledged: deque[int] = deque()  # tickets that delivery did not know
        self._tokens_left: dict[int, float] = {}  # of requests that are not over
        self._ending: set[int] = set()  # their next token is their last

    def room(self) -> int:
        """Count the requests that may be claimed now; none where it is not positive."""
        taken = self._preparing + len(self._unacknowledged)
        return self._free - taken + min(len(self._ending), self.total)

    def present(self, held: int) -> int:
        """Count the requests that find room as long as they are now, with `held` here: where the engine's
        room is its memory, that depends on their length."""
        free = self._free - self._preparing - len(self._unacknowledged)
        return max(1, min(self.total, held + free))

    def begin(self) -> None:
        """Take up a request whose preparation begins."""
        self._preparing += 1

    def prepared(self) -> None:
        """Take up that a preparation is over: next comes its `hand_over`, or nothing."""
        self._preparing -= 1

    def hand_over(self, ticket: int, tokens_left: float) -> None:
        """Take up a request that was handed to the engine. Tickets only grow."""
        self._unacknowledged.append(ticket)
        self._tokens_left[ticket] = tokens_left
        self.generate(ticket, 0)

    def deliver(self, ticket: int, free: int) -> None:
        """Take up the engine's count, which knows of hand-overs up to `ticket`."""
        while self._unacknowledged and self._unacknowledged[0] <= ticket:
            self._unacknowledged.popleft()
        self._free = free

    def generate(self, ticket: int, tokens: int) -> None:
        left = self._tokens_left[ticket] = self._tokens_left[ticket] - tokens
        if left <= 1:
            self._ending.add(ticket)

    def end(self, ticket: int) -> None:
        """Forget a request that finished or was given up; one that is not known may be, too."""
        self._tokens_left.pop(ticket, None)
        self._ending.discard(ticket)


def tokens_left(claim: Claim) -> float:
    """Count the tokens until the request's own limit ends it; infinite where it has none."""
    work = claim.request.work
    most = work.sampling.max_tokens if isinstance(work, Generate) else 0
    return math.inf if most is None else most - sum(len(segment.output.token_ids) for segment in claim.log)
