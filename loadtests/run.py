"""`python -m loadtests.run SCENARIO ...`: measure, print, and say what is met."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from loadtests.context import Context
from loadtests.figures import Section
from loadtests.machine import become_realtime, pin_to_cores, prioritize
from loadtests.measure import Target
from loadtests.report import as_json, is_all_met, markdown
from loadtests.scenarios import (
    choices,
    connections,
    crowd,
    embeddings,
    engine,
    idle,
    peers,
    prefill,
    quiet,
    short,
    split,
    streams,
    wake,
    warm,
)

SCENARIOS: dict[str, tuple[str, Callable[[Context], Section]]] = {
    "streams128": (
        "128 streams x 50 tok/s against direct",
        lambda context: streams.run(context, 128, 50, tokens=250),
    ),
    "streams512": (
        "512 streams x 20 tok/s against direct",
        lambda context: streams.run(context, 512, 20, tokens=100),
    ),
    "short": ("short requests, 64 clients, against nginx", short.run),
    "quiet": ("one request at a time: added latency", quiet.run),
    "patient": ("256 patient clients on 32 slots", crowd.run_patient),
    "overload": ("50 clients at 8 times capacity", crowd.run_overload),
    "engine": ("demo model, 16 at once, against one plain generate", engine.run),
    "prefill": ("a prompt of 4,000 tokens beside 8 streams, and one that begins like another", prefill.run),
    "split": ("what an engine in a process of its own could gain, and would cost", split.run),
    "embeddings": ("64 texts a call, against sentence-transformers' own encode", embeddings.run),
    "peers": ("our engine and vLLM's through the platform, against bare vLLM", peers.run),
    "choices": ("each way of choosing tokens beside greedy, of our engine and of bare vLLM", choices.run),
    "idle": ("idle CPU and memory of gateway and replica", idle.run),
    "connections": ("our connection to Redis beside redis-py and coredis", connections.run),
    "wake": ("a sleeping model, from a request to its first token, by parts", wake.run),
    "warm": ("warm `tidegate up` to the first streamed token", warm.run),
}
REQUEST_PATH = ("streams128", "streams512", "short", "quiet", "patient", "overload")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    names = chosen(options.scenarios)
    cores = pin_to_cores(options.cores) if options.cores else sorted(os.sched_getaffinity(0))
    if options.nice:
        prioritize(os.getpid(), options.nice)
    if options.realtime:
        become_realtime()
    folder = Path(options.folder) if options.folder else Path(tempfile.mkdtemp(prefix="tidegate-load-"))
    print(f"cores {cores}, Python {platform.python_version()}, logs in {folder}\n", flush=True)
    sections = []
    for name in names:
        began = time.monotonic()
        section = SCENARIOS[name][1](context_of(options, folder / name))
        sections.append(section)
        print(markdown(section) + f"\n({time.monotonic() - began:.0f} s)\n", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(as_json(sections), indent=2))
    return 1 if options.strict and not is_all_met(sections) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = "".join(f"\n  {name:12} {what}" for name, (what, _) in SCENARIOS.items())
    groups = "\n  path         the first six\n  all          everything"
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.run",
        description=f"Load tests of Tidegate. Scenarios:{known}{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="+", choices=[*SCENARIOS, "path", "all"], metavar="SCENARIO")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of a measured window")
    parser.add_argument("--rounds", type=int, default=3, help="baseline and platform alternate so often")
    parser.add_argument("--cores", type=int, default=2, help="bind everything to so many cores; 0: do not")
    parser.add_argument(
        "--nice",
        type=int,
        default=0,
        help="priority of all that is started; below 0 (root) on a machine that others use as well",
    )
    parser.add_argument(
        "--realtime", action="store_true", help="the same, above every priority (root): others wait meanwhile"
    )
    parser.add_argument("--url", help="measure this running platform instead of starting one")
    parser.add_argument("--key", default="", help="API key for --url")
    parser.add_argument("--model", default="simulated", help="model name for --url")
    parser.add_argument(
        "--pid", action="append", default=[], metavar="ROLE=PID", help="a process of --url to charge CPU to"
    )
    parser.add_argument(
        "--demo-path", default="", help="checkpoint for `engine` and `wake`; default: the demo model"
    )
    parser.add_argument("--alone", action="store_true", help="`choices`: without bare vLLM beside it")
    parser.add_argument("--short-tokens", type=int, default=1, help="tokens of a short request")
    parser.add_argument("--tidegate", default="tidegate", help="the command that `wake` and `warm` start")
    parser.add_argument("--profile", type=float, default=0.0, metavar="SECONDS", help="run py-spy as well")
    parser.add_argument("--folder", help="for logs and data; default: a new temporary folder, kept")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--strict", action="store_true", help="exit 1 where a must is not met")
    return parser.parse_args(arguments)


def chosen(asked: Sequence[str]) -> list[str]:
    """Scenario names in order, without doubles; `path` and `all` stand for several."""
    names: list[str] = []
    for one in asked:
        names += REQUEST_PATH if one == "path" else SCENARIOS if one == "all" else (one,)
    return list(dict.fromkeys(names))


def context_of(options: argparse.Namespace, folder: Path) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(
        folder=folder,
        seconds=options.seconds,
        rounds=options.rounds,
        external=external_target(options.url, options.key, options.model, options.pid),
        demo_path=options.demo_path,
        short_tokens=options.short_tokens,
        tidegate=options.tidegate,
        profile_seconds=options.profile,
        nice=options.nice,
        alone=options.alone,
    )


def external_target(url: str | None, key: str, model: str, process_ids: Sequence[str]) -> Target | None:
    """The platform of `--url`; None where the scenario starts its own."""
    if not url:
        return None
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise SystemExit(f"--url {url!r}: use http://HOST:PORT")
    named = dict(one.split("=", 1) for one in process_ids)
    return Target(
        "platform",
        parts.hostname,
        parts.port or 80,
        model,
        key,
        {role: int(pid) for role, pid in named.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
