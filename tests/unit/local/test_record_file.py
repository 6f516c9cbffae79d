"""The control loop's records on disk."""

from __future__ import annotations

from pathlib import Path

from tests.unit.control import stored_before
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.local.record_file import RecordFile
from tidegate.messages.registry import RevisionReport

RECORDS = {
    "m": ModelRecord(
        "m",
        created=1,
        weights={"r": 100},
        revisions={
            "r": RevisionRecord(
                "r", {"engine": {"name": "simulated"}}, proof=RevisionReport("m", "r", 1.0, True)
            )
        },
    )
}


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "control.json"
    RecordFile(path).write(RECORDS)
    assert RecordFile(path).read() == RECORDS


def test_nothing_is_written_without_a_change(tmp_path: Path) -> None:
    path = tmp_path / "control.json"
    file = RecordFile(path)
    file.write(RECORDS)
    before = path.stat().st_ino
    file.write(RECORDS)
    assert path.stat().st_ino == before


def test_a_broken_file_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "control.json"
    path.write_text("{")
    assert RecordFile(path).read() == {}
    assert path.with_suffix(".broken").read_text() == "{"


def test_no_file_is_no_memory(tmp_path: Path) -> None:
    assert RecordFile(tmp_path / "control.json").read() == {}


def test_records_of_the_version_before_are_read(tmp_path: Path) -> None:
    path = tmp_path / "control.json"
    path.write_bytes(stored_before.RECORDS.read_bytes())
    records = RecordFile(path).read()
    stored_before.assert_nothing_is_lost(records, ())
    RecordFile(path).write(records)
    assert RecordFile(path).read() == records
    assert b'"serving"' not in path.read_bytes()
