"""How requests ended, counted per revision: what gates judge by.

Each request is counted once, by the script that ends it, in the hash `outcomes:{queue}` of its revision. A
field is `{cohort}|{what}`, its value a count that only grows, so what a gate makes of it does not depend on
when, how often, or by which process it is read. A *cohort* is what the model's entry said when the request
was admitted, `{rollout}.{weight of the target in percent}`; empty: no rollout was under way. Its fields go
with its rollout.

Of a tenant's errors within a second, and of a session's within an hour, the first is an `error` and the
others are `again`.

Of a session's requests a cohort counts the good ends, and all else of the first only: they go to one revision
and are alike, and the gates take what they count as independent.

`what` is one of `ENDS`, or `t{bucket}` and `i{bucket}`: the time to first token and the mean time between
tokens in the bucket (`bucket_of`), or `p{stable}{target}` for the two ends of a shadowed request (0: well,
1: an error that is ours).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

# ok: it ended well. error: it failed, and not by the client's fault. again: so it did, together with one that
# counts as error. lost: its replica was lost (once per replica). empty: an answer without text. instant: it
# stopped at the first token. length: it ran to its limit.
# A request that the client left, or that asked for what cannot be, counts nowhere.
End = Literal["ok", "error", "again", "lost", "empty", "instant", "length"]
ENDS: tuple[End, ...] = ("ok", "error", "again", "lost", "empty", "instant", "length")

FIRST_BUCKET_SECONDS = 0.001
BUCKETS_PER_DOUBLING = 4
MOST_BUCKETS = 96  # the last one holds all that takes longer than four hours


def bucket_of(seconds: float) -> int:
    """Return the number of the bucket; each is 19 % wider than the one before."""
    if seconds <= FIRST_BUCKET_SECONDS:
        return 0
    number = math.floor(math.log2(seconds / FIRST_BUCKET_SECONDS) * BUCKETS_PER_DOUBLING)
    return min(MOST_BUCKETS - 1, number)


def bucket_seconds(bucket: int) -> float:
    """Return the upper end of a bucket."""
    return FIRST_BUCKET_SECONDS * math.exp2((bucket + 1) / BUCKETS_PER_DOUBLING)


def cohort_of(rollout: str, weight: int) -> str:
    return f"{rollout}.{weight}"


def rollout_of(cohort: str) -> str:
    """The rollout of a cohort; empty: none was under way."""
    return cohort.rpartition(".")[0]


@dataclass(slots=True)
class Tally:
    """The ends of one revision's requests in one cohort. `ok` counts every request that ended well; `empty`,
    `instant` and `length` are kinds among them. `waiting_first` are requests without a first token yet, by
    the bucket of their age."""

    ends: dict[str, int] = field(default_factory=dict)
    first_token: dict[int, int] = field(default_factory=dict)
    between_tokens: dict[int, int] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)  # "00", "01", "10", "11": stable's end, target's end
    waiting_first: dict[int, int] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        return sum(self.ends.get(end, 0) for end in ("ok", "error", "again"))


Outcomes = Mapping[str, Tally]  # by cohort, of one revision


def read_outcomes(fields: Iterable[tuple[str, int]]) -> dict[str, Tally]:
    """Return the fields of an outcome hash by cohort. Fields that a later version counts are left out."""
    found: dict[str, Tally] = {}
    for name, count in fields:
        cohort, _, what = name.rpartition("|")
        tally = found.setdefault(cohort, Tally())
        if what in ENDS:
            tally.ends[what] = count
        elif what[:1] == "t" and what[1:].isdecimal():
            tally.first_token[int(what[1:])] = count
        elif what[:1] == "i" and what[1:].isdecimal():
            tally.between_tokens[int(what[1:])] = count
        elif what[:1] == "p":
            tally.pairs[what[1:]] = count
    return found
