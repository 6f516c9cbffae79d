"""The entry point of the `tidegate` command: puts the commands together and turns errors into sentences."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tidegate.cli import keys, lifecycle, models, rollout
from tidegate.cli.control_client import NAMED_CLUSTER
from tidegate.cli.kubectl import Cluster
from tidegate.cli.logs import logs
from tidegate.cli.output import put, say
from tidegate.cli.pull import pull
from tidegate.cli.run import run
from tidegate.errors import ConfigError, TidegateError

OF_CONTROL_API = ("models", "rollout", "keys")

app = typer.Typer(
    name="tidegate",
    help="Serve many language models behind one OpenAI-compatible address.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (lifecycle.up, lifecycle.down, lifecycle.serve, lifecycle.status):
    app.command()(command)
app.add_typer(models.commands, name="models")
app.add_typer(rollout.commands, name="rollout")
app.command()(run)
app.command()(pull)
app.add_typer(keys.commands, name="keys")
app.command()(logs)
app.command()(lifecycle.clean)


def main() -> None:
    """Run the command line. Mistakes of the user end with a sentence and status 1, never with a traceback."""
    try:
        app()
    except ConfigError as error:
        lines = [str(problem) for problem in error.problems] or [error.message]
        say("\n".join(f"error: {line}" for line in lines))
    except TidegateError as error:
        say(f"error: {error.message}")
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        from tidegate import __version__

        put(__version__)
        raise typer.Exit


@app.callback()
def _options(
    command: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    context: Annotated[
        str,
        typer.Option(
            help="Speak to the Tidegate of this context of kubectl, through a port-forward of its own."
        ),
    ] = "",
    namespace: Annotated[
        str, typer.Option(help="The namespace of that release; left out: all are looked through.")
    ] = "",
) -> None:
    del version
    if context or namespace:
        if command.invoked_subcommand not in OF_CONTROL_API:
            raise typer.BadParameter(
                f"--context and --namespace are for {', '.join(OF_CONTROL_API)}; "
                f"{command.invoked_subcommand} does not speak to the control API."
            )
        NAMED_CLUSTER.set(Cluster(context, namespace))
