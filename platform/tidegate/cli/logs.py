"""`tidegate logs`: what the platform's processes write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.output import CommandFailed, Format, OutputOption, put


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
    from tidegate.cli.target import log_files, log_folders

    def chosen() -> dict[Path, str]:
        return {path: writer for path, writer in log_files().items() if name in ("", *_names(writer))}

    if not (found := chosen()):
        known = sorted({known for writer in log_files().values() for known in _names(writer)[:1]})
        what = f"Nothing called {name!r} has logs" if name else "There are no logs yet"
        raise CommandFailed(f"{what}; there is: {', '.join(known) or 'none'}.")
    is_mixed = len(set(found.values())) > 1
    for writer, line in read_logs(chosen, log_folders(), lines, follow):
        if output is Format.json:
            import orjson

            put(orjson.dumps({"from": writer, "line": line}).decode())
        else:
            put(f"{writer} | {line}" if is_mixed else line)


def _names(writer: str) -> tuple[str, ...]:
    """What a writer can be asked for by: `model/replica` also by the model alone."""
    return (writer.partition("/")[0], writer)
