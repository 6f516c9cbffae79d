"""The commands that start, show and stop the platform, with a simulated model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cli.command import assert_refused, tidegate
from tests.processes import runs
from tests.waiting import wait_until
from tidegate.local.home import Home
from tidegate.local.ray_cluster import free_port

MODEL = """\
apiVersion: tidegate.dev/v1alpha1
kind: Model
metadata:
  name: steady
spec:
  engine:
    name: simulated
    args:
      step_ms: 5
"""


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """A home in which nothing runs."""
    return {"TIDEGATE_HOME": str(tmp_path / "home"), "TIDEGATE_PORT": str(free_port())}


@pytest.mark.parametrize(
    "command", [["run", "m", "x"], ["models"], ["keys", "list"], ["keys", "create", "a"]], ids=" ".join
)
def test_without_a_platform_the_way_to_start_one_is_said(command: list[str], nowhere: dict[str, str]) -> None:
    assert_refused(tidegate(*command, environment=nowhere), "not running", "tidegate up")


def test_status_of_nothing(nowhere: dict[str, str]) -> None:
    shown = tidegate("status", "-o", "json", environment=nowhere)
    assert shown.returncode == 1
    assert json.loads(shown.stdout)["running"] is False


def test_down_of_nothing_is_no_failure(nowhere: dict[str, str]) -> None:
    stopped = tidegate("down", environment=nowhere)
    assert (stopped.returncode, stopped.stdout) == (0, "Nothing runs.\n")


@pytest.mark.parametrize("command", ["up", "serve"])
def test_a_wrong_file_is_refused_with_field_value_and_remedy(
    command: str, nowhere: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text(MODEL.replace("simulated", "magic"))
    result = tidegate(command, "-f", str(tmp_path / "m.yaml"), environment=nowhere)
    assert_refused(result, "m.yaml", "spec.engine.name", "'magic'", "simulated")
    assert not (tmp_path / "home" / "run" / "host.json").exists()


@pytest.mark.parametrize("command", ["up", "serve"])
def test_a_busy_port_is_named(command: str, nowhere: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(MODEL)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = tidegate(command, "-f", str(tmp_path / "m.yaml"), "--port", port, environment=nowhere)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "TIDEGATE_PORT" in result.stderr
    assert port in result.stderr


def test_no_auth_needs_loopback(nowhere: dict[str, str]) -> None:
    open_address = nowhere | {"TIDEGATE_HOST": "0.0.0.0"}
    result = tidegate("up", "--no-auth", environment=open_address)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "TIDEGATE_NO_AUTH" in result.stderr


def test_clean_asks_first(nowhere: dict[str, str], tmp_path: Path) -> None:
    Home(tmp_path / "home").make()
    kept = tmp_path / "home" / "key"
    kept.write_text("secret")
    assert tidegate("clean", environment=nowhere, stdin="n\n").returncode == 1
    assert kept.exists()
    assert tidegate("clean", environment=nowhere, stdin="y\n").returncode == 0
    assert not kept.exists()


def test_clean_removes_nothing_that_tidegate_did_not_make(tmp_path: Path) -> None:
    for name in ("data", "logs", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / "key").write_text("of the house")
    refused = tidegate("clean", "--yes", environment={"TIDEGATE_HOME": str(tmp_path)})
    assert_refused(refused, "TIDEGATE_HOME", str(tmp_path), "did not make")
    assert len(list(tmp_path.rglob("thesis.txt"))) == 3
    assert (tmp_path / "key").read_text() == "of the house"


@pytest.mark.parametrize("where", ["/", "home"])
def test_clean_never_takes_what_is_a_persons_own(tmp_path: Path, where: str) -> None:
    environment = {"HOME": str(tmp_path), "TIDEGATE_HOME": "/" if where == "/" else str(tmp_path)}
    (tmp_path / "data").mkdir()
    (tmp_path / ".tidegate-home").touch()
    assert_refused(tidegate("clean", "--yes", environment=environment), "name a folder of its own")
    assert (tmp_path / "data").exists()


class Foreground:
    """`tidegate serve` in a process of its own."""

    def __init__(self, environment: dict[str, str], files: Path, folder: Path) -> None:
        self.environment = environment
        self._out, self._err = folder / "out", folder / "err"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("tidegate")), "serve", "-f", str(files)],
                env=inherited | environment,
                stdout=out,
                stderr=err,
            )

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def has_started(self) -> bool:
        assert self.process.poll() is None, self.stderr
        return "curl" in self.stdout


@pytest.fixture(scope="module")
def foreground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreground]:
    folder = tmp_path_factory.mktemp("serve")
    files = folder / "models"
    files.mkdir()
    (files / "steady.yaml").write_text(MODEL)
    environment = {"TIDEGATE_HOME": str(folder / "home"), "TIDEGATE_PORT": str(free_port())}
    served = Foreground(environment, files, folder)
    try:
        wait_until(served.has_started, timeout=150)
        yield served
    finally:
        served.process.kill()
        served.process.wait()
        tidegate("clean", "--yes", environment=environment)


@pytest.mark.serial
class TestForeground:
    """In this order, on one platform; the last one stops it."""

    def test_a_model_answers_through_it(self, foreground: Foreground) -> None:
        options = ["--max-tokens", "20", "--verbose"]
        answered = tidegate("run", "steady", "hello", *options, environment=foreground.environment)
        assert answered.returncode == 0, answered.stderr
        assert len(answered.stdout.split()) == 20
        assert "20 tokens" in answered.stderr

    def test_an_unknown_model_names_those_that_exist(self, foreground: Foreground) -> None:
        assert_refused(tidegate("run", "none", "x", environment=foreground.environment), "'none'", "steady")

    def test_a_wrong_key_is_refused(self, foreground: Foreground) -> None:
        refused = tidegate("run", "steady", "x", "--key", "wrong", environment=foreground.environment)
        assert_refused(refused, "key", "keys list")

    def test_models_and_status_show_it(self, foreground: Foreground) -> None:
        (model,) = json.loads(tidegate("models", "-o", "json", environment=foreground.environment).stdout)
        assert (model["name"], model["ready"], model["replicas_ready"]) == ("steady", True, 1)
        shown = tidegate("status", environment=foreground.environment)
        assert shown.returncode == 0
        assert "1 of 1 ready" in shown.stdout
        for part in ("host", "redis", "gateway"):
            assert part in shown.stdout

    def test_logs_of_a_component_and_of_a_model(self, foreground: Foreground) -> None:
        for name in ("gateway", "steady"):
            shown = tidegate("logs", name, environment=foreground.environment)
            assert shown.returncode == 0
            assert shown.stdout
        assert_refused(tidegate("logs", "none", environment=foreground.environment), "'none'", "gateway")

    def test_up_finds_it_running(self, foreground: Foreground) -> None:
        found = tidegate("up", "-o", "json", environment=foreground.environment)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["model"] == "steady"
        assert "runs already" in found.stderr

    def test_ctrl_c_stops_all_of_it(self, foreground: Foreground) -> None:
        status = tidegate("status", "-o", "json", environment=foreground.environment)
        pids = [part["pid"] for part in json.loads(status.stdout)["processes"]]
        foreground.process.send_signal(signal.SIGINT)
        assert foreground.process.wait(60) == 0
        assert "Traceback" not in foreground.stderr
        assert [pid for pid in pids if runs(pid)] == []
        assert tidegate("status", environment=foreground.environment).returncode == 1
