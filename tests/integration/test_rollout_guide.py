"""The guide on rollouts, followed on a platform of its own: change, watch, abort, undo; with its file, its
commands and requests that go on all the time."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.cli.command import tidegate
from tests.waiting import wait_until
from tidegate.local.ray_cluster import free_port

GUIDE = Path(__file__).parents[2] / "platform" / "docs" / "guides" / "rollouts.md"
MODEL = "writer"
CLIENTS = 4

pytestmark = [pytest.mark.serial, pytest.mark.timeout(600)]


@dataclass
class Traffic:
    """Clients that ask one request after the other until it ends. `answers` counts them by status."""

    url: str
    key: str
    answers: Counter[int] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        body = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "Write."}]}
        headers = {"Authorization": f"Bearer {self.key}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False) as client:
            while not self._stop.is_set():
                self.answers[client.post("/v1/chat/completions", json=body).status_code] += 1


@dataclass
class Laptop:
    environment: dict[str, str]
    file: Path
    text: str

    def run(self, *command: str, status: int = 0) -> str:
        """What `tidegate COMMAND` prints."""
        done = tidegate(*command, environment=self.environment, timeout=280)
        assert done.returncode == status, (done.stdout, done.stderr)
        return done.stdout

    def rollout(self) -> dict[str, Any]:
        found = json.loads(self.run("rollout", "status", MODEL, "-o", "json"))
        assert isinstance(found["rollout"], dict)
        return dict(found["rollout"])

    def history(self) -> list[dict[str, Any]]:
        return list(json.loads(self.run("rollout", "history", MODEL, "-o", "json")))

    def change(self, step_ms: int) -> None:
        """Save the file so, and wait until the host has seen it."""
        before = self.rollout()["id"]
        self.file.write_text(self.text.replace("step_ms: 5", f"step_ms: {step_ms}"), encoding="utf-8")
        wait_until(lambda: self.rollout()["id"] != before, timeout=30)


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    folder = tmp_path_factory.mktemp("guide")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    file = folder / "writer.yaml"
    file.write_text(text, encoding="utf-8")
    environment = {"TIDEGATE_HOME": str(folder / "home"), "TIDEGATE_PORT": str(free_port())}
    found = Laptop(environment, file, text)
    found.run("up", "-f", str(file))
    yield found
    found.run("clean", "--yes")


@pytest.fixture(scope="module")
def traffic(laptop: Laptop) -> Iterator[Traffic]:
    """In the second terminal. Latencies are compared with those of requests from before the change."""
    key = laptop.run("keys", "create", "traffic").strip()
    with Traffic(f"http://127.0.0.1:{laptop.environment['TIDEGATE_PORT']}", key) as traffic:
        wait_until(lambda: traffic.answers[200] >= 100, timeout=60)
        yield traffic


class TestGuide:
    """In the guide's order; the platform is started once."""

    def test_a_good_change_is_rolled_out(self, laptop: Laptop, traffic: Traffic) -> None:
        (first,) = laptop.history()
        assert first["state"] == "Serving"
        laptop.change(step_ms=4)
        lines = laptop.run("rollout", "status", MODEL, "-w", "--timeout", "4m").splitlines()
        assert "Completed: " in lines[-1]
        assert any("25 %" in line for line in lines)
        assert [it["number"] for it in laptop.history()] == [2, 1]
        assert set(traffic.answers) == {200}

    def test_a_bad_one_is_aborted_by_its_gate(self, laptop: Laptop, traffic: Traffic) -> None:
        stable = laptop.rollout()["target"]
        laptop.change(step_ms=60)
        shown = laptop.run("rollout", "status", MODEL, "--timeout", "4m", status=1)
        failed = {line.split(": ")[0] for line in shown.splitlines() if line.startswith("✗ ")}
        assert failed & {"✗ firstToken", "✗ betweenTokens"}
        view = laptop.rollout()
        assert (view["phase"], view["stable"], view["weight"]) == ("Aborted", stable, 0)
        refused = next(it for it in laptop.history() if it["revision"] == view["target"])
        assert refused["state"] == "Refused"
        assert set(traffic.answers) == {200}

    def test_it_stays_refused_until_somebody_says_retry(self, laptop: Laptop) -> None:
        before = laptop.rollout()
        laptop.run("rollout", "retry", MODEL)
        wait_until(lambda: laptop.rollout()["id"] != before["id"], timeout=30)
        assert laptop.rollout()["target"] == before["target"]

    def test_a_person_holds_it_and_aborts_it(self, laptop: Laptop) -> None:
        laptop.change(step_ms=2)
        laptop.run("rollout", "pause", MODEL)
        wait_until(lambda: laptop.rollout()["phase"] == "Paused", timeout=30)
        laptop.run("rollout", "status", MODEL, "--timeout", "1s", status=2)
        laptop.run("rollout", "resume", MODEL)
        wait_until(lambda: laptop.rollout()["phase"] != "Paused", timeout=30)
        laptop.run("rollout", "abort", MODEL)
        laptop.run("rollout", "status", MODEL, "--timeout", "1m", status=1)

    def test_undo_brings_back_an_earlier_revision(self, laptop: Laptop, traffic: Traffic) -> None:
        first = next(it for it in laptop.history() if it["number"] == 1)
        assert "engine.args.step_ms" in laptop.run("rollout", "diff", MODEL, "1", "2")
        assert "starts" in laptop.run("rollout", "undo", MODEL, "--to-revision", "1", "--dry-run")
        laptop.run("rollout", "undo", MODEL, "--to-revision", "1")
        laptop.run("rollout", "status", MODEL, "--timeout", "4m")
        assert laptop.rollout()["target"] == first["revision"]
        assert f"An undo holds revision {first['revision']}" in laptop.run("models", MODEL)
        assert set(traffic.answers) == {200}

    def test_without_the_file(self, laptop: Laptop) -> None:
        known = {it["revision"] for it in laptop.history()}
        assert "starts" in laptop.run("models", "set", MODEL, "engine.args={step_ms: 3}", "--dry-run")
        laptop.run("models", "set", MODEL, "engine.args={step_ms: 3}")
        wait_until(lambda: laptop.rollout()["target"] not in known, timeout=30)
        laptop.run("rollout", "abort", MODEL, "--dry-run")
        laptop.run("rollout", "abort", MODEL)
        assert "not its file's" in laptop.run("models", MODEL)
        laptop.run("models", "scale", MODEL, "--min", "1", "--max", "2")
        laptop.run("models", "restart", MODEL, "--yes")
        laptop.run("models", "drain", MODEL, "--yes")
        laptop.run("models", "drain", MODEL, "--end")
