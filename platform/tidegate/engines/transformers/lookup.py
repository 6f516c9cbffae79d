"""Proposes what a request says next: what followed when its last tokens came up before.

A step computes the logits after several proposed tokens in about the time of one, and the request takes as
many of them as it would have chosen anyway, so its tokens are those without proposals (prompt-lookup
decoding; Yang et al., arXiv 2304.04487). That gains where answers repeat their prompt, and costs where they
do not: a request whose proposals fail gets shorter ones, then none for a while.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

WORD = array("i").itemsize
LONGEST, SHORTEST = 4, 2  # last tokens that are looked for
SEEN = 1 << 14  # tokens before them that are looked through: some ten microseconds
FADING = 0.9  # of what was right and wrong, at each proposal
RESTING = 0.98  # of what was wrong, at each step without one: after some 50 it may try again


class Lookup:
    """Knows the tokens of one request, and how its proposals did."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._seen = bytearray(array("i", tokens[-SEEN:]).tobytes())
        self._right, self._wrong = 0.0, 0.0

    @property
    def rate(self) -> float:
        """Return how likely the next proposed token is right when all before it were."""
        return (self._right + 1.2) / (self._right + self._wrong + 2.0)

    def add(self, token: int) -> None:
        self._seen += array("i", [token]).tobytes()
        if len(self._seen) > 2 * SEEN * WORD:
            del self._seen[: -SEEN * WORD]

    def propose(self, most: int) -> list[int]:
        """Return `most` tokens, or none."""
        seen = self._seen
        for length in range(LONGEST, SHORTEST - 1, -1):
            size = length * WORD
            if len(seen) > size and (place := last_place(seen, seen[-size:])) >= 0:
                follows = place + size
                found = array("i", bytes(seen[follows : follows + most * WORD])).tolist()
                while len(found) < most:  # what repeats is as short as this
                    found += found[: most - len(found)]
                return found
        return []

    def note(self, proposed: int, right: int) -> None:
        """Take how many of the proposed tokens were right; 0 proposed: none were wanted."""
        if not proposed:
            self._wrong *= RESTING
            return
        self._right = FADING * self._right + right
        self._wrong = FADING * self._wrong + (right < proposed)


def last_place(seen: bytearray, tail: bytearray) -> int:
    """Return where these tokens, the last ones, have begun the last time before, or -1."""
    end = len(seen) - WORD
    while (place := seen.rfind(tail, 0, end)) % WORD and place >= 0:
        end = place + len(tail) - 1  # no token begins there
    return place


def lookup_width(proposed: Sequence[int], rates: Sequence[float], longest: int, weights_tokens: int) -> int:
    """Choose how many tokens a step takes of a row at most, its last one and what is proposed behind it: as
    many as add most tokens for what the step costs.

    `proposed`, `rates`: of each row, how many tokens and how likely each is right. A step computes as many
    for each row, and costs `weights_tokens` more.
    """
    rows = len(proposed)
    said, best, chosen = float(rows), rows / (weights_tokens + rows), 1
    for width in range(2, min(max(proposed, default=0) + 1, longest) + 1):
        said += sum(
            rate ** (width - 1) for count, rate in zip(proposed, rates, strict=True) if count >= width - 1
        )
        if (gain := said / (weights_tokens + rows * width)) > best:
            best, chosen = gain, width
    return chosen
