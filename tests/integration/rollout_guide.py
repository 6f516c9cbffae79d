"""The guide on rollouts as steps to follow on a platform: change, watch, abort, undo; with its file, its
commands and requests that go on all the time. The laptop's test and the cluster's follow the same."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.integration.cli.command import tidegate
from tests.waiting import wait_until

GUIDE = Path(__file__).parents[2] / "platform" / "docs" / "guides" / "rollouts.md"
MODEL = "writer"
CLIENTS = 4


def file_of_guide() -> str:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return str(text)


@dataclass
class Traffic:
    """Clients that ask one request after the other until it ends. `answers` counts them by status."""

    url: str
    key: str
    answers: Counter[int] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[Traffic]:
        """In the second terminal. Latencies are compared with those of requests from before the change."""
        threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: self.answers[200] >= 100, timeout=60)
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _ask(self) -> None:
        body = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "Write."}]}
        headers = {"Authorization": f"Bearer {self.key}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False) as client:
            while not self._stop.is_set():
                self.answers[client.post("/v1/chat/completions", json=body).status_code] += 1


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where the guide is followed. `options` go before each command; `has_file`: the spec is a file's."""

    environment: Mapping[str, str]
    options: tuple[str, ...] = ()
    has_file: bool = True

    def apply(self, text: str) -> None:
        """Save the guide's file so, or apply it."""
        raise NotImplementedError

    def run(self, *command: str, status: int = 0) -> str:
        """What `tidegate COMMAND` prints."""
        done = tidegate(*self.options, *command, environment=self.environment, timeout=280)
        assert done.returncode == status, (done.stdout, done.stderr)
        return done.stdout

    def rollout(self) -> dict[str, Any]:
        found = json.loads(self.run("rollout", "status", MODEL, "-o", "json"))
        assert isinstance(found["rollout"], dict)
        return dict(found["rollout"])

    def history(self) -> list[dict[str, Any]]:
        return list(json.loads(self.run("rollout", "history", MODEL, "-o", "json")))

    def change(self, step_ms: int) -> None:
        """Change the file so, and wait until it is seen."""
        before = self.rollout()["id"]
        self.apply(file_of_guide().replace("step_ms: 5", f"step_ms: {step_ms}"))
        wait_until(lambda: self.rollout()["id"] != before, timeout=30)


class GuideSteps:
    """In the guide's order; the platform is started once. The file has been applied."""

    def test_a_good_change_is_rolled_out(self, host: Host, traffic: Traffic) -> None:
        (first,) = host.history()
        assert first["state"] == "Serving"
        host.change(step_ms=4)
        lines = host.run("rollout", "status", MODEL, "-w", "--timeout", "4m").splitlines()
        assert "Completed: " in lines[-1]
        assert any("25 %" in line for line in lines)
        assert [it["number"] for it in host.history()] == [2, 1]
        assert set(traffic.answers) == {200}

    def test_a_bad_one_is_aborted_by_its_gate(self, host: Host, traffic: Traffic) -> None:
        stable = host.rollout()["target"]
        host.change(step_ms=60)
        shown = host.run("rollout", "status", MODEL, "--timeout", "4m", status=1)
        failed = {line.split(": ")[0] for line in shown.splitlines() if line.startswith("✗ ")}
        assert failed & {"✗ firstToken", "✗ betweenTokens"}
        view = host.rollout()
        assert (view["phase"], view["stable"], view["weight"]) == ("Aborted", stable, 0)
        refused = next(it for it in host.history() if it["revision"] == view["target"])
        assert refused["state"] == "Refused"
        assert set(traffic.answers) == {200}

    def test_it_stays_refused_until_somebody_says_retry(self, host: Host) -> None:
        before = host.rollout()
        host.run("rollout", "retry", MODEL)
        wait_until(lambda: host.rollout()["id"] != before["id"], timeout=30)
        assert host.rollout()["target"] == before["target"]

    def test_a_person_holds_it_and_aborts_it(self, host: Host) -> None:
        host.change(step_ms=2)
        host.run("rollout", "pause", MODEL)
        wait_until(lambda: host.rollout()["phase"] == "Paused", timeout=30)
        host.run("rollout", "status", MODEL, "--timeout", "1s", status=2)
        host.run("rollout", "resume", MODEL)
        wait_until(lambda: host.rollout()["phase"] != "Paused", timeout=30)
        host.run("rollout", "abort", MODEL)
        host.run("rollout", "status", MODEL, "--timeout", "1m", status=1)

    def test_a_person_who_knows_better_waits_for_no_step(self, host: Host, traffic: Traffic) -> None:
        host.change(step_ms=3)
        for weight in (25, 100):
            wait_until(lambda weight=weight: host.rollout()["weight"] == weight, timeout=60)  # type: ignore[misc]
            host.run("rollout", "promote", MODEL)
        host.run("rollout", "status", MODEL, "--timeout", "1m")
        assert host.rollout()["phase"] == "Completed"
        assert set(traffic.answers) == {200}

    def test_undo_brings_back_an_earlier_revision(self, host: Host, traffic: Traffic) -> None:
        first = next(it for it in host.history() if it["number"] == 1)
        assert "engine.args.step_ms" in host.run("rollout", "diff", MODEL, "1", "2")
        assert "starts" in host.run("rollout", "undo", MODEL, "--to-revision", "1", "--dry-run")
        host.run("rollout", "undo", MODEL, "--to-revision", "1")
        host.run("rollout", "status", MODEL, "--timeout", "4m")
        assert host.rollout()["target"] == first["revision"]
        assert f"An undo holds revision {first['revision']}" in host.run("models", MODEL)
        assert set(traffic.answers) == {200}

    def test_without_the_file(self, host: Host) -> None:
        known = {it["revision"] for it in host.history()}
        assert "starts" in host.run("models", "set", MODEL, "engine.args={step_ms: 7}", "--dry-run")
        host.run("models", "set", MODEL, "engine.args={step_ms: 7}")
        wait_until(lambda: host.rollout()["target"] not in known, timeout=30)
        host.run("rollout", "abort", MODEL, "--dry-run")
        host.run("rollout", "abort", MODEL)
        if host.has_file:
            assert "not its file's" in host.run("models", MODEL)
        host.run("models", "scale", MODEL, "--min", "1", "--max", "2")
        host.run("models", "restart", MODEL, "--yes")
        host.run("models", "drain", MODEL, "--yes")
        host.run("models", "drain", MODEL, "--end")
