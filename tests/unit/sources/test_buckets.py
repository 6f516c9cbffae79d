"""Downloads from a bucket, against a small server that speaks S3 and, as Google does, much the same for gs://."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.unit.sources.builders import LLAMA, REFUSED, safetensors
from tidegate.errors import SourceError
from tidegate.sources.buckets import fetch
from tidegate.sources.resolve import resolve
from tidegate.sources.schemes import Storage

PAGE = 2  # objects per page of a listing
WHEN = "2026-01-02T03:04:05.000Z"
VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GOOGLE_BASE_URL", "GOOGLE_SERVICE_ACCOUNT"),
    *("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS"),
)


class Bucket(ThreadingHTTPServer):
    """`objects` by key; with `needs_key` unsigned requests are refused, with `fails` all are."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.needs_key = ""
        self.fails: tuple[int, str] | None = None
        self.gets: list[tuple[str, str]] = []  # key, range
        self.cut_after = 0  # bytes of an answer after which the connection ends
        self.cuts_left = 1000
        self.tells_length = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Bucket

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        _, bucket, *rest = unquote(parts.path).split("/", 2)
        if self.server.fails is not None:
            return self.error(*self.server.fails)
        if self.server.needs_key and self.server.needs_key not in self.headers.get("authorization", ""):
            return self.error(403, "AccessDenied")
        if bucket != "models":
            return self.error(404, "NoSuchBucket")
        if not rest:
            return self.listing({name: values[0] for name, values in parse_qs(parts.query).items()})
        key = rest[0]
        body = self.server.objects[key]
        if self.headers.get("if-match") != f'"{tag(body)}"':
            return self.error(412, "PreconditionFailed")
        asked = self.headers.get("range", "")
        self.server.gets.append((key, asked))
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("etag", f'"{tag(body)}"')
        self.send_header("last-modified", "Fri, 02 Jan 2026 03:04:05 GMT")
        if asked:
            self.send_header("content-range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        body = body[first:]
        if self.server.tells_length:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.server.cut_after and self.server.cuts_left:
            self.server.cuts_left -= 1
            body = body[: self.server.cut_after]
        self.wfile.write(body)
        self.close_connection = True
        return None

    def listing(self, query: dict[str, str]) -> None:
        found = sorted(key for key in self.server.objects if key.startswith(query.get("prefix", "")))
        start = int(query.get("continuation-token", "0"))
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[key])}</Size>"
            f"<LastModified>{WHEN}</LastModified>"
            f"<ETag>&quot;{tag(self.server.objects[key])}&quot;</ETag></Contents>"
            for key in found[start : start + PAGE]
        )
        if start + PAGE < len(found):
            items += f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>"
        name_space = "http://s3.amazonaws.com/doc/2006-03-01/"
        self.answer(200, f'<ListBucketResult xmlns="{name_space}">{items}</ListBucketResult>')

    def error(self, status: int, code: str) -> None:
        self.answer(
            status, f"<?xml version='1.0'?>\n<Error><Code>{code}</Code></Error>" if code else "<html>"
        )

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        return


def accept(_folder: Path) -> None:
    """Checks nothing."""


