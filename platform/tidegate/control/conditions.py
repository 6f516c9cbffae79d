"""Conditions in their reading order, with reasons from the fixed list. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import Literal

from tidegate.control.reasons import CONDITION_TYPES, Reason
from tidegate.messages.registry import Condition

Status = Literal["True", "False", "Unknown"]
MAX_MESSAGE_CHARACTERS = 4000


def condition(kind: str, status: Status, reason: str, message: str = "") -> Condition:
    """Return one condition; without a message it says what its reason means."""
    known = Reason.of(reason)
    text = message or (known.sentence if known is not None else reason)
    return Condition(type=kind, status=status, reason=reason, message=text[:MAX_MESSAGE_CHARACTERS])


def settle(new: Iterable[Condition], old: Sequence[Condition], now: float) -> list[Condition]:
    """Return `new` in reading order; a condition keeps its transition time while its status stays."""
    before = {item.type: item for item in old}
    stamp = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    by_type = {item.type: item for item in new}
    settled = []
    for kind in CONDITION_TYPES:
        if kind not in by_type:
            continue
        item, past = by_type[kind], before.get(kind)
        since = past.lastTransitionTime if past is not None and past.status == item.status else stamp
        settled.append(
            Condition(kind, item.status, item.reason, item.message, item.observedGeneration, since)
        )
    return settled


def overlaid(
    conditions: Iterable[Condition], over: Sequence[Condition], past: Sequence[Condition], now: float
) -> list[Condition]:
    """Return `conditions` with those of `over` in the place of their own kind; `past` knows since when they
    hold."""
    kinds = {item.type for item in over}
    return settle([*over, *(item for item in conditions if item.type not in kinds)], past, now)


def last_lines(text: str, count: int = 3) -> str:
    """Return the end of a traceback, which is what a person needs."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-count:]) or "Ray Serve gave no reason."
