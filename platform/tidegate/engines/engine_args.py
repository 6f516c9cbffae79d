"""Turns the free-form `EngineSpec.args` into the typed arguments of one engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from tidegate.engines.base import EngineLoadError

Args = TypeVar("Args", bound=msgspec.Struct)


def parse_args(args: Mapping[str, object], into: type[Args]) -> Args:
    """Check `args` against the struct `into`. An unknown or wrong one raises `EngineLoadError`
    (InvalidEngineArgs) that names it and lists those that exist."""
    known = [field.name for field in msgspec.structs.fields(into)]
    unknown = sorted(set(args) - set(known))
    if unknown:
        raise EngineLoadError(
            "InvalidEngineArgs", f"engine args have no {', '.join(unknown)}; known: {', '.join(known)}."
        )
    try:
        return msgspec.convert(dict(args), into)
    except msgspec.ValidationError as error:
        raise EngineLoadError("InvalidEngineArgs", f"engine args: {error}.") from error
