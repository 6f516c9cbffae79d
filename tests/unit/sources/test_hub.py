"""Downloads from the hub by its own library, against a small server that speaks as much of the hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.unit.sources.builders import LLAMA, REFUSED, safetensors

NAME, COMMIT = "owner/name", "c" * 40


class Hub(ThreadingHTTPServer):
    """One model's `files`; `read` are those whose content was asked for, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.read: list[str] = []
        self.looked_up = 0


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        if path.startswith(f"api/models/{NAME}/revision/"):
            self.server.looked_up += 1
            self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        elif path == f"api/models/{NAME}/tree/{COMMIT}":
            self.answer(
                json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(body), "oid": digest(body)}
                        for name, body in self.server.files.items()
                    ]
                ).encode()
            )
        elif (name := path.removeprefix(f"{NAME}/resolve/{COMMIT}/")) in self.server.files:
            if self.command == "GET":
                self.server.read.append(name)
            self.answer(self.server.files[name])
        else:
            self.send_error(404)

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", f'"{digest(body)}"')
        self.send_header("x-repo-commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    weights = tmp_path / "model.safetensors"
    safetensors(weights)
    server.files = {
        "model.safetensors": weights.read_bytes(),
        "tokenizer.json": b"{}",
        "config.json": json.dumps(LLAMA | {"num_hidden_layers": 2}).encode(),
        "pytorch_model.bin": b"not wanted",
    }
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def resolved(hub: Hub, home: Path, revision: str = "") -> dict[str, Any]:
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    answer = subprocess.run(
        [sys.executable, "-m", "tidegate.sources", "resolve", f"hf://{NAME}{revision}"],
        env={**environment, "HF_ENDPOINT": address, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_what_a_checkpoint_needs_is_downloaded_once(hub: Hub, tmp_path: Path, revision: str) -> None:
    found = resolved(hub, tmp_path, revision)
    assert (found["architecture"], found["commit"]) == ("LlamaForCausalLM", COMMIT)
    assert set(found["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert hub.read[0] == "config.json"
    assert sorted(hub.read) == sorted(found["files"])
    assert hub.looked_up == (revision != f"@{COMMIT}")
    assert resolved(hub, tmp_path, revision) == found
    assert sorted(hub.read) == sorted(found["files"])


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_is_refused_is_not_downloaded(
    hub: Hub, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    hub.files |= {name: json.dumps(content).encode() for name, content in changes.items()}
    error = resolved(hub, tmp_path)["error"]
    assert (error["reason"] in ("UnsupportedModel", "SourceFormat"), words in error["message"]) == (
        True,
        True,
    )
    assert set(hub.read) == {"config.json", *changes}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.safetensors": b"", "README.md": b""}, f"hf://{NAME} has no config.json"),
        ({"adapter_model.safetensors": b"", "adapter_config.json": b"{}"}, "is an adapter"),
    ],
)
def test_what_has_no_config_is_not_downloaded(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    hub.files = files
    error = resolved(hub, tmp_path)["error"]
    assert (error["reason"], words in error["message"]) == ("SourceFormat", True)
    assert set(hub.read) == {name for name in files if name.endswith(".json")}
