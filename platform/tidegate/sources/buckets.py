"""Checkpoints in a bucket of S3, of another store that speaks S3, or of Google Cloud Storage.

What is downloaded lies under a name made of the objects' own checksums, so a folder never changes once it is
whole, an interrupted download goes on with the files that are missing, and two downloads of the same
checkpoint cannot disturb each other. obstore takes credentials, region and endpoint from the usual `AWS_*`
and `GOOGLE_*` variables; without credentials requests are not signed, as for a public bucket.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import platformdirs
from obstore.exceptions import BaseError, InvalidPathError
from obstore.store import GCSStore, S3Store

from tidegate.errors import SourceError
from tidegate.sources.checkpoint import DESCRIPTIONS
from tidegate.sources.schemes import SCHEMES, WANTED_FILES, Check, Progress, Storage

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

COMMIT_DIGITS = 40
MAX_OBJECTS = 10_000
READ_BYTES = 1 << 20
# A download of hundreds of gigabytes may take hours; a connection that stalls is given up much earlier.
TIMEOUTS: ClientConfig = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "6h"}
RETRIES: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(hours=6)}
ENDPOINTS = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "gs": ("GOOGLE_BASE_URL",)}
GOOGLE_CREDENTIALS = ("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS")
NOT_FOUND = frozenset({"NoSuchBucket", "NoSuchKey", "404"})
REFUSED = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "401", "403"}
)
OTHER_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed"})


def fetch(
    uri: str, storage: Storage, progress: Progress | None, check: Check, commit: str = ""
) -> tuple[Path, str]:
    """Download what is missing, what describes the weights first; return its folder, and a name for the
    content as it is now. Of an earlier `commit` there is what an earlier download left.

    Raises `SourceError`.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    cache = storage.cache or platformdirs.user_cache_path("tidegate", appauthor=False)
    place = cache / scheme / bucket / (prefix or "_")
    try:
        store = Bucket(uri, scheme, bucket)
        objects = _wanted(uri, store.objects(prefix), f"{prefix}/" if prefix else "")
        found = _commit(objects)
        if commit and commit != found:
            raise SourceError(
                "SourceChanged",
                f"{uri} holds other objects now than those of {commit}, and {place} has no copy of these.",
            )
        folder = place / found
        for name in (name for name in DESCRIPTIONS if name in objects):
            _download(store, objects[name], folder / name, name, progress)
        check(folder)
        for name, item in objects.items():
            _download(store, item, folder / name, name, progress)
    except SourceError:
        if commit and (place / commit).is_dir():
            return place / commit, commit
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceError(
                "NoSpace", f"The disk has no room for {uri}; enlarge the weight cache."
            ) from error
        raise SourceError("SourceUnavailable", f"{uri} could not be kept: {error}") from error
    return folder, found


class Bucket:
    """One bucket, read with what the environment says. All calls raise `SourceError`."""

    def __init__(self, uri: str, scheme: str, bucket: str) -> None:
        self._uri, self._scheme = uri, scheme
        options: ClientConfig = {**TIMEOUTS, "allow_http": _endpoint(scheme).startswith("http://")}
        self._is_signed = _has_aws_keys() if scheme == "s3" else any(map(os.environ.get, GOOGLE_CREDENTIALS))
        kind = S3Store if scheme == "s3" else GCSStore
        try:
            self._store: S3Store | GCSStore = kind(
                bucket, skip_signature=not self._is_signed, client_options=options, retry_config=RETRIES
            )
        except BaseError as error:  # its words may quote the key
            raise SourceError(
                "Unauthorized",
                f"{uri}: the credentials cannot be read; {' or '.join(GOOGLE_CREDENTIALS)} is to hold, or to "
                "name the file of, the JSON key of a service account.",
            ) from error

    def objects(self, prefix: str) -> Iterator[ObjectMeta]:
        """Yield every object below `prefix`."""
        with self._named_errors():
            for page in self._store.list(prefix or None):
                yield from page

    def chunks(self, item: ObjectMeta) -> Iterator[bytes]:
        """Yield the content of an object, if it is still the one that was listed."""
        with self._named_errors():
            yield from self._store.get(item["path"], options={"if_match": item["e_tag"]}).stream(READ_BYTES)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except InvalidPathError as error:
            raise SourceError(
                "SourceFormat", f"{self._uri} holds a name that is no path; rename it: {_first_line(error)}."
            ) from error
        except (BaseError, FileNotFoundError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> SourceError:
        """Sort what obstore says: a store's own code, else the status, else that nothing has come."""
        uri, words, first = self._uri, str(error), _first_line(error)
        found = re.search(r"<Code>(\w+)</Code>", words) or re.search(r"status code: (\d{3})", words)
        code = found.group(1) if found else ""
        if code in NOT_FOUND:
            return SourceError("SourceNotFound", f"{uri} does not exist ({code}); check spec.source.uri.")
        if code in REFUSED:
            what = "refuses the credentials" if self._is_signed else "needs credentials"
            return SourceError(
                "Unauthorized",
                f"{uri} {what} ({code}); check {SCHEMES[self._scheme].credentials} in the Secret that "
                "spec.source.secretRef names.",
            )
        if code in OTHER_REGION or "incorrectly configured region" in words:
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
            words = f"{uri} lies in another region than {region}; set AWS_REGION."
            return SourceError("SourceUnavailable", words)
        if code in ("PreconditionFailed", "412"):
            return SourceError("SourceUnavailable", f"{uri} changed while it was read; it is tried again.")
        if not code and "HTTP error" in first:
            return SourceError("Offline", f"{uri} cannot be reached: {first}.")
        return SourceError("SourceUnavailable", f"{uri} could not be read ({code or first}).")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip()


def _endpoint(scheme: str) -> str:
    for name in ENDPOINTS[scheme]:
        if endpoint := os.environ.get(name, ""):
            if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
                raise SourceError("SourceUnavailable", f"{name} is {endpoint!r}; write https://host:port.")
            return endpoint
    return ""


def _has_aws_keys() -> bool:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    missing = [name for name in names if not os.environ.get(name)]
    if len(missing) == 1:
        raise SourceError("Unauthorized", f"{missing[0]} is not set; the Secret needs both keys.")
    return not missing


def _wanted(uri: str, objects: Iterable[ObjectMeta], prefix: str) -> dict[str, ObjectMeta]:
    """Return those of a checkpoint by their names below the prefix, in order."""
    found: dict[str, ObjectMeta] = {}
    for item in objects:
        name = item["path"].removeprefix(prefix)
        if any(fnmatch(PurePosixPath(name).name, pattern) for pattern in WANTED_FILES):
            found[name] = item
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
    return dict(sorted(found.items()))


def _commit(objects: dict[str, ObjectMeta]) -> str:
    total = hashlib.sha256()
    for name, item in objects.items():
        tag = (item["e_tag"] or "").strip('"')
        total.update(f"{name}\0{item['size']}\0{tag}\0".encode())
    return total.hexdigest()[:COMMIT_DIGITS]


def _download(store: Bucket, item: ObjectMeta, path: Path, name: str, progress: Progress | None) -> None:
    if path.is_file() and path.stat().st_size == item["size"]:
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
                    progress(name, done, item["size"])
        if done != item["size"]:
            raise SourceError(
                "SourceUnavailable", f"{item['path']} ended after {done} of {item['size']} bytes."
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
