"""Checkpoints on the Hugging Face hub, with huggingface_hub's cache, token and offline conventions."""

from __future__ import annotations

import errno
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils.tqdm import tqdm

from tidegate.errors import SourceError
from tidegate.sources.checkpoint import DESCRIPTIONS
from tidegate.sources.schemes import WANTED_FILES, Check, Progress, Storage


def fetch(
    uri: str,
    storage: Storage,  # noqa: ARG001 - the hub's library has its own
    progress: Progress | None,
    check: Check,
    commit: str = "",
) -> tuple[Path, str]:
    """Download what is missing, what describes the weights first. Raises `SourceError`."""
    name, _, revision = uri.removeprefix("hf://").partition("@")
    if commit:
        uri, revision = f"hf://{name}@{commit}", commit
    try:
        described = _snapshot(name, revision or None, DESCRIPTIONS, progress)
        check(described)
        found = _snapshot(name, described.name, WANTED_FILES, progress)
    except errors.GatedRepoError as error:
        raise SourceError(
            "Unauthorized", f"{uri} is gated: accept its licence on the hub and set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError("SourceNotFound", f"{name} has no revision {revision!r} on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            "SourceNotFound", f"{name} is not on the hub, or it is private and HF_TOKEN is not set."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise SourceError(
                "Offline",
                f"{uri} is not in the local cache and HF_HUB_OFFLINE is set; unset it or pull first.",
            ) from error
        raise SourceError(
            "Offline", f"{uri} is not in the local cache and the hub cannot be reached."
        ) from error
    except OSError as error:
        raise _disk_or_network(uri, error) from error
    except ValueError as error:
        raise SourceError("SourceFormat", f"{uri}: {error}") from error
    return found, found.name


def _snapshot(name: str, revision: str | None, patterns: Sequence[str], progress: Progress | None) -> Path:
    found = snapshot_download(
        name,
        revision=revision,
        allow_patterns=list(patterns),
        etag_timeout=10,
        local_files_only=constants.HF_HUB_OFFLINE,
        tqdm_class=_progress_class(progress),
    )
    return Path(found)


def _disk_or_network(uri: str, error: OSError) -> SourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SourceError("NoSpace", f"The disk has no room for {uri}; free some, or move it with HF_HOME.")
    return SourceError("Offline", f"{uri} could not be downloaded: {error}")


def _progress_class(progress: Progress | None) -> Any:
    """Return a tqdm that reports bytes to `progress` instead of drawing; silent without one."""
    base: Any = tqdm

    class Reporter(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def display(self, *_: Any, **__: Any) -> None:
            if progress is not None and self.unit == "B":
                progress(str(self.desc or "download"), int(self.n), int(self.total or 0))

    return Reporter
