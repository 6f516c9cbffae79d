"""Turns the free-form `EngineSpec.args` into the typed arguments of one engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from tidegate.engines.base import EngineLoadError
from tidegate.replica_args import mistake_in_args

Args = TypeVar("Args", bound=msgspec.Struct)


def parse_args(args: Mapping[str, object], into: type[Args]) -> Args:
    """Check `args` against the struct `into`. An unknown or wrong one raises `EngineLoadError`
    (InvalidEngineArgs) that names it and lists those that exist."""
    if mistake := mistake_in_args(args, into):
        raise EngineLoadError("InvalidEngineArgs", mistake)
    return msgspec.convert(dict(args), into)
