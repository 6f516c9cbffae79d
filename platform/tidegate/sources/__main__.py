"""`python -m tidegate.sources resolve URI` prints one JSON object about a source.

The host runs it in a process of its own, so that a slow disk or network never holds the control loop up; in a
cluster that process is a Job, which leaves its answer in a file (`--answer`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tidegate.errors import SourceError
from tidegate.sources.resolve import resolve
from tidegate.sources.schemes import Kept, Storage

MOST_BYTES_PER_CHARACTER = 12  # in JSON: two escaped surrogates
MAX_ANSWER_BYTES = 4096  # what Kubernetes keeps of a container's termination message


def main(arguments: list[str]) -> int:
    """Resolve a URI: a JSON object on stdout, {"error": {...}} and status 1 where it fails."""
    parser = argparse.ArgumentParser(prog="python -m tidegate.sources")
    parser.add_argument("command", choices=["resolve"])
    parser.add_argument("uri", metavar="URI")
    parser.add_argument("--cache", type=Path, help="folder for downloads from buckets")
    parser.add_argument(
        "--claim", action="append", default=[], type=_claim, metavar="NAME=FOLDER", help="a mounted claim"
    )
    parser.add_argument("--answer", type=Path, help="file for an answer that fits a termination message")
    parser.add_argument("--commit", default="", help="look for this commit")
    parser.add_argument("--digest", default="", help="refuse other content than of this digest")
    parser.add_argument("--since", type=float, default=0.0, metavar="SECONDS", help="when that was seen")
    given = parser.parse_args(arguments)
    try:
        found: dict[str, Any] = msgspec.to_builtins(
            resolve(
                given.uri,
                Storage(given.cache, dict(given.claim)),
                kept=Kept(given.commit, given.digest, given.since),
            )
        )
        status = 0
    except SourceError as error:
        found, status = {"error": {"reason": error.source_reason, "message": error.message}}, 1
    sys.stdout.write(json.dumps(found) + "\n")
    if given.answer is not None:
        given.answer.write_bytes(short_answer(found))
    return status


def short_answer(found: Mapping[str, Any]) -> bytes:
    """Return the answer without the list of files, and with so much of an error's message that it fits."""
    if "error" not in found:
        short = {name: value for name, value in found.items() if name not in ("files", "uri")}
        return json.dumps(short).encode()
    reason, message = found["error"]["reason"], str(found["error"]["message"])
    while (
        len(body := json.dumps({"error": {"reason": reason, "message": message}}).encode()) > MAX_ANSWER_BYTES
    ):
        message = message[: len(message) - max(1, (len(body) - MAX_ANSWER_BYTES) // MOST_BYTES_PER_CHARACTER)]
    return body


def _claim(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or not name or not folder:
        raise argparse.ArgumentTypeError("write NAME=FOLDER")
    return name, Path(folder)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
