"""The records of the control loop, which outlast its process: one JSON file, replaced atomically."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from tidegate.control.desired import ModelRecord
from tidegate.local.home import write_atomically

log = logging.getLogger(__name__)


class RecordFile:
    """Reads at start, writes only changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = b""

    def read(self) -> dict[str, ModelRecord]:
        """Empty where there is none. A broken file is set aside: models then prove themselves again."""
        try:
            self._written = self._path.read_bytes()
            return msgspec.json.decode(self._written, type=dict[str, ModelRecord])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log.warning("%s cannot be read (%s); it is kept as .broken", self._path, error)
            self._path.replace(self._path.with_suffix(".broken"))
            self._written = b""
            return {}

    def write(self, records: Mapping[str, ModelRecord]) -> None:
        text = msgspec.json.encode(dict(records))
        if text != self._written:
            write_atomically(self._path, text)
            self._written = text
