"""Checkpoints that lie on this machine: a path, or a folder of a mounted claim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tidegate.errors import SourceError
from tidegate.sources.schemes import Check, Progress, Storage, claim_and_path, scheme_of


def fetch(
    uri: str,
    storage: Storage,
    progress: Progress | None,  # noqa: ARG001 - nothing moves
    check: Check,  # noqa: ARG001 - whoever asks reads the whole folder at once
    commit: str = "",  # noqa: ARG001 - a folder has none
) -> tuple[Path, str]:
    """Find the folder. Raises `SourceError`."""
    if scheme_of(uri) == "pvc":
        return _claimed(uri, storage.claims), ""
    folder = Path(uri.removeprefix("file://")).expanduser()
    if not folder.exists():
        raise SourceError("SourceNotFound", f"There is no folder at {folder}; check spec.source.uri.")
    if not folder.is_dir():
        raise SourceError(
            "SourceFormat",
            f"{folder} is a file; give the folder that holds config.json and the safetensors files.",
        )
    return folder.resolve(), ""


def _claimed(uri: str, claims: Mapping[str, Path]) -> Path:
    claim, path = claim_and_path(uri)
    if claim not in claims:
        raise SourceError(
            "SourceNotFound", f"{uri}: the claim {claim!r} is not mounted here; pvc:// is for Kubernetes."
        )
    root = claims[claim].resolve()
    folder = (root / path).resolve()
    if not folder.is_relative_to(root):
        raise SourceError("SourceNotFound", f"{uri} leads out of the claim; check spec.source.uri.")
    if not folder.is_dir():
        raise SourceError("SourceNotFound", f"The claim {claim!r} holds no folder {path or '/'}.")
    return folder