def tag(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = Bucket()
    weights = tmp_path / "model.safetensors"
    safetensors(weights)
    server.objects = {
        "llama/": b"",  # as a console makes a folder
        "llama/config.json": json.dumps(LLAMA | {"num_hidden_layers": 2}).encode(),
        "llama/model.safetensors": weights.read_bytes(),
        "llama/tokenizer.json": b"{}",
        "llama/a b/ü+&%41.json": b"{}",
        "llama/pytorch_model.bin": b"not wanted",
        "llama-2/config.json": b"{}",
    }
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("GOOGLE_BASE_URL", server.address)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def refusal(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    def fetched(uri: str = "s3://models/llama", **environment: str) -> tuple[str, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SourceError) as refused:
            fetch(uri, Storage(tmp_path), None, accept)
        return refused.value.source_reason, refused.value.message

    return fetched


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_what_a_checkpoint_needs_is_downloaded_once(bucket: Bucket, tmp_path: Path, scheme: str) -> None:
    moved: dict[str, tuple[int, int]] = {}
    folder, commit = fetch(
        f"{scheme}://models/llama/", Storage(tmp_path), lambda name, *done: moved.update({name: done}), accept
    )
    assert folder == tmp_path / scheme / "models" / "llama" / commit
    wanted = {
        key.removeprefix("llama/"): body
        for key, body in bucket.objects.items()
        if key.startswith("llama/") and key.endswith((".json", ".safetensors"))
    }
    assert {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } == wanted
    assert moved == {name: (len(body), len(body)) for name, body in wanted.items()}
    bucket.gets.clear()
    assert fetch(f"{scheme}://models/llama", Storage(tmp_path), None, accept) == (folder, commit)
    assert bucket.gets == []


def test_a_folder_that_the_version_before_downloaded_is_found(bucket: Bucket, tmp_path: Path) -> None:
    bucket.objects = {"llama/config.json": b"{}"}
    _, commit = fetch("s3://models/llama", Storage(tmp_path), None, accept)
    content = f"config.json\0002\0{tag(b'{}')}\0"
    assert commit == hashlib.sha256(content.encode()).hexdigest()[:40]


def test_a_whole_bucket_is_a_checkpoint(bucket: Bucket, tmp_path: Path) -> None:
    folder, _ = fetch("s3://models", Storage(tmp_path), None, accept)
    assert (folder / "llama-2" / "config.json").read_bytes() == b"{}"
    assert folder.parent == tmp_path / "s3" / "models" / "_"


def test_another_content_is_another_folder(bucket: Bucket, tmp_path: Path) -> None:
    before, _ = fetch("s3://models/llama", Storage(tmp_path), None, accept)
    bucket.objects["llama/tokenizer.json"] = b"[]"
    after, _ = fetch("s3://models/llama", Storage(tmp_path), None, accept)
    assert before != after
    assert (before / "tokenizer.json").read_bytes() == b"{}"


def test_an_earlier_content_is_what_an_earlier_download_left(bucket: Bucket, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    folder, commit = fetch("s3://models/llama", storage, None, accept)
    bucket.objects["llama/tokenizer.json"] = b"[]"
    assert fetch("s3://models/llama", storage, None, accept, commit) == (folder, commit)
    bucket.objects.clear()
    assert fetch("s3://models/llama", storage, None, accept, commit) == (folder, commit)
    bucket.objects["llama/config.json"] = b"{}"
    with pytest.raises(SourceError, match=f"other objects now than those of {commit}") as refused:
        fetch("s3://models/llama", Storage(tmp_path / "empty"), None, accept, commit)
    assert refused.value.source_reason == "SourceChanged"


def test_what_changes_between_listing_and_reading_is_not_taken(
    bucket: Bucket, refusal: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.objects = {"llama/config.json": b"{}"}
    answer = _Handler.answer

    def change(handler: _Handler, status: int, text: str) -> None:  # the listing is made, and not yet sent
        bucket.objects["llama/config.json"] = b"{ }"
        answer(handler, status, text)

    monkeypatch.setattr(_Handler, "answer", change)
    reason, message = refusal()
    assert (reason, "changed while it was read" in message) == ("SourceUnavailable", True)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_the_whole_way(bucket: Bucket, tmp_path: Path, scheme: str) -> None:
    found = resolve(f"{scheme}://models/llama", Storage(tmp_path))
    assert (found.architecture, found.shape.layers, found.precision) == ("LlamaForCausalLM", 2, "bfloat16")
    assert found.commit and found.commit in found.path


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_is_refused_is_not_downloaded(
    bucket: Bucket, tmp_path: Path, scheme: str, changes: dict[str, Any], words: str
) -> None:
    described = {name: json.dumps(content).encode() for name, content in changes.items()}
    bucket.objects |= {f"llama/{name}": content for name, content in described.items()}
    with pytest.raises(SourceError, match=words) as refused:
        resolve(f"{scheme}://models/llama", Storage(tmp_path))
    assert refused.value.source_reason in ("UnsupportedModel", "SourceFormat")
    assert {key for key, _ in bucket.gets} == {"llama/config.json", *(f"llama/{name}" for name in changes)}


def test_credentials_for_s3(
    bucket: Bucket, tmp_path: Path, refusal: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.needs_key = "Credential=AK/"
    reason, message = refusal()
    assert (reason, "needs credentials" in message) == ("Unauthorized", True)
    assert "AWS_SECRET_ACCESS_KEY is not set" in refusal(AWS_ACCESS_KEY_ID="AK")[1]
    reason, message = refusal(AWS_ACCESS_KEY_ID="BAD", AWS_SECRET_ACCESS_KEY="SECRET")
    assert (reason, "refuses the credentials" in message) == ("Unauthorized", True)
    assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the Secret" in message
    assert "SECRET." not in message
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    fetch("s3://models/llama", Storage(tmp_path), None, accept)


def test_the_region_is_signed_for(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.needs_key = "/eu-west-1/s3/aws4_request"
    for name, value in (("ACCESS_KEY_ID", "AK"), ("SECRET_ACCESS_KEY", "SK"), ("REGION", "eu-west-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    fetch("s3://models/llama", Storage(tmp_path), None, accept)


def test_credentials_for_google(
    bucket: Bucket, tmp_path: Path, refusal: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key of its own; that Google takes such a token needs an account and is not tried here."""
    bucket.needs_key = "Bearer ey"
    uri = "gs://models/llama"
    reason, message = refusal(uri)
    assert (reason, "needs credentials" in message) == ("Unauthorized", True)
    assert "check GOOGLE_SERVICE_ACCOUNT_KEY in the Secret" in message
    reason, message = refusal(uri, GOOGLE_SERVICE_ACCOUNT_KEY='"no JSON key')
    assert (reason, "the JSON key of a service account" in message) == ("Unauthorized", True)
    assert "no JSON key" not in message
    account = {
        "type": "service_account",
        "client_email": "tidegate@project.iam.gserviceaccount.com",
        "private_key_id": "1",
        "private_key": rsa.generate_private_key(65537, 2048)
        .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        .decode(),
    }
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    folder, _ = fetch(uri, Storage(tmp_path), None, accept)
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY")
    file = tmp_path / "key.json"
    file.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    assert fetch(uri, Storage(tmp_path), None, accept)[0] == folder
    file.unlink()
    assert "name the file of" in refusal(uri)[1]


@pytest.mark.parametrize("uri", ["s3://models/none", "s3://other/llama", "gs://other/llama"])
def test_nothing_there(uri: str, refusal: Callable[..., tuple[str, str]]) -> None:
    reason, message = refusal(uri)
    assert (reason, uri in message) == ("SourceNotFound", True)


def test_nobody_answers(refusal: Callable[..., tuple[str, str]]) -> None:
    reason, message = refusal(AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert reason == "Offline"
    assert "\n" not in message
    assert (
        "AWS_ENDPOINT_URL is 'minio:9000'; write https://host:port"
        in refusal(AWS_ENDPOINT_URL="minio:9000")[1]
    )
    assert "write https://host:port" in refusal("gs://models/llama", GOOGLE_BASE_URL="fake:9000")[1]


@pytest.mark.parametrize(
    ("status", "code", "reason", "words"),
    [
        (301, "PermanentRedirect", "SourceUnavailable", "another region than eu-central-1; set AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", "SourceUnavailable", "another region than eu-central-1"),
        (403, "", "Unauthorized", "needs credentials (403)"),
        (401, "", "Unauthorized", "needs credentials (401)"),
        (404, "", "SourceNotFound", "does not exist (404)"),
        (400, "InvalidRequest", "SourceUnavailable", "could not be read (InvalidRequest)"),
        (503, "SlowDown", "SourceUnavailable", "could not be read (SlowDown)"),
        (200, "", "SourceUnavailable", "could not be read (Generic S3 error: Got invalid list response"),
    ],
)
def test_each_refusal_of_a_store_has_its_sentence(
    bucket: Bucket,
    refusal: Callable[..., tuple[str, str]],
    status: int,
    code: str,
    reason: str,
    words: str,
) -> None:
    bucket.fails = (status, code)
    found, message = refusal(AWS_REGION="eu-central-1")
    assert found == reason
    assert words in message


@pytest.mark.parametrize("tells_length", [True, False])
def test_a_cut_download_is_no_file_and_goes_on_later(
    bucket: Bucket, tmp_path: Path, refusal: Callable[..., tuple[str, str]], tells_length: bool
) -> None:
    bucket.objects = {key: body for key, body in bucket.objects.items() if len(body) > 20}
    bucket.cut_after, bucket.tells_length = 3, tells_length
    assert refusal()[0] in ("Offline", "SourceUnavailable")
    assert not [path for path in (tmp_path / "s3").rglob("*") if path.is_file()]
    bucket.cut_after, bucket.tells_length = 0, True
    fetch("s3://models/llama", Storage(tmp_path), None, accept)


def test_a_broken_connection_goes_on_where_it_broke(bucket: Bucket, tmp_path: Path) -> None:
    key = "llama/model.safetensors"
    bucket.objects = {key: bucket.objects[key]}
    bucket.cut_after, bucket.cuts_left = 3, 2
    folder, _ = fetch("s3://models/llama", Storage(tmp_path), None, accept)
    assert (folder / "model.safetensors").read_bytes() == bucket.objects[key]
    last = len(bucket.objects[key]) - 1
    assert bucket.gets == [(key, ""), (key, f"bytes=3-{last}"), (key, f"bytes=6-{last}")]


def test_what_is_no_checkpoint(bucket: Bucket, refusal: Callable[..., tuple[str, str]]) -> None:
    bucket.objects = {"llama/notes.md": json.dumps({}).encode()}
    assert refusal()[0] == "SourceNotFound"


@pytest.mark.parametrize("name", ["llama/../../escape.json", "llama//escape.json"])
def test_a_name_that_is_no_path_is_refused(
    bucket: Bucket, tmp_path: Path, refusal: Callable[..., tuple[str, str]], name: str
) -> None:
    bucket.objects[name] = b"{}"
    reason, message = refusal()
    assert (reason, name in message, "\n" in message) == ("SourceFormat", True, False)
    assert not list(tmp_path.rglob("*escape*"))
