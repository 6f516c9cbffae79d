"""Which families the demo model learns, in two stages, and how often each is drawn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from tidegate.demo import tasks


@dataclass(frozen=True, slots=True)
class Family:
    """How to draw a task, and how often it is drawn for training relative to the others."""

    draw: Callable[[Random], tasks.Task]
    share: float


FAMILIES: Mapping[str, Family] = {
    "addition": Family(tasks.addition, 10),
    "subtraction": Family(tasks.subtraction, 14),
    "multiplication": Family(tasks.multiplication, 10),
    "comparison": Family(tasks.comparison, 8),
    "counting": Family(tasks.counting, 12),
    "sorting": Family(tasks.sorting, 10),
    "extremes": Family(tasks.extremes, 8),
    "letter_case": Family(tasks.letter_case, 2),
    "reversal": Family(tasks.reversal, 2),
    "spelling": Family(tasks.spelling, 1),
    "letters": Family(tasks.letters, 1.5),
    "repetition": Family(tasks.repetition, 4),
    "list_making": Family(tasks.list_making, 1.5),
    "list_picking": Family(tasks.list_picking, 2),
    "list_reversal": Family(tasks.list_reversal, 4),
    "json_object": Family(tasks.json_object, 8),
    "json_array": Family(tasks.json_array, 6),
    "tidegate": Family(tasks.tidegate, 3),
    "tidegate_long": Family(tasks.tidegate_long, 0.5),
    "small_talk": Family(tasks.small_talk, 1.5),
}
"""What the finished model can do, weighted towards numbers, which are learned last."""

_FIRST_SHARES = {
    "addition": 10,
    "subtraction": 10,
    "multiplication": 6,
    "comparison": 6,
    "counting": 4,
    "sorting": 8,
    "extremes": 6,
    "letter_case": 6,
    "reversal": 8,
    "spelling": 3,
    "letters": 4,
    "repetition": 3,
    "list_making": 4,
    "list_picking": 4,
    "list_reversal": 4,
    "json_object": 6,
    "json_array": 4,
    "tidegate": 8,
    "tidegate_long": 1.5,
    "small_talk": 3,
}
_FIRST_DRAWS: Mapping[str, Callable[[Random], tasks.Task]] = {
    "comparison": partial(tasks.comparison, is_worked=False),
    "sorting": partial(tasks.sorting, is_worked=False),
    "extremes": partial(tasks.extremes, is_worked=False),
}
FIRST_STAGE: Mapping[str, Family] = {
    name: Family(_FIRST_DRAWS.get(name, FAMILIES[name].draw), share) for name, share in _FIRST_SHARES.items()
}
"""The first stage of training: letters, words and copying, with bare answers to comparisons."""
