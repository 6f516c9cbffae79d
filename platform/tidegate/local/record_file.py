"""The records of the control loop, which outlast its process: one JSON file, replaced atomically."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tidegate.control.desired import ModelRecord, traffic_of
from tidegate.local.home import write_atomically

log = logging.getLogger(__name__)


class RecordFile:
    """The file is read at the start and written only where it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = b""

    def read(self) -> dict[str, ModelRecord]:
        """Return the records; none where there is no file. A broken one is set aside: models then prove
        themselves again."""
        try:
            self._written = self._path.read_bytes()
            stored = msgspec.json.decode(self._written, type=dict[str, dict[str, Any]])
            return {
                name: msgspec.convert({**record, "weights": traffic_of(record)}, ModelRecord)
                for name, record in stored.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log.warning("%s cannot be read (%s); it is kept as .broken", self._path, error)
            self._path.replace(self._path.with_suffix(".broken"))
            self._written = b""
            return {}

    def write(self, records: Mapping[str, ModelRecord]) -> None:
        text = msgspec.json.encode({name: record.durable for name, record in records.items()})
        if text != self._written:
            write_atomically(self._path, text)
            self._written = text
