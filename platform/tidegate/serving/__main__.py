"""One replica in a plain process, without Ray: `python -m tidegate.serving --help`. For tests and load tests.

It ends with 0 after SIGTERM or SIGINT and a drain, with 1 where the model did not load, and with 70 where its
engine crashed or hung.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import logging
import signal
import sys
from typing import Any, get_origin

import msgspec
import uvloop

from tidegate.engines.base import EngineLoadError
from tidegate.errors import ConfigError
from tidegate.replica_args import ReplicaArgs, parse_args
from tidegate.serving.process import ReplicaProcess, configure_logs, exit_failed

log = logging.getLogger("tidegate.serving")

SPELLINGS = {"engine.name": "engine", "engine.max_slots": "slots"}  # options shorter than their fields


def main() -> int:
    try:
        args = parse_command_line(sys.argv[1:])
    except ConfigError as error:
        sys.stderr.write(f"{error.message}\n")
        return 2
    configure_logs(args)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(args))


def parse_command_line(words: list[str]) -> ReplicaArgs:
    """Read the arguments of a replica, each by the name of its field. Raises `ConfigError`."""
    parser = argparse.ArgumentParser(prog="python -m tidegate.serving", description=__doc__)
    _add_options(parser, ReplicaArgs)
    args: dict[str, Any] = {"engine": {"name": "simulated"}}
    for path, value in vars(parser.parse_args(words)).items():
        *parents, name = path.split(".")
        functools.reduce(lambda part, parent: part.setdefault(parent, {}), parents, args)[name] = value
    return parse_args(args, strict=False)


def _add_options(parser: argparse.ArgumentParser, struct: type[msgspec.Struct], prefix: str = "") -> None:
    for field in msgspec.structs.fields(struct):
        path = prefix + field.name
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            _add_options(parser, field.type, f"{path}.")
            continue
        parser.add_argument(
            f"--{SPELLINGS.get(path, field.name)}".replace("_", "-"),
            dest=path,
            required=field.required and path != "engine.name",
            default=argparse.SUPPRESS,
            type=_json if get_origin(field.type) in (dict, tuple) else str,
        )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give JSON ({error})") from error


async def serve(args: ReplicaArgs) -> int:
    """Serve until a signal or a failure. Returns the exit status."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    try:
        process = ReplicaProcess(args)
        await process.start()
    except (EngineLoadError, ConfigError) as error:
        log.error("%s: %s", error.reason, error.message)
        return 1
    process.loop.ended.add_done_callback(lambda _: asked.set())
    await asked.wait()
    if process.loop.failure is not None:
        await process.loop.ended
        exit_failed()
    await process.drain()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
