"""What the control loop remembers."""

from __future__ import annotations

from pathlib import Path

from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.local.record_file import RecordFile
from tidegate.messages.registry import RevisionReport

RECORDS = {
    "m": ModelRecord(
        "m",
        created=1,
        serving="r",
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
