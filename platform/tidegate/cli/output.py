"""The answers of commands: data to stdout as a table, JSON or YAML; everything else to stderr."""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tidegate.errors import TidegateError

Record = Mapping[str, Any]
GAP = "   "
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class CommandFailed(TidegateError):
    """A command cannot do what was asked; the message says why and what to do."""

    reason = "CommandFailed"


class Format(enum.StrEnum):
    table = "table"
    wide = "wide"
    json = "json"
    yaml = "yaml"


OutputOption = Annotated[
    Format, typer.Option("-o", "--output", help="table, wide (more columns), json or yaml.")
]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its title, and its text for a record."""

    title: str
    text: Callable[[Record], str]
    only_wide: bool = False


def say(message: str) -> None:
    """A line for the person at the terminal."""
    print(printable(message), file=sys.stderr, flush=True)  # noqa: T201


def put(text: str, end: str = "\n") -> None:
    """Data on stdout, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def put_foreign(text: str, end: str = "\n") -> None:
    """Text that somebody else wrote (a model, a log): a terminal gets none of the characters that it acts on,
    a file or a program the text as it is."""
    put(_CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text) if sys.stdout.isatty() else text, end)


def show_list(records: Sequence[Record], columns: Sequence[Column], style: Format, empty: str) -> None:
    """Print records. Without any, a table is no output on stdout and the sentence `empty` on stderr."""
    if style in (Format.json, Format.yaml):
        _dump([dict(record) for record in records], style)
    elif not records:
        say(empty)
    else:
        shown = [column for column in columns if style is Format.wide or not column.only_wide]
        rows = [[column.text(record) for column in shown] for record in records]
        put(table([column.title for column in shown], rows))


def show_record(record: Record, style: Format, text: str) -> None:
    """Print one record: `text` for people, or the record itself as JSON or YAML."""
    if style in (Format.json, Format.yaml):
        _dump(dict(record), style)
    else:
        put(printable(text))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns without borders: read by people, cut by tools. Empty cells show as `-`."""
    cells = [list(titles), *[[_one_line(cell) or "-" for cell in row] for row in rows]]
    widths = [max(len(row[index]) for row in cells) for index in range(len(titles))]
    lines = (
        GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
    return "\n".join(lines)


def size(number_of_bytes: float) -> str:
    """`18.0 MB`: decimal units, as disks and downloads are counted. 0 is unknown and shown empty."""
    if not number_of_bytes:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number_of_bytes) < 1000:
            return f"{number_of_bytes:.0f} B" if unit == "B" else f"{number_of_bytes:.1f} {unit}"
        number_of_bytes /= 1000
    return f"{number_of_bytes:.1f} TB"


def age(seconds: float) -> str:
    """`45s`, `12m`, `3h`, `9d`, as kubectl shows ages."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "m"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, int(seconds / divisor))}{unit}"
    return f"{int(seconds / 86_400)}d"


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would act on; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _one_line(cell: str) -> str:
    return printable(" ".join(cell.split()))


def _dump(data: Any, style: Format) -> None:
    if style is Format.json:
        import orjson

        options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
        put(orjson.dumps(data, default=str, option=options).decode())
    else:
        import json

        from tidegate.control.bounded_yaml import dump

        put(dump(json.loads(json.dumps(data, default=str))), end="")
