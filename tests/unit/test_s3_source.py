"""Downloads from a bucket, against a small server that speaks S3."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from tests.unit.test_sources import safetensors
from tidegate.errors import SourceError
from tidegate.s3_source import fetch
from tidegate.sources import WANTED_FILES, Places, resolve

PAGE = 2  # objects per page of a listing


class Bucket(ThreadingHTTPServer):
    """`objects` by key; with `needs_key` unsigned requests are refused."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.needs_key = False
        self.gets: list[str] = []
        self.cut_after = 0  # bytes of an object after which the connection ends
        self.tells_length = True

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}"}


class _Handler(BaseHTTPRequestHandler):
    server: Bucket

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        _, bucket, *rest = unquote(parts.path).split("/", 2)
        if self.server.needs_key and "Credential=AK/" not in self.headers.get("authorization", ""):
            return self.error(403, "AccessDenied")
        if bucket != "models":
            return self.error(404, "NoSuchBucket")
        if not rest:
            return self.listing({name: values[0] for name, values in parse_qs(parts.query).items()})
        key = rest[0]
        body = self.server.objects[key]
        if self.headers.get("if-match") != f'"{tag(body)}"':
            return self.error(412, "PreconditionFailed")
        self.server.gets.append(key)
        self.send_response(200)
        if self.server.tells_length:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut_after] if self.server.cut_after else body)
        self.close_connection = True
        return None

    def listing(self, query: dict[str, str]) -> None:
        found = sorted(key for key in self.server.objects if key.startswith(query["prefix"]))
        start = int(query.get("continuation-token", "0"))
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[key])}</Size>"
            f"<ETag>&quot;{tag(self.server.objects[key])}&quot;</ETag></Contents>"
            for key in found[start : start + PAGE]
        )
        if start + PAGE < len(found):
            items += f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>"
        name_space = "http://s3.amazonaws.com/doc/2006-03-01/"
        self.answer(200, f'<ListBucketResult xmlns="{name_space}">{items}</ListBucketResult>')

    def error(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code></Error>")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        return


def tag(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    server = Bucket()
    weights = tmp_path / "model.safetensors"
    safetensors(weights)
    server.objects = {
        "llama/config.json": b'{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}',
        "llama/model.safetensors": weights.read_bytes(),
        "llama/tokenizer.json": b"{}",
        "llama/pytorch_model.bin": b"not wanted",
        "llama/../../escape.json": b"{}",
        "llama-2/config.json": b"{}",
    }
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def refusal(
    bucket: Bucket, cache: Path, uri: str = "s3://models/llama", **environment: str
) -> tuple[str, str]:
    with pytest.raises(SourceError) as refused:
        fetch(uri, cache, WANTED_FILES, environment={**bucket.environment, **environment})
    return refused.value.source_reason, refused.value.message


def test_what_a_checkpoint_needs_is_downloaded_once(bucket: Bucket, tmp_path: Path) -> None:
    folder, commit = fetch("s3://models/llama/", tmp_path, WANTED_FILES, environment=bucket.environment)
    assert folder == tmp_path / "s3" / "models" / "llama" / commit
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == bucket.objects["llama/model.safetensors"]
    assert not list(tmp_path.rglob("*escape*"))
    bucket.gets.clear()
    assert fetch("s3://models/llama", tmp_path, WANTED_FILES, environment=bucket.environment) == (
        folder,
        commit,
    )
    assert bucket.gets == []


def test_another_content_is_another_folder(bucket: Bucket, tmp_path: Path) -> None:
    before, _ = fetch("s3://models/llama", tmp_path, WANTED_FILES, environment=bucket.environment)
    bucket.objects["llama/tokenizer.json"] = b"[]"
    after, _ = fetch("s3://models/llama", tmp_path, WANTED_FILES, environment=bucket.environment)
    assert before != after
    assert (before / "tokenizer.json").read_bytes() == b"{}"


def test_the_whole_way(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.environment["AWS_ENDPOINT_URL"])
    found = resolve("s3://models/llama", Places(tmp_path))
    assert (found.architecture, found.shape["layers"], found.precision) == ("LlamaForCausalLM", 2, "bfloat16")
    assert found.commit and found.commit in found.path


def test_credentials(bucket: Bucket, tmp_path: Path) -> None:
    bucket.needs_key = True
    reason, message = refusal(bucket, tmp_path)
    assert (reason, "needs credentials" in message) == ("Unauthorized", True)
    assert "AWS_SECRET_ACCESS_KEY is not set" in refusal(bucket, tmp_path, AWS_ACCESS_KEY_ID="AK")[1]
    reason, message = refusal(bucket, tmp_path, AWS_ACCESS_KEY_ID="BAD", AWS_SECRET_ACCESS_KEY="SECRET")
    assert (reason, "refuses the credentials" in message) == ("Unauthorized", True)
    assert "SECRET." not in message
    keys = {**bucket.environment, "AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SK"}
    fetch("s3://models/llama", tmp_path, WANTED_FILES, environment=keys)


@pytest.mark.parametrize("uri", ["s3://models/none", "s3://other/llama"])
def test_nothing_there(bucket: Bucket, tmp_path: Path, uri: str) -> None:
    reason, message = refusal(bucket, tmp_path, uri)
    assert (reason, uri in message) == ("SourceNotFound", True)


def test_nobody_answers(bucket: Bucket, tmp_path: Path) -> None:
    assert refusal(bucket, tmp_path, AWS_ENDPOINT_URL="http://127.0.0.1:9")[0] == "Offline"
    assert "write https://host:port" in refusal(bucket, tmp_path, AWS_ENDPOINT_URL="minio:9000")[1]


@pytest.mark.parametrize("tells_length", [True, False])
def test_a_cut_download_is_no_file_and_goes_on_later(
    bucket: Bucket, tmp_path: Path, tells_length: bool
) -> None:
    bucket.cut_after, bucket.tells_length = 3, tells_length
    assert refusal(bucket, tmp_path)[0] in ("Offline", "SourceUnavailable")
    assert not [path for path in (tmp_path / "s3").rglob("*") if path.is_file()]
    bucket.cut_after = 0
    fetch("s3://models/llama", tmp_path, WANTED_FILES, environment=bucket.environment)


def test_what_is_no_store(bucket: Bucket, tmp_path: Path) -> None:
    bucket.objects = {"llama/notes.md": json.dumps({}).encode()}
    assert refusal(bucket, tmp_path)[0] == "SourceNotFound"
