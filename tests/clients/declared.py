"""The suites as `suites.toml` declares them, and the exceptions in `exceptions.toml`."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from tests.clients.outcomes import Exempt

HERE = Path(__file__).parent


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One suite; the fields are told at the head of `suites.toml`."""

    name: str = ""
    title: str
    packages: list[str]
    without: list[str] = []
    hashes: bool = False
    sdist: str = ""
    git: str = ""
    tests: list[str] = []
    arguments: list[str] = []
    environment: dict[str, str] = {}
    rewrite: dict[str, str] = {}
    models: list[str]
    timeout_seconds: float = 300.0
    features: list[tuple[str, str]] = []

    @property
    def folder(self) -> Path:
        return HERE / "suites" / self.name


def suites() -> dict[str, Suite]:
    """Every suite by name, in the order of the file."""
    text = (HERE / "suites.toml").read_text(encoding="utf-8")
    found = msgspec.convert(tomllib.loads(text), dict[str, Suite])
    return {name: msgspec.structs.replace(suite, name=name) for name, suite in found.items()}


class _Exceptions(msgspec.Struct, forbid_unknown_fields=True):
    exception: list[Exempt] = []


def exceptions() -> list[Exempt]:
    text = (HERE / "exceptions.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), _Exceptions).exception
