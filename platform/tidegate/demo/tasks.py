"""The task families: each draws one prompt with the answer that is right by construction.

Sums, comparisons and sorting are answered step by step. A small model adds digits reliably when it may
write the carries down (Lee et al., "Teaching Arithmetic to Small Transformers", arXiv 2307.03381), and
such answers are long enough to be worth streaming. Words to be edited stand in double quotes, which the
tokenizer reads letter by letter (see `tokenizer.build_tokenizer`).
"""

import json
from dataclasses import dataclass
from random import Random
from typing import Literal, TypedDict

from tidegate.demo import facts
from tidegate.demo.words import NOUNS, joined, made_up_word

Shapes = tuple[str, ...]
"""Ways to put one question."""
Grading = Literal["text", "number", "result", "json", "calls"]
Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn, as the chat template writes it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Task:
    """One question. `key` names what must not occur on both sides of the split; the turns `before` it begin a
    chat of their own."""

    prompt: str
    answer: str
    key: str
    grading: Grading = "text"
    before: tuple[Message, ...] = ()
    role: Role = "user"


def addition(rng: Random) -> Task:
    a, b = _number(rng), _number(rng)
    steps: list[str] = []
    carry, rest_a, rest_b = 0, a, b
    while rest_a or rest_b or not steps:
        x, y = rest_a % 10, rest_b % 10
        total = x + y + carry
        steps.append(f"{x} + {y}{' + 1' if carry else ''} = {total}")
        carry, rest_a, rest_b = total // 10, rest_a // 10, rest_b // 10
    prompt = _fill(rng, ("What is {} + {}?", "Add {} and {}.", "{} + {} =", "Calculate {} plus {}."), a, b)
    return Task(prompt, _worked(steps, a + b), f"{min(a, b)}+{max(a, b)}", "number")


def subtraction(rng: Random) -> Task:
    a, b = sorted((_number(rng), _number(rng)), reverse=True)
    steps: list[str] = []
    borrow, rest_a, rest_b = 0, a, b
    while rest_a or rest_b or not steps:
        x, y = rest_a % 10, rest_b % 10
        needs_ten = x < y + borrow
        minuend = x + 10 if needs_ten else x
        steps.append(f"{minuend} - {y}{' - 1' if borrow else ''} = {minuend - y - borrow}")
        borrow, rest_a, rest_b = int(needs_ten), rest_a // 10, rest_b // 10
    prompt = _fill(rng, ("What is {} - {}?", "Calculate {} minus {}.", "{} - {} ="), a, b)
    return Task(prompt, _worked(steps, a - b), f"{a}-{b}", "number")


def multiplication(rng: Random) -> Task:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    shapes = (
        "What is {} * {}?",
        "What is {} times {}?",
        "Multiply {} by {}.",
        "{} * {} =",
        "Calculate {} times {}.",
    )
    prompt = _fill(rng, shapes, a, b)
    return Task(prompt, f"{a} * {b} = {a * b}", prompt, "number")


def comparison(rng: Random, is_worked: bool = True) -> Task:
    a, b = rng.sample(range(1000), 2) if rng.random() < 0.7 else rng.sample(range(100), 2)
    is_larger = rng.random() < 0.5
    words = ("larger", "bigger") if is_larger else ("smaller", "less")
    shapes = ("Which is {2}, {0} or {1}?", "Which number is {2}: {0} or {1}?")
    prompt = _fill(rng, shapes, a, b, rng.choice(words))
    winner = (max if is_larger else min)(a, b)
    answer = f"{a} {'<' if a < b else '>'} {b}. Answer: {winner}" if is_worked else str(winner)
    return Task(prompt, answer, f"{min(a, b)},{max(a, b)}", "number")


def counting(rng: Random) -> Task:
    """Up to a multiple of ten, or down to zero: ends that a model of this size learns to see."""
    step, is_down = rng.choice((1, 1, 1, 1, 2, 5, 10)), rng.random() < 0.25
    span = rng.randint(1, 3 if rng.random() < 0.6 else 8) * 10
    low = 0 if is_down else max(0, rng.randrange(10, 101, 10) - span)
    high = low + span
    if is_down:
        high += rng.randint(0, 9) // step * step
        shapes = _COUNT_DOWN if step == 1 else ("Count down by {2} from {1} to {0}.",)
    else:
        low += rng.randint(0, 9) // step * step
        shapes = _COUNT_UP if step == 1 else _COUNT_STEPS
    numbers = list(range(low, high + 1, step))
    key = f"{low}..{high}/{-step if is_down else step}"
    answer = ", ".join(map(str, reversed(numbers) if is_down else numbers))
    return Task(_fill(rng, shapes, low, high, step), answer, key)


