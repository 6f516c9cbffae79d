"""One replica in a plain process, without Ray: `python -m tidegate.serving --help`. For tests and load tests.

It ends with 0 after SIGTERM or SIGINT and a drain, with 1 where the model did not load, and with 70 where its
engine crashed or hung.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys

import uvloop

from tidegate.engines.base import EngineLoadError
from tidegate.errors import ConfigError
from tidegate.serving.process import ReplicaArgs, ReplicaProcess, configure_logs, exit_failed, parse_args

log = logging.getLogger("tidegate.serving")


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
    parser = argparse.ArgumentParser(prog="python -m tidegate.serving", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--engine", default="simulated")
    parser.add_argument("--path", default="", help="checkpoint folder")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--args", default="{}", help="the engine's own arguments, as a JSON object")
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--context-length", type=int, default=0)
    parser.add_argument("--key-prefix", default="tidegate")
    parser.add_argument("--lease-seconds", type=float, default=6.0)
    parser.add_argument("--step-timeout-seconds", type=float, default=120.0)
    parser.add_argument("--drain-seconds", type=float, default=45.0)
    parser.add_argument("--log-dir", default="")
    found = parser.parse_args(words)
    try:
        engine_args = json.loads(found.args)
    except ValueError as error:
        raise ConfigError(f"--args: {found.args!r}: give a JSON object ({error})") from error
    return parse_args(
        {
            "model": found.model,
            "revision": found.revision,
            "redis_url": found.redis_url,
            "key_prefix": found.key_prefix,
            "lease_seconds": found.lease_seconds,
            "step_timeout_seconds": found.step_timeout_seconds,
            "drain_seconds": found.drain_seconds,
            "log_dir": found.log_dir,
            "engine": {
                "name": found.engine,
                "path": found.path,
                "precision": found.precision,
                "max_slots": found.slots,
                "context_length": found.context_length,
                "args": engine_args,
            },
        }
    )


async def serve(args: ReplicaArgs) -> int:
    """Until a signal or a failure."""
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
