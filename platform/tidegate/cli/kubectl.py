"""Reaches a cluster's control API through `kubectl`: it knows the user's contexts and how to sign in, and may
read what the user may read."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.cli.output import CommandFailed

SELECTOR = "app.kubernetes.io/component=control-api"
KEY_ANNOTATION = "tidegate.dev/admin-key"  # of that Service: SECRET/KEY
ASK_TIMEOUT = "--request-timeout=15s"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster as kubectl knows it. `context` empty: the current one. `namespace` is the release's; empty:
    all are looked through."""

    context: str = ""
    namespace: str = ""

    def command(self, *arguments: str) -> list[str]:
        return ["kubectl", *(["--context", self.context] if self.context else []), *arguments]

    def __str__(self) -> str:
        return f"context {self.context}" if self.context else "kubectl's current context"


@dataclass(frozen=True, slots=True)
class Service:
    """The Service of a release's control API, and the Secret with the key that opens it."""

    namespace: str
    name: str
    port: int
    secret: str
    secret_key: str


def has_kubeconfig() -> bool:
    """True where kubectl would find a cluster without being told one."""
    named = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
    return shutil.which("kubectl") is not None and any(
        Path(it).is_file() for it in named.split(os.pathsep) if it
    )


def find_service(cluster: Cluster) -> Service:
    """Raises `CommandFailed` where kubectl refuses, or there is not exactly one."""
    where = ["-n", cluster.namespace] if cluster.namespace else ["--all-namespaces"]
    found = json.loads(_ask(cluster, "get", "services", *where, "-l", SELECTOR, "-o", "json"))["items"]
    namespaces = sorted(it["metadata"]["namespace"] for it in found)
    if not found:
        there = f"the namespace {cluster.namespace}" if cluster.namespace else "any namespace"
        raise CommandFailed(
            f"{cluster}: no Service of a control API in {there}. `helm list -A` shows where Tidegate is "
            "installed; name another cluster with --context. For this machine: `tidegate up`."
        )
    if len(found) > 1:
        raise CommandFailed(
            f"{cluster}: control APIs in {', '.join(namespaces)}; choose one with --namespace."
        )
    return _service(found[0])


def read_key(cluster: Cluster, service: Service) -> str:
    """Raises `CommandFailed` where the user may not read the Secret."""
    name = f"secret/{service.secret}"
    secret = json.loads(_ask(cluster, "get", name, "-n", service.namespace, "-o", "json"))
    try:
        return base64.b64decode(secret["data"][service.secret_key]).decode().strip()
    except (KeyError, ValueError) as error:
        raise CommandFailed(
            f"{cluster}: {name} in {service.namespace} has no key {service.secret_key!r}; "
            "name one in TIDEGATE_ADMIN_KEY."
        ) from error


@contextlib.contextmanager
def forwarded(cluster: Cluster, service: Service) -> Iterator[str]:
    """The address of a free local port that leads to the Service until the block ends. Raises
    `CommandFailed`."""
    arguments = ("port-forward", "--address", "127.0.0.1", "-n", service.namespace)
    command = cluster.command(*arguments, f"service/{service.name}", f":{service.port}")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    try:
        yield f"http://127.0.0.1:{_port(cluster, process)}"
    finally:
        process.terminate()
        process.wait()
        signal.signal(signal.SIGTERM, before)


def _port(cluster: Cluster, process: subprocess.Popen[str]) -> str:
    """The local port that kubectl chose and tells; whatever else it tells is read and forgotten, so that it
    never waits for a reader."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"Forwarding from 127\.0\.0\.1:(\d+)", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return found[1]
        said += line
    raise CommandFailed(f"{cluster}: kubectl port-forward: {_last(said)}")


def _ask(cluster: Cluster, *arguments: str) -> str:
    command = cluster.command(ASK_TIMEOUT, *arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        raise CommandFailed(
            "kubectl is not installed, and a cluster is reached through it. Install it, or set "
            "TIDEGATE_ADMIN_URL and TIDEGATE_ADMIN_KEY."
        ) from None
    if done.returncode:
        raise CommandFailed(f"{cluster}: kubectl {' '.join(arguments[:2])}: {_last(done.stderr)}")
    return done.stdout


def _last(output: str) -> str:
    """The last thing that kubectl said, as a sentence."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = (lines[-1] if lines else "it said nothing").removeprefix("error: ")
    return said if said.endswith(".") else f"{said}."


def _service(body: dict[str, Any]) -> Service:
    meta = body["metadata"]
    secret, _, key = meta["annotations"][KEY_ANNOTATION].partition("/")
    return Service(meta["namespace"], meta["name"], body["spec"]["ports"][0]["port"], secret, key)
