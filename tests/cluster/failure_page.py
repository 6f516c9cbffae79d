"""What platform/docs/reference/failures.md says: for each failure what is applied and run, and what a Model
or Pool then tells. The page is the tests' data, so what it shows is what the cluster prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.cluster import Resource

PAGE = Path(__file__).parents[2] / "platform" / "docs" / "reference" / "failures.md"
ELLIPSIS = "…"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_TOLD = re.compile(r"^(model|pool)/(\S+) (\w+)=(\w+) (\w+)\n {2}(.+)$", re.MULTILINE)

Resources = tuple[Resource, ...]


@dataclass(frozen=True)
class Told:
    """One condition as the page shows it."""

    kind: str
    name: str
    type: str
    status: str
    reason: str
    message: str

    def matches(self, message: str) -> bool:
        """Whether this is the page's text, with anything in the place of an ellipsis."""
        pattern = ".*".join(map(re.escape, self.message.split(ELLIPSIS)))
        return re.fullmatch(pattern, message, re.DOTALL) is not None


@dataclass(frozen=True)
class Failure:
    """One chapter: `steps` (what is applied, and scripts) before what is told, and the script after it. Only
    what hurts others has the latter, to be undone at once."""

    title: str
    steps: tuple[Resources | str, ...]
    told: tuple[Told, ...]
    undo: str

    @property
    def hurts_others(self) -> bool:
        return bool(self.undo)

    @property
    def has_script(self) -> bool:
        return any(isinstance(step, str) for step in self.steps)

    @property
    def resources(self) -> Resources:
        return tuple(each for step in self.steps if not isinstance(step, str) for each in step)

    def __str__(self) -> str:
        return self.title.lower().replace(" ", "-")


def common_resources() -> Resources:
    """What stands before the first chapter."""
    return tuple(yaml.safe_load_all(dict(_BLOCK.findall(_chapters()[0]))["yaml"]))


def failures() -> list[Failure]:
    return [_failure(chapter) for chapter in _chapters()[1:]]


def table() -> dict[str, tuple[set[str], str]]:
    """The table's rows: by title the conditions ("Ready=False") and the reason."""
    rows = re.findall(r"^\| \[(.+?)\]\(#\S+\) \| .+? \| (.+?) \| `(\w+)` \|$", _chapters()[0], re.MULTILINE)
    return {title: (set(re.findall(r"\w+=\w+", types)), reason) for title, types, reason in rows}


def _chapters() -> list[str]:
    return re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def _failure(chapter: str) -> Failure:
    steps: list[Resources | str] = []
    told: tuple[Told, ...] = ()
    undo = ""
    for language, block in _BLOCK.findall(chapter):
        if language == "yaml":
            steps.append(tuple(yaml.safe_load_all(block)))
        elif language == "text":
            told = tuple(Told(*found) for found in _TOLD.findall(block))
        elif told:
            undo = block
        else:
            steps.append(block)
    return Failure(chapter.partition("\n")[0], tuple(steps), told, undo)
