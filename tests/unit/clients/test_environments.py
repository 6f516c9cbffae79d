from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.clients import environments
from tests.clients.declared import Suite


@pytest.mark.parametrize(
    ("tests", "files"),
    [
        (["a/b/test_x.py"], {"a/__init__.py", "a/b/test_x.py"}),
        ([], {"a/__init__.py", "a/b/test_x.py", "c/big"}),
    ],
)
def test_of_a_commit_that_is_large_only_what_is_beside_the_tests_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tests: list[str], files: set[str]
) -> None:
    origin = tmp_path / "origin"
    for name in ("a/__init__.py", "a/b/test_x.py", "c/big"):
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        (origin / name).write_text(name, encoding="utf-8")

    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        done = subprocess.run(["git", "-C", origin, *who, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("config", "uploadpack.allowFilter", "true")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    monkeypatch.setattr(environments, "CACHE", tmp_path / "cache")
    address = f"file://{origin}@{git('rev-parse', 'HEAD')}"

    found = environments.sources(Suite(title="", packages=[], models=[], git=address, tests=tests))

    assert found is not None
    there = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    assert {name for name in there if not name.startswith(".git/")} == files
