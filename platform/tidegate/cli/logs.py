"""`tidegate logs`: what the platform's processes write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.output import CommandFailed, Format, OutputOption, put, put_foreign

REPLICA = "replica-"  # begins the name of a model's log


def logs(
    name: Annotated[
        str, typer.Argument(help="A component (host, gateway, redis, ray) or a model; none: all.")
    ] = "",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, help="Lines of each file to begin with.")
    ] = 100,
    output: OutputOption = Format.table,
) -> None:
    """Show logs: of a component, of a model's replicas, or of all."""
    from tidegate.cli.log_files import read_logs
    from tidegate.cli.target import log_folder

    folder = log_folder()
    known = {path: path.stem for path in sorted(folder.glob("*.log"))}
    if not any(_is_wanted(writer, name) for writer in known.values()):
        what = f"Nothing called {name!r} has a log" if name else "There are no logs yet"
        there = ", ".join(writer.removeprefix(REPLICA) for writer in known.values()) or "none"
        raise CommandFailed(f"{what} in {folder}; there is: {there}.")

    def chosen() -> dict[Path, str]:
        return {path: path.stem for path in sorted(folder.glob("*.log")) if _is_wanted(path.stem, name)}

    for writer, line in read_logs(chosen, [folder], lines, follow):
        if output is Format.json:
            import orjson

            put(orjson.dumps({"from": writer, "line": line}).decode())
        else:
            put_foreign(line if name else f"{writer} | {line}")


def _is_wanted(writer: str, name: str) -> bool:
    return name in ("", writer, writer.removeprefix(REPLICA))
