"""The table of source schemes: how a URI is written, what its source needs, which module fetches it. Pure.

A scheme is a row here and, where it speaks to another system, a module with a `fetch`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all (0: not known)

Check = Callable[[Path], object]  # raises `SourceError`

# What a text model's checkpoint needs; other formats of the same weights stay where they are.
WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """`module` is that of this package whose `fetch` brings the files; `credentials` names the variables that
    hold them."""

    example: str
    remedy: str
    pattern: str
    module: str
    needs_cache: bool = False
    credentials: str = ""


SCHEMES: Mapping[str, Scheme] = {
    "file": Scheme("file:///path", "write file:///absolute/path", r"^file:///", "folders"),
    "hf": Scheme(
        "hf://owner/name",
        "write hf://owner/name or hf://owner/name@revision",
        r"^hf://[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(@[A-Za-z0-9_./-]{1,120})?$",
        "hub",
        needs_cache=True,
        credentials="HF_TOKEN",
    ),
    "s3": Scheme(
        "s3://bucket/prefix",
        "write s3://bucket/prefix",
        r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[!-~]+)?$",
        "buckets",
        needs_cache=True,
        credentials="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    "gs": Scheme(
        "gs://bucket/prefix",
        "write gs://bucket/prefix",
        r"^gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[!-~]+)?$",
        "buckets",
        needs_cache=True,
        credentials="GOOGLE_SERVICE_ACCOUNT_KEY",
    ),
    "pvc": Scheme(
        "pvc://claim/path",
        "write pvc://claim/path",
        r"^pvc://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(/[!-~]+)?$",
        "folders",
    ),
}
_EXAMPLES = ["a path", *(scheme.example for scheme in SCHEMES.values())]
KNOWN_SCHEMES = f"use {', '.join(_EXAMPLES[:-1])} or {_EXAMPLES[-1]}"


@dataclass(frozen=True, slots=True)
class Storage:
    """Folders of this machine: `cache` for downloads from buckets (None: the user's own; huggingface_hub
    keeps its files in HF_HOME), `claims` maps mounted claims to where they are."""

    cache: Path | None = None
    claims: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a source is to hold still: a commit and a digest, each empty where it is not known, of the time
    `since` (unix seconds; 0: not known)."""

    commit: str = ""
    digest: str = ""
    since: float = 0.0


class Fetch(Protocol):
    def __call__(
        self, uri: str, storage: Storage, progress: Progress | None, check: Check, commit: str = ""
    ) -> tuple[Path, str]:
        """Bring what is missing of what lies there now, or of an earlier `commit`; return the folder and the
        commit, which a plain folder has none of. Before weights move, `check` sees the folder with the files
        that describe them. Raises `SourceError`."""
        ...


def scheme_of(uri: str) -> str:
    """Return a URI's scheme; a plain path is a file."""
    scheme, separator, _ = uri.partition("://")
    return scheme if separator else "file"


def mistake_in(uri: str) -> str | None:
    """Return what to write instead of a URI that no source can have; a plain path is always right."""
    if "://" not in uri:
        return None
    scheme = SCHEMES.get(scheme_of(uri))
    if scheme is None:
        return KNOWN_SCHEMES
    return None if re.match(scheme.pattern, uri) else scheme.remedy


def claim_and_path(uri: str) -> tuple[str, str]:
    """Split `pvc://claim/path`."""
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    return claim, path