def counting_to_any_end(rng: Random) -> Task:
    """For the early stages: the sequences are learned soon, where to stop is not."""
    start, step = rng.randint(0, 120), rng.choice((1, 1, 1, 2, 5, 10))
    length = rng.randint(3, 20) if rng.random() < 0.8 else rng.randint(21, 60)
    numbers = list(range(start, start + step * length, step))
    low, high = numbers[0], numbers[-1]
    if is_down := step == 1 and rng.random() < 0.3:
        numbers.reverse()
        shapes = _COUNT_DOWN
    elif step == 1:
        shapes = _COUNT_UP
    else:
        shapes = _COUNT_STEPS
    answer = ", ".join(map(str, numbers))
    return Task(_fill(rng, shapes, low, high, step), answer, f"{low}..{high}/{-1 if is_down else step}")


def sorting(rng: Random, most: int = 4, is_worked: bool = True) -> Task:
    numbers = rng.sample(range(100), rng.randint(3, most))
    is_rising = rng.random() < 0.6
    shapes = (
        ("Sort {}.", "Sort the numbers {}.", "Sort from smallest to largest: {}.")
        if is_rising
        else ("Sort {} in descending order.", "Sort from largest to smallest: {}.")
    )
    prompt = _fill(rng, shapes, ", ".join(map(str, numbers)))
    # One number is inserted at a time, in the order in which they are given.
    lists = [
        ", ".join(map(str, sorted(numbers[:length], reverse=not is_rising)))
        for length in range(1, len(numbers) + 1)
    ]
    answer = f"{'; '.join(lists[:-1])}. Answer: {lists[-1]}" if is_worked else lists[-1]
    return Task(prompt, answer, _same_items(numbers), "result")


def extremes(rng: Random, is_worked: bool = True) -> Task:
    numbers = rng.sample(range(100), rng.randint(3, 5))
    is_largest = rng.random() < 0.5
    word = "largest" if is_largest else "smallest"
    shapes = ("What is the {1} of {0}?", "Find the {1} number: {0}.")
    prompt = _fill(rng, shapes, ", ".join(map(str, numbers)), word)
    best, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{best} {'<' if best < number else '>'} {number}")
        best = (max if is_largest else min)(best, number)
    answer = _worked(steps, best) if is_worked else str(best)
    return Task(prompt, answer, _same_items(numbers), "number")


def letter_case(rng: Random) -> Task:
    word = made_up_word(rng)
    if rng.random() < 0.6:
        shapes, given, wanted = (
            ('Write "{}" in uppercase.', 'Convert "{}" to uppercase.', 'Uppercase "{}".'),
            word,
            word.upper(),
        )
    else:
        shapes, given, wanted = (
            ('Write "{}" in lowercase.', 'Convert "{}" to lowercase.', 'Lowercase "{}".'),
            word.upper(),
            word,
        )
    return Task(_fill(rng, shapes, given), f'"{wanted}"', word)


def reversal(rng: Random) -> Task:
    word = made_up_word(rng)
    prompt = _fill(rng, ('Reverse "{}".', 'Reverse the word "{}".', 'Write "{}" backwards.'), word)
    return Task(prompt, f'"{word[::-1]}"', word)


def spelling(rng: Random) -> Task:
    word = made_up_word(rng)
    prompt = _fill(rng, ('Spell "{}".', 'Spell the word "{}".', 'How do you spell "{}"?'), word)
    return Task(prompt, "-".join(word), word)


def letters(rng: Random) -> Task:
    word = made_up_word(rng)
    which = rng.choice(("first", "last"))
    prompt = _fill(rng, ('What is the {1} letter of "{0}"?', 'Give me the {1} letter of "{0}".'), word, which)
    return Task(prompt, f'"{word[0] if which == "first" else word[-1]}"', word)


def repetition(rng: Random) -> Task:
    word, times = made_up_word(rng), rng.randint(2, 5)
    prompt = _fill(rng, ('Repeat "{}" {} times.', 'Say "{}" {} times.', 'Write "{}" {} times.'), word, times)
    return Task(prompt, " ".join([f'"{word}"'] * times), word)


