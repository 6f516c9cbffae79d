"""Commands reach a cluster's control API through kubectl. A program in its place says what kubectl says; the
real one is asked in `tests/cluster`."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from tests.integration.cli.command import assert_refused, program, tidegate
from tests.integration.cli.control_api import ADMIN_KEY, ControlApi
from tests.waiting import wait_until

KUBECTL = """\
#!{python}
import json, os, pathlib, signal, sys
folder = pathlib.Path({folder!r})
asked = [argument for argument in sys.argv[1:] if not argument.startswith("--request-timeout")]
with (folder / "asked").open("a") as file:
    print(json.dumps(asked), file=file)
told = json.loads((folder / "told").read_text())
words = ("services", "secret/", "port-forward")
what = next(word for word in words if any(argument.startswith(word) for argument in asked))
if "error: " in told[what]:
    print(told[what], file=sys.stderr)
    sys.exit(1)
print(told[what], flush=True)
if what == "port-forward":
    (folder / "pid").write_text(str(os.getpid()))
    signal.pause()
"""


@dataclass(frozen=True)
class Kubectl:
    folder: Path
    told: dict[str, str]

    def tell(self, **told: str) -> dict[str, str]:
        """Let it say this; the environment in which it is found."""
        names = {"services": "services", "secret": "secret/", "forward": "port-forward"}
        changed = {names[name]: text for name, text in told.items()}
        (self.folder / "told").write_text(json.dumps(self.told | changed))
        return {
            "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}",
            "KUBECONFIG": str(self.folder / "told"),
            "TIDEGATE_HOME": str(self.folder / "home"),
        }

    @property
    def asked(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "asked").read_text().splitlines()]


def service(namespace: str = "tidegate") -> dict[str, Any]:
    annotations = {"tidegate.dev/admin-key": "tidegate-admin-key/key"}
    meta = {"name": "tidegate-control", "namespace": namespace, "annotations": annotations}
    return {"metadata": meta, "spec": {"ports": [{"port": 8090}]}}


@pytest.fixture
def kubectl(api: ControlApi, tmp_path: Path) -> Kubectl:
    path = tmp_path / "kubectl"
    path.write_text(KUBECTL.format(python=sys.executable, folder=str(tmp_path)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    port = api.url.rpartition(":")[2]
    return Kubectl(
        tmp_path,
        {
            "services": json.dumps({"items": [service()]}),
            "secret/": json.dumps({"data": {"key": base64.b64encode(ADMIN_KEY.encode()).decode()}}),
            "port-forward": f"Forwarding from 127.0.0.1:{port} -> 8090",
        },
    )


def test_a_context_leads_through_a_port_forward_that_ends(kubectl: Kubectl) -> None:
    shown = tidegate("--context", "prod", "models", environment=kubectl.tell())
    assert shown.returncode == 0, shown
    assert "bold" in shown.stdout
    assert all(asked[:2] == ["--context", "prod"] for asked in kubectl.asked)
    assert kubectl.asked[-1][-2:] == ["service/tidegate-control", ":8090"]
    assert not psutil.pid_exists(int((kubectl.folder / "pid").read_text()))


def test_a_kubeconfig_at_hand_is_enough_where_nothing_runs_here(kubectl: Kubectl) -> None:
    environment = kubectl.tell()
    assert "bold" in tidegate("models", environment=environment).stdout
    assert all("--context" not in asked for asked in kubectl.asked)
    nowhere = environment | {"KUBECONFIG": os.devnull}
    assert_refused(tidegate("models", environment=nowhere), "tidegate up")


def test_a_context_is_not_for_what_asks_no_control_api(kubectl: Kubectl) -> None:
    refused = tidegate("--context", "prod", "run", "bold", "Hello", environment=kubectl.tell())
    assert refused.returncode == 2
    assert "models, rollout, keys" in " ".join(refused.stderr.replace("│", " ").split())


def test_a_killed_command_leaves_no_port_forward(kubectl: Kubectl, api: ControlApi) -> None:
    api.host.view = replace(api.host.view, entry=None)  # nothing has been rolled out
    command = subprocess.Popen(
        [*program(), "--context", "prod", "rollout", "status", "bold", "-w"],
        env={**os.environ, **kubectl.tell()},
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(wait_until(lambda: (kubectl.folder / "pid").exists() and (kubectl.folder / "pid").read_text()))
    command.send_signal(signal.SIGTERM)
    command.communicate(timeout=20)
    assert command.returncode == 128 + signal.SIGTERM
    assert not psutil.pid_exists(pid)


def test_several_releases_ask_for_a_namespace(kubectl: Kubectl) -> None:
    several = kubectl.tell(services=json.dumps({"items": [service("blue"), service("green")]}))
    refused = tidegate("--context", "prod", "models", environment=several)
    assert_refused(refused, "context prod", "blue, green", "--namespace")
    tidegate("--context", "prod", "--namespace", "blue", "models", environment=several)
    assert ["-n", "blue"] in [asked[4:6] for asked in kubectl.asked]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"services": json.dumps({"items": []})}, ["context prod", "helm list", "tidegate up"]),
        (
            {"services": "error: the server has no such thing"},
            ["get services: the server has no such thing."],
        ),
        ({"secret": 'error: secrets "x" is forbidden'}, ["get secret/tidegate-admin-key", "forbidden"]),
        ({"secret": json.dumps({"data": {}})}, ["'key'", "TIDEGATE_ADMIN_KEY"]),
        ({"forward": "error: pods is forbidden"}, ["port-forward: pods is forbidden."]),
    ],
)
def test_what_kubectl_refuses_is_said(told: dict[str, str], words: list[str], kubectl: Kubectl) -> None:
    refused = tidegate("--context", "prod", "models", environment=kubectl.tell(**told))
    assert_refused(refused, *words)


def test_a_key_of_ones_own_needs_no_secret(kubectl: Kubectl) -> None:
    own = kubectl.tell(secret="error: forbidden") | {"TIDEGATE_ADMIN_KEY": ADMIN_KEY}
    assert tidegate("--context", "prod", "models", environment=own).returncode == 0


def test_without_kubectl_the_other_way_is_said(api: ControlApi, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    bare = {"PATH": str(tmp_path / "bin"), "TIDEGATE_HOME": str(tmp_path / "home")}
    refused = tidegate("--context", "prod", "models", environment=bare)
    assert_refused(refused, "kubectl is not installed", "TIDEGATE_ADMIN_URL")
