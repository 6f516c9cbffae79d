"""The demo corpus: repeatable, disjoint splits, and a checker that is neither blind nor pedantic."""

import json
import re
from collections.abc import Callable, Mapping
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.demo import tasks
from tidegate.demo.corpus import (
    Example,
    Split,
    conversations,
    examples,
    held_out,
    is_correct,
    split_of,
)
from tidegate.demo.curriculum import FAMILIES, FIRST_STAGE, FOURTH_STAGE, SECOND_STAGE, THIRD_STAGE, Family

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def example(answer: str, grading: str) -> Example:
    return Example("any", ({"role": "user", "content": "?"},), answer, "key", grading)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_examples(seed: int) -> None:
    assert list(islice(examples("train", seed), 5)) == list(islice(examples("train", seed), 5))
    assert list(islice(conversations("train", seed), 2)) == list(islice(conversations("train", seed), 2))


def test_different_seeds_give_different_examples() -> None:
    assert list(islice(examples("train", 1), 20)) != list(islice(examples("train", 2), 20))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_is_on_both_sides(family: str) -> None:
    trained = {e.key for e in islice(examples("train", 0, family), 2000)}
    asked = {e.key for e in islice(examples("held_out", 0, family), 200)}
    assert asked
    assert not trained & asked


@pytest.mark.parametrize(
    "stage",
    [FIRST_STAGE, SECOND_STAGE, THIRD_STAGE, FOURTH_STAGE, FAMILIES],
    ids=["first", "second", "third", "fourth", "last"],
)
def test_training_conversations_hold_no_held_out_prompt(stage: Mapping[str, Family]) -> None:
    asked = {e.messages[-1]["content"] for family in FAMILIES for e in held_out(family, 100)}
    chats = islice(conversations("train", 0, stage), 3000)
    assert not asked & {message["content"] for chat in chats for message in chat if message["role"] == "user"}


def test_all_stages_teach_the_same_families() -> None:
    assert FIRST_STAGE.keys() == SECOND_STAGE.keys() == THIRD_STAGE.keys()
    assert THIRD_STAGE.keys() == FOURTH_STAGE.keys() == FAMILIES.keys()


@given(family=st.sampled_from(list(FAMILIES)), key=st.text())
def test_the_split_depends_on_nothing_but_family_and_key(family: str, key: str) -> None:
    assert split_of(family, key) == split_of(family, key)
    assert split_of(family, key) in {"train", "held_out"}


def test_about_a_tenth_is_held_out() -> None:
    sides = [split_of("addition", f"{n}+{m}") for n in range(100) for m in range(100)]
    assert 0.08 < sides.count("held_out") / len(sides) < 0.12


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_passes_its_own_check_and_a_broken_one_does_not(family: str) -> None:
    for asked in islice(examples("train", 3, family), 50):
        assert is_correct(asked, asked.answer)
        assert is_correct(asked, f" {asked.answer}\n")
        assert not is_correct(asked, "")
        assert not is_correct(asked, asked.answer + " 1234567")


@pytest.mark.parametrize("family", ["addition", "subtraction", "multiplication"])
def test_arithmetic_answers_are_true(family: str) -> None:
    for asked in islice(examples("train", 4, family), 200):
        numbers = [
            int(n) for n in "".join(c if c.isdigit() else " " for c in asked.messages[0]["content"]).split()
        ]
        a, b = numbers
        wanted = {"addition": a + b, "subtraction": a - b, "multiplication": a * b}[family]
        assert asked.answer.split()[-1] == str(wanted)
        # Every worked step is an equation that holds.
        for step in asked.answer.split(". ")[0].split("; "):
            left, right = step.split(" = ")
            terms = left.replace("- ", "-").replace("+ ", "+").split(" ")
            if "*" not in left:
                assert sum(map(int, terms)) == int(right)


@given(value=JSON_VALUES)
def test_json_is_compared_by_value_not_by_layout(value: object) -> None:
    asked = example(json.dumps(value), "json")
    assert is_correct(asked, json.dumps(value, indent=3, ensure_ascii=False))


@pytest.mark.parametrize("answer", ["", "{", '{"a": 1} and more', '{"a": 2}', '{"a": true}', "[" * 100_000])
def test_wrong_or_broken_json_is_not_correct(answer: str) -> None:
    assert not is_correct(example('{"a": 1}', "json"), answer)


@given(result=st.integers(0, 10**6), other=st.integers(0, 10**6))
def test_a_number_is_judged_by_the_last_one_named(result: int, other: int) -> None:
    asked = example(f"1 + 1 = 2. Answer: {result}", "number")
    assert is_correct(asked, f"It is {result}.")
    assert is_correct(asked, f"{other} {result}")
    assert is_correct(asked, f"{result} {other}") == (other == result)


@pytest.mark.parametrize("answer", ["1, 2, 3", "Answer: 1, 2, 3", "2; 1, 2. Answer: 1, 2, 3\n"])
def test_a_result_is_judged_without_its_steps(answer: str) -> None:
    asked = example("3; 2, 3. Answer: 1, 2, 3", "result")
    assert is_correct(asked, answer)
    assert not is_correct(asked, answer.replace("1, 2, 3", "1, 3, 2"))


@pytest.mark.parametrize("draw", [tasks.comparison, tasks.extremes, tasks.sorting])
def test_worked_and_bare_answers_agree(draw: Callable[..., tasks.Task]) -> None:
    for seed in range(100):
        worked, bare = draw(Random(seed)), draw(Random(seed), is_worked=False)
        assert worked.answer.rpartition("Answer: ")[2] == bare.answer
        numbers = [int(n) for n in re.findall(r"\d+", worked.prompt)]
        assert {int(n) for n in re.findall(r"\d+", worked.answer)} <= set(numbers)


def test_long_conversations_come_close_to_the_context() -> None:
    longest = max(sum(len(m["content"]) for m in chat) for chat in islice(conversations("train", 0), 500))
    assert 1200 < longest <= 2000


def test_some_answers_are_long_enough_to_watch() -> None:
    words = [len(e.answer.split()) for e in islice(examples("train", 0, "tidegate_long"), 20)]
    assert min(words) > 70


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_counting_answers_are_the_whole_sequence(split: Split) -> None:
    for asked in islice(examples(split, 5, "counting"), 200):
        low, rest = asked.key.split("..")
        high, step = map(int, rest.split("/"))
        numbers = [int(number) for number in asked.answer.split(", ")]
        ends = (high, int(low)) if step < 0 else (int(low), high)
        assert (numbers[0], numbers[-1]) == ends
        assert {b - a for a, b in pairwise(numbers)} <= {step}
