"""Short requests: `wrk` where it is installed, else our own generator without streaming.

`wrk` (Debian package `wrk`) costs a tenth of what a Python client costs, and on two cores whatever the
client takes is lost to the platform; the report names the client that was used.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_RATE = re.compile(r"Requests/sec:\s+([\d.]+)")
_COUNT = re.compile(r"(\d+) requests in ")
_BAD_STATUS = re.compile(r"Non-2xx or 3xx responses: (\d+)")
_SOCKET = re.compile(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)")
_LATENCY = re.compile(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s|m)\s*$", re.MULTILINE)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True, slots=True)
class ShortRun:
    """The figures of a run of short requests. Latencies in seconds, None where the client does not say."""

    requests: int
    requests_per_second: float
    bad_statuses: int
    socket_errors: int
    latency_p50: float | None
    latency_p99: float | None
    client: str


def find_wrk() -> str | None:
    return shutil.which("wrk")


def parse_wrk(text: str) -> ShortRun:
    """Read what `wrk --latency` prints. Raises `ValueError` where it holds no rate."""
    rate, count = _RATE.search(text), _COUNT.search(text)
    if rate is None or count is None:
        raise ValueError(f"wrk printed no rate:\n{text}")
    bad, sockets = _BAD_STATUS.search(text), _SOCKET.search(text)
    latencies = {found[1]: float(found[2]) * _UNITS[found[3]] for found in _LATENCY.finditer(text)}
    return ShortRun(
        requests=int(count[1]),
        requests_per_second=float(rate[1]),
        bad_statuses=int(bad[1]) if bad else 0,
        socket_errors=sum(map(int, sockets.groups())) if sockets else 0,
        latency_p50=latencies.get("50"),
        latency_p99=latencies.get("99"),
        client="wrk",
    )


def wrk_script(body: str, key: str) -> str:
    """The Lua that makes wrk POST `body`. A JSON string literal is a Lua one as long as it is ASCII."""
    lines = [
        'wrk.method = "POST"',
        f"wrk.body = {json.dumps(body)}",
        'wrk.headers["content-type"] = "application/json"',
    ]
    if key:
        lines.append(f'wrk.headers["authorization"] = {json.dumps("Bearer " + key)}')
    return "\n".join(lines) + "\n"


def run_wrk(wrk: str, folder: Path, url: str, body: str, key: str, clients: int, seconds: float) -> ShortRun:
    """Drive `clients` keep-alive connections from one thread for whole `seconds`."""
    script = folder / "post.lua"
    script.write_text(wrk_script(body, key))
    command = [wrk, "-t1", f"-c{clients}", f"-d{round(seconds)}s", "--latency", "--timeout", "30s"]
    done = subprocess.run(
        [*command, "-s", str(script), url],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=True,
    )
    return parse_wrk(done.stdout)
