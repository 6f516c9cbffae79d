"""The demo model's corpus: seeded examples, split for good into training and held-out ones.

The side of an example is a hash of its family and key, so the split needs no list, is the same on
every machine and for every seed, and a key can never be on both sides. For open families the key is
the operands (numbers, words, list items in any order). The multiplication table and the questions
about Tidegate are closed sets of facts; there the key is the exact wording of the question.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

from tidegate.demo import tools
from tidegate.demo.curriculum import FAMILIES, Family
from tidegate.demo.tasks import Grading, Message
from tidegate.demo.words import SYSTEM_PROMPTS

Split = Literal["train", "held_out"]
HELD_OUT_PERCENT = 10
LONG_CONVERSATION_CHARACTERS = 2000
"""About 900 tokens of this corpus: close to the model's context of 1,024."""
UNASKED_TOOLS_SHARE = 0.08
"""Of the other chats: tools are offered, and no question is for them."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt whose answer can be checked."""

    family: str
    messages: tuple[Message, ...]
    answer: str
    key: str
    grading: Grading


def split_of(family: str, key: str) -> Split:
    """The side that every example with this `key` belongs to."""
    digest = hashlib.sha256(f"{family}\0{key}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT else "train"


def examples(split: Split, seed: int, family: str | None = None) -> Iterator[Example]:
    """An endless stream of `split`'s examples, of one family or of all by their shares."""
    rng = Random(f"{split}:{seed}:{family}")
    while True:
        yield _draw(rng, split, family or _any_family(rng, FAMILIES), FAMILIES)


def held_out(family: str, count: int, seed: int = 0) -> list[Example]:
    """Up to `count` different held-out examples of `family` (closed families have fewer)."""
    found: dict[str, Example] = {}
    stream = examples("held_out", seed, family)
    for _ in range(count * 20):
        example = next(stream)
        found.setdefault(example.messages[-1]["content"], example)
        if len(found) == count:
            break
    return list(found.values())


def conversations(
    split: Split, seed: int, families: Mapping[str, Family] = FAMILIES
) -> Iterator[list[Message]]:
    """An endless stream of chats of one to many unrelated turns, every answer included.

    Most are one question. The others teach the model to answer the last question whatever came
    before, and to stay sound up to the end of its context.
    """
    rng = Random(f"conversations:{split}:{seed}")
    while True:
        turns, kind = 1, rng.random()
        if kind > 0.72:
            turns = rng.randint(2, 4)
        is_long = kind > 0.99
        chat: list[Message] = []
        if rng.random() < 0.2:
            chat.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        if families["tool_call"].share and rng.random() < UNASKED_TOOLS_SHARE:
            chat = [tools.offered(rng)]
        while turns > 0 or is_long:
            example = _draw(rng, split, _any_family(rng, families), families)
            if len(example.messages) > 1:  # its system turn begins a chat
                yield [*example.messages, {"role": "assistant", "content": example.answer}]
                continue
            turn: list[Message] = [*example.messages, {"role": "assistant", "content": example.answer}]
            if is_long and _characters(chat) + _characters(turn) > LONG_CONVERSATION_CHARACTERS:
                break
            chat += turn
            turns -= 1
        yield chat


def is_correct(example: Example, answer: str) -> bool:
    """Tell whether `answer` is right.

    JSON and calls are compared by value, a number by the last one named, a result by what follows
    `Answer:`, and the rest word by word.
    """
    if example.grading in ("json", "calls"):
        try:
            return _values(example, answer) == _values(example, example.answer)
        except (ValueError, RecursionError):
            return False
    if example.grading == "number":
        numbers = re.findall(r"\d+", answer)
        return bool(numbers) and numbers[-1] == re.findall(r"\d+", example.answer)[-1]
    if example.grading == "result":
        return _result(answer) == _result(example.answer)
    return answer.split() == example.answer.split()


def _values(example: Example, answer: str) -> list[str]:
    """The JSON in an answer, as text again, because Python holds True equal to 1."""
    texts = [answer]
    if example.grading == "calls":
        inner = answer.strip().removeprefix(tools.CALL).removesuffix(tools.CALL_END)
        texts = inner.split(f"{tools.CALL_END}\n{tools.CALL}")
    return [json.dumps(json.loads(text), sort_keys=True) for text in texts]


def _draw(rng: Random, split: Split, family: str, families: Mapping[str, Family]) -> Example:
    """The next task of `family` on the wanted side, by rejection."""
    while True:
        task = families[family].draw(rng)
        if split_of(family, task.key) == split:
            asked: Message = {"role": task.role, "content": task.prompt}
            return Example(family, (*task.before, asked), task.answer, task.key, task.grading)


def _result(answer: str) -> list[str]:
    return answer.rpartition("Answer:")[2].split()


def _any_family(rng: Random, families: Mapping[str, Family]) -> str:
    return rng.choices(list(families), [family.share for family in families.values()])[0]


def _characters(chat: list[Message]) -> int:
    return sum(len(message["content"]) for message in chat)
