"""From a source URI to a local checkpoint folder and the facts about it. No torch import."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import cast

from tidegate.errors import SourceError
from tidegate.sources.checkpoint import (
    Checkpoint,
    content_name,
    first,
    read_checkpoint,
    read_description,
)
from tidegate.sources.facts import Resolved
from tidegate.sources.gptq import loaded_weights
from tidegate.sources.schemes import KNOWN_SCHEMES, SCHEMES, Fetch, Kept, Progress, Storage, scheme_of
from tidegate.sources.servable import check_described, check_servable

READ_BYTES = 1 << 20


def resolve(
    uri: str, storage: Storage | None = None, progress: Progress | None = None, kept: Kept | None = None
) -> Resolved:
    """Find a checkpoint, download what is missing of it if it lies elsewhere, and refuse what nobody serves,
    or what is not `kept`.

    Raises `SourceError`.
    """
    scheme = SCHEMES.get(scheme_of(uri))
    if scheme is None:
        raise SourceError("SourceNotFound", f"{uri} is no source; {KNOWN_SCHEMES}.")
    # By name, so that a source needs no other source's libraries.
    fetch = cast(Fetch, import_module(f"tidegate.sources.{scheme.module}").fetch)
    kept = kept or Kept()
    folder, commit = fetch(
        uri,
        storage or Storage(),
        progress,
        lambda folder: check_described(read_description(folder, uri)),
        kept.commit,
    )
    checkpoint = read_checkpoint(folder, uri)
    check_servable(checkpoint)
    digest = checkpoint.digest(commit)
    if kept.digest and kept.digest != digest:
        raise _changed(checkpoint, uri, kept.since)
    return Resolved(
        uri=uri,
        path=str(folder),
        commit=commit,
        architecture=checkpoint.architecture,
        quantization=checkpoint.quantization,
        precision=checkpoint.auto_precision,
        weights_bytes=checkpoint.weights_bytes,
        digest=digest,
        files=dict(checkpoint.files),
        shape=checkpoint.shape,
        weights=loaded_weights(checkpoint),
        task=checkpoint.task,
    )


def _changed(checkpoint: Checkpoint, uri: str, since: float) -> SourceError:
    """Name the files that were written after `since`; a copy that keeps times hides itself."""
    newer = [name for name in checkpoint.loaded if (checkpoint.path / name).stat().st_mtime > since > 0]
    which = f"; written since: {first(newer)}" if newer else ""
    return SourceError(
        "SourceChanged",
        f"{uri} no longer holds what the revision was made from{which}. Put those files back, or give them a "
        "folder of their own.",
    )


def pull(uri: str, progress: Progress) -> Resolved:
    """Resolve with progress; every weight file's checksum is verified. Raises `SourceError`.

    Downloads resume where an earlier one stopped. A folder has no checksums to compare with: there it is
    verified that every file can be read to its end and that safetensors files are whole.
    """
    found = resolve(uri, progress=progress)
    for name, size in found.files.items():
        _verify(Path(found.path, name), size, progress, is_hub=scheme_of(uri) == "hf")
    return found


def _verify(path: Path, size: int, progress: Progress, *, is_hub: bool) -> None:
    """Read a file to its end. The hub's cache names each large file by its sha256."""
    expected = content_name(path) if is_hub else ""
    found, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                found.update(chunk)
                done += len(chunk)
                progress(f"verify {path.name}", done, size)
    except OSError as error:
        raise SourceError("SourceNotFound", f"{path} cannot be read: {error.strerror}.") from error
    if expected and found.hexdigest() != expected:
        raise SourceError(
            "ChecksumMismatch",
            f"{path.name} is damaged (its sha256 differs); delete {path.resolve()} and pull again.",
        )
