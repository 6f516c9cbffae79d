"""The families that the demo model learns, in five stages, and how often each is drawn.

Letters and words are learned first. Copying the right one of several numbers, and stopping at the right
one, come late, so the later stages lean on them, and the fourth most on what was still weak: sorting. Tools
come last.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from tidegate.demo import tasks, tools

Draw = Callable[[Random], tasks.Task]


@dataclass(frozen=True, slots=True)
class Family:
    """A way to draw a task, and how often it is drawn relative to the others."""

    draw: Draw
    share: float


_CURRICULUM: Mapping[str, tuple[Draw, tuple[float, float, float, float, float]]] = {
    "addition": (tasks.addition, (10, 10, 8, 6, 5)),
    "subtraction": (tasks.subtraction, (10, 14, 14, 8, 7)),
    "multiplication": (tasks.multiplication, (6, 10, 4, 4, 4)),
    "comparison": (tasks.comparison, (6, 8, 10, 12, 9)),
    "counting": (tasks.counting, (4, 12, 8, 14, 10)),
    "sorting": (tasks.sorting, (8, 10, 14, 30, 18)),
    "extremes": (tasks.extremes, (6, 8, 10, 12, 10)),
    "letter_case": (tasks.letter_case, (6, 2, 2, 2, 2)),
    "reversal": (tasks.reversal, (8, 2, 2, 2, 2.5)),
    "spelling": (tasks.spelling, (3, 1, 1.5, 1.5, 1.5)),
    "letters": (tasks.letters, (4, 1.5, 1, 1, 1.5)),
    "repetition": (tasks.repetition, (3, 4, 2, 2, 2)),
    "list_making": (tasks.list_making, (4, 1.5, 2, 2, 2)),
    "list_picking": (tasks.list_picking, (4, 2, 2, 2, 2)),
    "list_reversal": (tasks.list_reversal, (4, 4, 4, 4, 3.5)),
    "json_object": (tasks.json_object, (6, 8, 10, 10, 8)),
    "json_array": (tasks.json_array, (4, 6, 8, 8, 7)),
    "tidegate": (tasks.tidegate, (8, 3, 4, 4, 4)),
    "tidegate_long": (tasks.tidegate_long, (1.5, 0.5, 0.6, 0.6, 0.6)),
    "small_talk": (tasks.small_talk, (3, 1.5, 1.5, 1.5, 1.5)),
    "tool_call": (tools.tool_call, (0, 0, 0, 0, 44)),
    "tool_answer": (tools.tool_answer, (0, 0, 0, 0, 12)),
    "extraction": (tools.extraction, (0, 0, 0, 0, 22)),
}
"""Each family and its shares in the five stages."""


def _stage(index: int, draws: Mapping[str, Draw]) -> Mapping[str, Family]:
    return {
        name: Family(draws.get(name, draw), shares[index]) for name, (draw, shares) in _CURRICULUM.items()
    }


_EARLY: Mapping[str, Draw] = {
    "sorting": partial(tasks.sorting, most=5),
    "counting": tasks.counting_to_any_end,
}
_BARE_ANSWERS: Mapping[str, Draw] = {
    "comparison": partial(tasks.comparison, is_worked=False),
    "sorting": partial(tasks.sorting, most=5, is_worked=False),
    "extremes": partial(tasks.extremes, is_worked=False),
}

FIRST_STAGE = _stage(0, {**_EARLY, **_BARE_ANSWERS})
SECOND_STAGE = _stage(1, _EARLY)
THIRD_STAGE = _stage(2, {})
FOURTH_STAGE = _stage(3, {})
FAMILIES = _stage(4, {})
"""The last stage: what the finished model can do."""
