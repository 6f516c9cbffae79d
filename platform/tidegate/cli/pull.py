"""`tidegate pull`: fetch and check a model's files ahead of time."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from tidegate.cli.output import CommandFailed, Format, OutputOption, say, show_record, size


def pull(
    uri: Annotated[
        str,
        typer.Argument(
            help="hf://owner/name@revision, s3://bucket/path, gs://bucket/path, file:///path or a path.",
            metavar="URI",
        ),
    ],
    output: OutputOption = Format.table,
) -> None:
    """Fetch a checkpoint, verify it, and print its folder.

    An interrupted download goes on where it stopped.
    """
    from tidegate.cli.progress import Transfers
    from tidegate.errors import SourceError
    from tidegate.sources.resolve import pull as fetch

    try:
        with Transfers() as transfers:
            checkpoint = fetch(uri, transfers.moved)
    except SourceError as error:
        raise CommandFailed(f"{error.source_reason}: {error.message}") from error
    what = checkpoint.quantization if checkpoint.quantization != "none" else checkpoint.precision
    facts = f"{checkpoint.architecture}, {what}, {size(checkpoint.weights_bytes)}"
    if checkpoint.commit:
        facts += f", commit {checkpoint.commit}"
    say(facts)
    show_record(msgspec.to_builtins(checkpoint), output, checkpoint.path)
