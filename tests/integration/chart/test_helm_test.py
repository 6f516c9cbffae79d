"""What the pod of `helm test` asks, over real HTTP, by the command that the chart renders."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from tests.integration.chart.rendered import Helm, one

KEY = "tg-the-admins"


class Gateway(http.server.BaseHTTPRequestHandler):
    unready: ClassVar[int] = 0  # answers of /readyz before it is

    def do_GET(self) -> None:
        if self.path == "/readyz":
            if type(self).unready:
                type(self).unready -= 1
                return self.answer(503, {"error": {"message": "Redis is away"}})
            return self.answer(200, {})
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.answer(401, {"error": {"message": "no such key"}})
        return self.answer(200, {"data": [{"id": "tide-demo"}]})

    def answer(self, status: int, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def gateway(unready: int = 0) -> Iterator[str]:
    handler = type("Handler", (Gateway,), {"unready": unready})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def ask(helm: Helm, tmp_path: Path, address: str, key: str, seconds: str = "20") -> tuple[int, str]:
    (container,) = one(helm.objects("defaults"), "Pod", "tidegate-test")["spec"]["containers"]
    program, option, text, url, key_file, limit = container["command"]
    assert (program, option) == ("python", "-c")
    assert url == "http://tidegate-gateway.system.svc:8000"
    assert limit == "120"
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [str(Path(key_file).parent)]
    (tmp_path / "key").write_text(key)
    done = subprocess.run(
        [sys.executable, option, text, address, str(tmp_path / "key"), seconds],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_it_names_the_models(helm: Helm, tmp_path: Path) -> None:
    with gateway() as address:
        code, said = ask(helm, tmp_path, address, f"{KEY}\n")
    assert code == 0
    assert "models: tide-demo" in said


def test_it_waits_for_a_gateway_that_starts(helm: Helm, tmp_path: Path) -> None:
    with gateway(unready=1) as address:
        assert ask(helm, tmp_path, address, KEY)[0] == 0


@pytest.mark.parametrize(
    ("unready", "key", "says"),
    [
        (1000, KEY, '503, {"error": {"message": "Redis is away"}}'),
        (0, "tg-another", "do not know the Secret's admin key"),
    ],
)
def test_it_says_what_is_wrong(unready: int, key: str, says: str, helm: Helm, tmp_path: Path) -> None:
    with gateway(unready) as address:
        code, said = ask(helm, tmp_path, address, key, "0.1")
    assert code == 1
    assert says in said


def test_nobody_at_all(helm: Helm, tmp_path: Path) -> None:
    with gateway() as address:
        pass
    code, said = ask(helm, tmp_path, address, KEY, "0.1")
    assert code == 1
    assert "no answer" in said
