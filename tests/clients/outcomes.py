"""What a suite's tests came to, which of it the written exceptions explain, and the table of it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

import msgspec

Result = Literal["passed", "failed", "skipped"]


class Outcome(msgspec.Struct, frozen=True):
    """One test of one suite. `test` is `class.name` as the suite's JUnit report has it; `told` is the first
    line of why it failed or was skipped."""

    test: str
    feature: str
    result: Result
    told: str = ""


class Exempt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A written exception: each test of `suite` that matches one of `tests` fails with `says`, and why.
    `*` is any text in both. With `by_chance` it draws its answer, so it may pass as well."""

    suite: str
    tests: tuple[str, ...]
    says: str
    why: str
    by_chance: bool = False

    def names(self, test: str) -> bool:
        return any(matches(pattern, test) for pattern in self.tests)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one suite's outcomes say beside the exceptions for it."""

    unexplained: list[Outcome]
    explained: list[tuple[Outcome, Exempt]]
    # Exceptions that name a test which passes, and those that name none.
    stale: list[tuple[Exempt, str]]

    @property
    def is_good(self) -> bool:
        return not self.unexplained and not self.stale


def matches(pattern: str, test: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), test) is not None


def read_junit(xml: str, features: Sequence[tuple[str, str]]) -> list[Outcome]:
    """The outcomes in a JUnit report; a test's feature is that of the first pattern which covers it.
    Raises `ElementTree.ParseError` where it is no XML."""
    found = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        test = f"{case.get('classname') or ''}.{case.get('name') or ''}".strip(".")
        feature = next((name for pattern, name in features if matches(pattern, test)), "other")
        result: Result = "passed"
        told = ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                result = "skipped" if child.tag == "skipped" else "failed"
                said = child.get("message") or child.text or ""
                told = next((line.strip() for line in said.splitlines() if line.strip()), "")[:300]
        found.append(Outcome(test, feature, result, told))
    return found


def judge(outcomes: Sequence[Outcome], exempt: Sequence[Exempt]) -> Verdict:
    """Compare a suite's outcomes with the exceptions for this suite."""
    failed = [outcome for outcome in outcomes if outcome.result == "failed"]
    unexplained, explained = [], []
    for outcome in failed:
        entry = next((entry for entry in exempt if _explains(entry, outcome)), None)
        if entry is None:
            unexplained.append(outcome)
        else:
            explained.append((outcome, entry))
    stale = []
    for entry in exempt:
        held = [o for o in outcomes if o.result == "failed" or (entry.by_chance and o.result == "passed")]
        passed = [o.test for o in outcomes if o.result == "passed" and entry.names(o.test)]
        if passed and not entry.by_chance:
            stale.append((entry, f"{len(passed)} pass, as {passed[0]}"))
        stale += [
            (entry, f"no test of the name {pattern} fails")
            for pattern in entry.tests
            if not any(matches(pattern, outcome.test) for outcome in held)
        ]
    return Verdict(unexplained, explained, stale)


def _explains(entry: Exempt, outcome: Outcome) -> bool:
    return entry.names(outcome.test) and matches(entry.says, outcome.told)


def grouped(outcomes: Iterable[Outcome]) -> dict[str, list[str]]:
    """The tests by what they told."""
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.told, []).append(outcome.test)
    return found


def cell(outcomes: Sequence[Outcome], verdict: Verdict) -> str:
    """One cell of the table, as in `20 passed, 2 excepted, 1 skipped`."""
    excepted = {outcome.test for outcome, _ in verdict.explained}
    counts: dict[str, int] = {"passed": 0, "FAILED": 0, "excepted": 0, "skipped": 0}
    for outcome in outcomes:
        word = {"passed": "passed", "skipped": "skipped", "failed": "FAILED"}[outcome.result]
        counts["excepted" if word == "FAILED" and outcome.test in excepted else word] += 1
    return ", ".join(f"{number} {word}" for word, number in counts.items() if number)


def rows(results: Mapping[str, Sequence[Outcome]], verdicts: Mapping[str, Verdict]) -> list[list[str]]:
    """The table, head first: a line per suite and feature, in the suites' order."""
    table = [["suite", "feature", "tests"]]
    for suite, outcomes in results.items():
        by_feature: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            by_feature.setdefault(outcome.feature, []).append(outcome)
        table += [[suite, name, cell(found, verdicts[suite])] for name, found in by_feature.items()]
    return table


def as_text(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]]) + "\n"
