"""Runs suites that nobody here wrote, and clients that people use, against a platform of its own.

    python -m tests.clients.run [NAME ...]     run all suites, or these, and print the table
    python -m tests.clients.run --write        and write it to platform/docs/reference/clients.md
    python -m tests.clients.run --pin NAME     write the versions in requirements/NAME.txt anew

Status 1: a test failed that no exception explains, a suite did not end, or an exception no longer holds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

from tests.clients import environments, page, platform
from tests.clients.declared import HERE, Suite, exceptions, suites
from tests.clients.environments import CACHE, NotMade
from tests.clients.outcomes import Outcome, as_text, grouped, judge, read_junit, rows

CHECKOUT = HERE.parents[1]
TEST_SECONDS = 120  # of one test; a suite has its own bound
SHOWN_TESTS = 6  # of those that failed alike
LAST_BYTES = 4000  # of what a suite said that is shown where it gave no report


def main(arguments: Sequence[str] | None = None) -> int:
    known = suites()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all")
    parser.add_argument("--write", action="store_true", help=f"write {page.PAGE.relative_to(CHECKOUT)}")
    parser.add_argument("--pin", action="store_true", help="only write the versions anew")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.names) - known.keys()):
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [suite for name, suite in known.items() if not asked.names or name in asked.names]
    if asked.pin:
        for suite in chosen:
            environments.pin(suite)
        return 0
    # What an interrupt must leave nothing of is ended by context managers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = run(chosen)
    except KeyboardInterrupt:
        return 130
    if asked.write:
        page.write(known, results)
    return report(results)


def run(chosen: Sequence[Suite]) -> dict[str, list[Outcome]]:
    """Make the environments, start a platform for each set of models, run one suite after the other."""
    results: dict[str, list[Outcome]] = {}
    made = []
    for suite in chosen:
        try:
            environments.python(suite)
            environments.sources(suite)
            environments.node_modules(suite)
            made.append(suite)
        except NotMade as problem:
            results[suite.name] = [_failed("environment", str(problem))]
    # Some suites ask the first model that is listed, so a platform serves those of its suites alone.
    for models in {frozenset(suite.models) for suite in made}:
        with platform.running(models) as address:
            for suite in made:
                if models == frozenset(suite.models):
                    print(f"== {suite.name}: {suite.title}", flush=True)
                    results[suite.name] = run_suite(suite, address)
    return {suite.name: results[suite.name] for suite in chosen}


def run_suite(suite: Suite, address: platform.Address) -> list[Outcome]:
    values = {"url": address.url, "key": address.key, "model": suite.models[0], "embed_model": "minilm"}
    sources, node_modules = environments.sources(suite), environments.node_modules(suite)
    values["source"] = str(platform.SOURCES[suite.models[0]]())
    values |= {"sources": str(sources or ""), "node_modules": str(node_modules or "")}
    with tempfile.TemporaryDirectory(prefix=f"tg-clients-{suite.name}-") as folder:
        work = Path(folder)
        tests = work / "tests"
        if sources and suite.tests:
            _copied(suite, sources, tests, values)
            where = suite.tests
        else:
            shutil.copytree(suite.folder, tests)
            shutil.copy(HERE / "suites" / "pytest.ini", tests)
            where = ["."]
        junit = work / "junit.xml"
        command = [str(environments.python(suite)), "-m", "pytest", "-q", "--no-header", "--tb=short"]
        command += [f"--junitxml={junit}", f"--timeout={TEST_SECONDS}", *suite.arguments, *where]
        log = CACHE / f"{suite.name}.log"
        status = _bounded(command, tests, _environment(suite, values), log, suite.timeout_seconds)
        print(f"   what it said: {log}", flush=True)
        try:
            found = read_junit(junit.read_text(encoding="utf-8"), suite.features)
        except (OSError, ElementTree.ParseError):
            found = []
        if status is None:
            found.append(_failed("suite", f"not ended after {suite.timeout_seconds:.0f} s"))
        elif not found:
            said = log.read_bytes()[-LAST_BYTES:].decode(errors="replace")
            print(said)
            found.append(_failed("suite", f"no report (status {status}): {said.strip().splitlines()[-1:]}"))
        return found


def report(results: Mapping[str, Sequence[Outcome]]) -> int:
    """Print the table and what is wrong; the exit status."""
    known = exceptions()
    verdicts = {
        name: judge(outcomes, [entry for entry in known if entry.suite == name])
        for name, outcomes in results.items()
    }
    for name, verdict in verdicts.items():
        for told, tests in grouped(verdict.unexplained).items():
            print(f"FAILED {name}: {told}\n  {len(tests)}: {', '.join(tests[:SHOWN_TESTS])}")
        for entry, why in verdict.stale:
            print(f"EXCEPTION NO LONGER HOLDS {name} ({entry.why}): {why}")
    print(as_text(rows(results, verdicts)))
    return 0 if all(verdict.is_good for verdict in verdicts.values()) else 1


def _copied(suite: Suite, sources: Path, target: Path, values: Mapping[str, str]) -> None:
    """The suite's sources with this platform's names in them."""
    if suite.folder.exists():
        # The files alone, with what pytest reads beside them, and ours laid over them.
        for name in suite.tests:
            beside = [
                folder / file for folder in Path(name).parents for file in ("__init__.py", "conftest.py")
            ]
            for path in filter(lambda path: (sources / path).exists(), [Path(name), *beside]):
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(sources / path, target / path)
        shutil.copytree(suite.folder, target, dirs_exist_ok=True)
        shutil.copy(HERE / "suites" / "pytest.ini", target)
    else:
        shutil.copytree(sources, target)
    tops = {Path(name).parts[0] for name in suite.tests}
    for path in (path for top in tops for path in target.glob(f"{top}/**/*.py")):
        before = text = path.read_text(encoding="utf-8")
        for old, new in suite.rewrite.items():
            text = text.replace(old, new.format_map(values))
        if text != before:
            path.write_text(text, encoding="utf-8")


def _environment(suite: Suite, values: Mapping[str, str]) -> dict[str, str]:
    ours = {f"CLIENTS_{name.upper()}": value for name, value in values.items()}
    given = {name: value.format_map(values) for name, value in suite.environment.items()}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {**inherited, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", **ours, **given}


def _bounded(command: list[str], cwd: Path, env: dict[str, str], log: Path, seconds: float) -> int | None:
    """Run it with all that it starts; its status, or None where it took too long and was ended."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _failed(test: str, told: str) -> Outcome:
    return Outcome(test, "other", "failed", told)


if __name__ == "__main__":
    sys.exit(main())
