"""The histories of models on a laptop: a folder for each model, with one JSON file for each revision."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from tidegate.control.desired import RevisionRecord
from tidegate.local.home import write_atomically

log = logging.getLogger(__name__)

History = Mapping[str, Sequence[RevisionRecord]]


class HistoryFolder:
    """It is read once, and written only where it changes. How much stays is the caller's to say."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.known: History = {}

    def read(self) -> History:
        """Return the histories, the newest revision last. A file that is broken is set aside."""
        found: dict[str, list[RevisionRecord]] = {}
        for path in sorted(self._folder.glob("*/*.json")):
            try:
                kept = msgspec.json.decode(path.read_bytes(), type=RevisionRecord)
            except (OSError, msgspec.DecodeError) as error:
                log.warning("%s cannot be read (%s); it is kept as .broken", path, error)
                with contextlib.suppress(OSError):
                    path.replace(path.with_suffix(".broken"))
                continue
            found.setdefault(path.parent.name, []).append(kept)
        self.known = {name: sorted(each, key=lambda kept: kept.number) for name, each in found.items()}
        return self.known

    def write(self, history: History) -> None:
        """Make these the histories of their models. Those of others stay: a file that is away for a while, or
        wrong at a start, should cost no history."""
        for name, revisions in history.items():
            past = {kept.revision: kept for kept in self.known.get(name, ())}
            for kept in revisions:
                if past.pop(kept.revision, None) != kept:
                    self._file(name, kept.revision).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    write_atomically(self._file(name, kept.revision), msgspec.json.encode(kept))
            for revision in past:
                self._file(name, revision).unlink(missing_ok=True)
        self.known = {**self.known, **history}

    def _file(self, model: str, revision: str) -> Path:
        return self._folder / model / f"{revision}.json"
