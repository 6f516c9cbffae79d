"""Checkpoints in an S3 bucket, or in one of another store that speaks S3. The only module that does.

What is downloaded lies under a name made of the objects' own checksums, so a folder never changes once it is
whole, an interrupted download goes on with the files that are missing, and two downloads of the same
checkpoint cannot disturb each other. Credentials, region and endpoint come from the usual `AWS_*` variables;
without credentials requests are not signed, as for a public bucket.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from xml.etree import ElementTree

import httpx

from tidegate.aws_signature import Credentials, encoded_path, encoded_query, signed_headers
from tidegate.errors import SourceError

Progress = Callable[[str, int, int], None]

COMMIT_DIGITS = 40
DEFAULT_REGION = "us-east-1"
MAX_OBJECTS = 10_000
READ_BYTES = 1 << 20
CONNECTIONS_RETRIES = 3
NOT_FOUND = frozenset({"NoSuchBucket", "NoSuchKey", "404"})
REFUSED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403"})


@dataclass(frozen=True, slots=True)
class S3Object:
    key: str
    name: str  # below the prefix
    size: int
    tag: str  # its ETag: changes with its content


def fetch(
    uri: str,
    cache: Path,
    wanted: list[str],
    progress: Progress | None = None,
    environment: Mapping[str, str] = os.environ,
) -> tuple[Path, str]:
    """Download what is missing of `s3://bucket/prefix`; its folder, and a name for the content as it is now.

    `wanted` are patterns of file names. Raises `SourceError`.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    try:
        with S3(uri, bucket, environment) as store:
            objects = _wanted(uri, store.objects(f"{prefix}/" if prefix else ""), wanted)
            commit = _commit(objects)
            folder = cache / "s3" / bucket / (prefix or "_") / commit
            for item in objects:
                _download(store, item, folder / item.name, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceError(
                "NoSpace", f"The disk has no room for {uri}; enlarge the weight cache."
            ) from error
        raise SourceError("SourceUnavailable", f"{uri} could not be kept: {error}") from error
    return folder, commit


class S3:
    """One bucket. `with S3(uri, bucket, environment) as store`. All calls raise `SourceError`."""

    def __init__(self, uri: str, bucket: str, environment: Mapping[str, str]) -> None:
        self._uri = uri
        self._bucket = bucket
        self._region = (
            environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or DEFAULT_REGION
        )
        self._endpoint = _endpoint(environment, self._region)
        self._credentials = _credentials(environment)
        self._client = httpx.Client(
            timeout=httpx.Timeout(60, connect=10),
            transport=httpx.HTTPTransport(retries=CONNECTIONS_RETRIES),
        )

    def __enter__(self) -> S3:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def objects(self, prefix: str) -> Iterator[S3Object]:
        """Every object whose key begins with `prefix`."""
        query = {"list-type": "2", "prefix": prefix}
        while True:
            page = self._page(query)
            for item in page.iterfind("{*}Contents"):
                key = item.findtext("{*}Key", "")
                tag = item.findtext("{*}ETag", "").strip('"')
                yield S3Object(key, key.removeprefix(prefix), int(item.findtext("{*}Size", "0")), tag)
            token = page.findtext("{*}NextContinuationToken", "")
            if not token:
                return
            query["continuation-token"] = token

    def chunks(self, item: S3Object) -> Iterator[bytes]:
        """The content of an object, if it is still the one that was listed."""
        request = self._request(f"/{self._bucket}/{item.key}", {}, {"if-match": f'"{item.tag}"'})
        try:
            response = self._client.send(request, stream=True)
            try:
                if not response.is_success:
                    response.read()
                    raise self._refusal(response)
                yield from response.iter_raw(READ_BYTES)
            finally:
                response.close()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _page(self, query: Mapping[str, str]) -> ElementTree.Element:
        request = self._request(f"/{self._bucket}", query, {})
        try:
            response = self._client.send(request)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise self._refusal(response)
        return _xml(response.content, self._uri)

    def _request(self, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> httpx.Request:
        parts = urlsplit(self._endpoint)
        path = parts.path.rstrip("/") + path
        if self._credentials is not None:
            headers = signed_headers(
                "GET", parts.netloc, path, query, headers, self._credentials, self._region, datetime.now(UTC)
            )
        url = f"{parts.scheme}://{parts.netloc}{encoded_path(path)}"
        if query:
            url += f"?{encoded_query(query)}"
        return self._client.build_request("GET", url, headers=headers)

    def _unreachable(self, error: httpx.HTTPError) -> SourceError:
        return SourceError("Offline", f"{self._uri} cannot be reached at {self._endpoint}: {error!r}.")

    def _refusal(self, response: httpx.Response) -> SourceError:
        code = str(response.status_code)
        with contextlib.suppress(ElementTree.ParseError):  # not every store says more than the status
            code = ElementTree.fromstring(response.content).findtext("{*}Code") or code  # noqa: S314
        if code in NOT_FOUND:
            return SourceError(
                "SourceNotFound", f"{self._uri} does not exist ({code}); check spec.source.uri."
            )
        if code in REFUSED:
            what = "refuses the credentials" if self._credentials else "needs credentials"
            return SourceError(
                "Unauthorized",
                f"{self._uri} {what} ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the "
                "Secret that spec.source.secretRef names.",
            )
        if code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            return SourceError(
                "SourceUnavailable",
                f"{self._uri} lies in another region than {self._region}; set AWS_REGION.",
            )
        if code == "PreconditionFailed" or response.status_code == httpx.codes.PRECONDITION_FAILED:
            return SourceError(
                "SourceUnavailable", f"{self._uri} changed while it was read; it is tried again."
            )
        return SourceError("SourceUnavailable", f"{self._uri} could not be read ({code}).")


def _endpoint(environment: Mapping[str, str], region: str) -> str:
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    if not endpoint:
        return f"https://s3.{region}.amazonaws.com"
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
        raise SourceError("SourceUnavailable", f"AWS_ENDPOINT_URL is {endpoint!r}; write https://host:port.")
    return endpoint


def _credentials(environment: Mapping[str, str]) -> Credentials | None:
    key, secret = environment.get("AWS_ACCESS_KEY_ID", ""), environment.get("AWS_SECRET_ACCESS_KEY", "")
    if bool(key) != bool(secret):
        missing = "AWS_SECRET_ACCESS_KEY" if key else "AWS_ACCESS_KEY_ID"
        raise SourceError("Unauthorized", f"{missing} is not set; the Secret needs both keys.")
    return Credentials(key, secret, environment.get("AWS_SESSION_TOKEN", "")) if key else None


def _wanted(uri: str, objects: Iterator[S3Object], patterns: list[str]) -> list[S3Object]:
    """Those of a checkpoint, by name. A key that would lie outside the folder is none."""
    found: list[S3Object] = []
    for item in objects:
        path = PurePosixPath(item.name)
        is_file = bool(item.name) and not item.name.endswith("/")
        if not is_file or path.is_absolute() or ".." in path.parts:
            continue
        if any(fnmatch(path.name, pattern) for pattern in patterns):
            found.append(item)
        if len(found) > MAX_OBJECTS:
            raise SourceError(
                "SourceFormat",
                f"{uri} holds more than {MAX_OBJECTS} files; give the checkpoint's own prefix.",
            )
    if not found:
        raise SourceError(
            "SourceNotFound",
            f"No file of a checkpoint lies at {uri}; check bucket and prefix in spec.source.uri.",
        )
    return sorted(found, key=lambda item: item.name)


def _commit(objects: list[S3Object]) -> str:
    total = hashlib.sha256()
    for item in objects:
        total.update(f"{item.name}\0{item.size}\0{item.tag}\0".encode())
    return total.hexdigest()[:COMMIT_DIGITS]


def _download(store: S3, item: S3Object, path: Path, progress: Progress | None) -> None:
    if path.is_file() and path.stat().st_size == item.size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    done = 0
    try:
        with partial.open("wb") as file:
            for chunk in store.chunks(item):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(item.name, done, item.size)
        if done != item.size:
            raise SourceError("SourceUnavailable", f"{item.key} ended after {done} of {item.size} bytes.")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _xml(content: bytes, uri: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(content)  # noqa: S314 - expat itself refuses entities that explode
    except ElementTree.ParseError as error:
        raise SourceError("SourceUnavailable", f"{uri}: the answer is not S3's: {error}.") from error
