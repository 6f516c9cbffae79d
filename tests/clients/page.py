"""The page `platform/docs/reference/clients.md`.

What each suite came to last is kept beside the environments, so that a run of some suites changes only their
rows; each row says of which commit it is.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

import msgspec

from tests.clients.declared import HERE, Suite, exceptions
from tests.clients.environments import CACHE
from tests.clients.outcomes import Outcome, as_markdown, judge, rows

CHECKOUT = HERE.parents[1]
PAGE = CHECKOUT / "platform" / "docs" / "reference" / "clients.md"

INTRO = """\
<!-- Written by `python -m tests.clients.run --write`; change the suites or the exceptions instead. -->

# Clients and suites

What `make test-clients` found: suites that nobody here wrote, and clients that people use, each in an
environment of its own with the versions in `tests/clients/requirements/`, against a platform that serves the
demo models. *excepted*: the test fails and [the exceptions](#exceptions) say why. *skipped*: by the suite
itself.

"""


class Last(msgspec.Struct, frozen=True):
    """What a suite came to, and at which commit."""

    commit: str
    outcomes: list[Outcome]


def write(known: Mapping[str, Suite], results: Mapping[str, Sequence[Outcome]]) -> None:
    """Write the page from `results` and, for the suites that did not run now, from what they came to last."""
    folder = CACHE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    commit = _commit()
    last: dict[str, Last] = {}
    for name in known:
        path = folder / f"{name}.json"
        if name in results:
            path.write_bytes(msgspec.json.encode(Last(commit, list(results[name]))))
        if path.exists():
            last[name] = msgspec.json.decode(path.read_bytes(), type=Last)
    PAGE.write_text(page(known, last), encoding="utf-8")


def page(known: Mapping[str, Suite], last: Mapping[str, Last]) -> str:
    written = exceptions()
    of_suite = {name: [entry for entry in written if entry.suite == name] for name in last}
    verdicts = {name: judge(found.outcomes, of_suite[name]) for name, found in last.items()}
    table = rows({name: found.outcomes for name, found in last.items()}, verdicts)
    head, *lines = table
    shown = [[*head, "commit"], *([*line, f"`{last[line[0]].commit}`"] for line in lines)]
    parts = [INTRO, as_markdown(shown), "\n## The suites\n\n"]
    parts += [f"- `{name}`: {known[name].title}\n" for name in last]
    parts.append("\n## Exceptions\n\n")
    lines = [["suite", "tests", "why"]]
    lines += [
        [entry.suite, ", ".join(f"`{test}`" for test in entry.tests), entry.why]
        for name in last
        for entry in of_suite[name]
    ]
    parts.append(as_markdown(lines) if lines[1:] else "None.\n")
    return "".join(parts)


def _commit() -> str:
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