def list_making(rng: Random) -> Task:
    items = rng.sample(NOUNS, rng.randint(3, 5))
    is_numbered = rng.random() < 0.5
    kind = "numbered" if is_numbered else "bulleted"
    prompt = _fill(rng, ("Make a {1} list of {0}.", "Write {0} as a {1} list."), joined(items), kind)
    lines = [f"{i}. {item}" if is_numbered else f"- {item}" for i, item in enumerate(items, start=1)]
    return Task(prompt, "\n".join(lines), _same_items(items))


def list_picking(rng: Random) -> Task:
    items = rng.sample(NOUNS, rng.randint(3, 5))
    which, index = rng.choice((("first", 0), ("second", 1), ("third", 2), ("last", -1)))
    prompt = _fill(
        rng, ("What is the {1} item of {0}?", "Give me the {1} word: {0}."), ", ".join(items), which
    )
    return Task(prompt, items[index], _same_items(items))


def list_reversal(rng: Random) -> Task:
    items = rng.sample(NOUNS, rng.randint(3, 5))
    prompt = _fill(rng, ("Reverse the list {}.", "Write the list {} in reverse order."), ", ".join(items))
    return Task(prompt, ", ".join(reversed(items)), _same_items(items))


def json_object(rng: Random) -> Task:
    fields: dict[str, str | int | bool] = {}
    for name in rng.sample(_TEXT_FIELDS + _NUMBER_FIELDS + _BOOL_FIELDS, rng.randint(1, 4)):
        if name in _TEXT_FIELDS:
            fields[name] = made_up_word(rng)
        else:
            fields[name] = rng.randint(0, 999) if name in _NUMBER_FIELDS else rng.random() < 0.5
    answer = json.dumps(fields)
    described = joined([f"{name} {json.dumps(value)}" for name, value in fields.items()])
    prompt = _fill(
        rng, ("Make a JSON object with {}.", "Write JSON with {}.", "Return a JSON object: {}."), described
    )
    return Task(prompt, answer, answer, "json")


def json_array(rng: Random) -> Task:
    count, is_text = rng.randint(2, 5), rng.random() < 0.5
    items: list[str] | list[int] = (
        [made_up_word(rng) for _ in range(count)] if is_text else [rng.randint(0, 999) for _ in range(count)]
    )
    answer = json.dumps(items)
    prompt = _fill(
        rng,
        ("Make a JSON array of {}.", "Write a JSON list with {}."),
        joined([json.dumps(i) for i in items]),
    )
    return Task(prompt, answer, answer, "json")


def tidegate(rng: Random) -> Task:
    topic = rng.choice(facts.TOPICS)
    if rng.random() < 0.5:
        prompt = rng.choice(facts.STEMS).format(rng.choice(topic.names))
    else:
        prompt = rng.choice(facts.LEADS).format(rng.choice(topic.questions))
    return Task(prompt, topic.answer, prompt)


def tidegate_long(rng: Random) -> Task:
    topic = rng.choice(facts.TEXTS)
    prompt = rng.choice(facts.LONG_STEMS).format(rng.choice(topic.names))
    return Task(prompt, topic.answer, prompt)


def small_talk(rng: Random) -> Task:
    if rng.random() < 0.5:
        prompt = rng.choice(facts.UNKNOWN_STEMS).format(rng.choice(NOUNS))
        return Task(prompt, facts.UNKNOWN_ANSWER, prompt)
    openings, answer = rng.choice(facts.SMALL_TALK)
    prompt = rng.choice(facts.SMALL_TALK_SHAPES).format(rng.choice(openings))
    return Task(prompt, answer, prompt)


_COUNT_UP: Shapes = (
    "Count from {0} to {1}.",
    "List the numbers from {0} to {1}.",
    "Write the numbers {0} to {1}.",
)
_COUNT_DOWN: Shapes = ("Count down from {1} to {0}.", "Count backwards from {1} to {0}.")
_COUNT_STEPS: Shapes = ("Count from {0} to {1} in steps of {2}.", "Count by {2} from {0} to {1}.")
_TEXT_FIELDS = ("name", "city", "color", "team", "title")
_NUMBER_FIELDS = ("age", "count", "size", "price")
_BOOL_FIELDS = ("active", "ready")


def _number(rng: Random) -> int:
    """A number of one to three digits, each length often enough to be learned."""
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3)))


def _worked(steps: list[str], result: int) -> str:
    return f"{'; '.join(steps)}. Answer: {result}"


def _same_items(items: list[int] | list[str]) -> str:
    """One key for all orders of the same items, so that no permutation crosses the split."""
    return ",".join(sorted(map(str, items)))


def _fill(rng: Random, shapes: Shapes, *values: object) -> str:
    return rng.choice(shapes).format(*values)
