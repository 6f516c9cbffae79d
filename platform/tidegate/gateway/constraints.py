"""What is said of an answer's form, between the gateway and the process beside it that checks it. `grammars`
makes grammars of it, with a library that the gateway itself does not load."""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec

LENGTH = struct.Struct("<I")  # before each constraint (JSON) and each answer (msgpack)
CPU_SECONDS = 0.5  # for one check


class Constraint(msgspec.Struct, frozen=True, array_like=True):
    """What an answer must follow. `param` names the field that says so."""

    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any  # a schema, a regular expression, a list of texts, or a grammar of Lark's or GBNF's form
    param: str
    is_strict: bool = False  # keywords that are not known are refused
    whitespace: str | None = None  # between the tokens of JSON, a regular expression; None: `JSON_SPACING`


class Checked(msgspec.Struct, frozen=True, array_like=True):
    """A grammar in llguidance's form, or why there is none."""

    grammar: str = ""
    refusal: str = ""
    warnings: list[str] = []
