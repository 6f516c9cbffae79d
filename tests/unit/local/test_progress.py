"""Progress of a detached host, read while it is written."""

from __future__ import annotations

from pathlib import Path

from tidegate.local.progress import Progress, ProgressFile


def test_lines_are_read_once_and_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    writer, reader = ProgressFile(path), ProgressFile(path)
    assert reader.read_new() == []
    writer.reset()
    first, second = Progress("ray", "running", "Starting."), Progress("model", "done", "Serving.", "m")
    writer.write(first)
    assert reader.read_new() == [first]
    with path.open("ab") as file:
        file.write(b'{"step": "re')
    assert reader.read_new() == []
    with path.open("ab") as file:
        file.write(b'dis", "state": "done", "message": ""}\n')
    writer.write(second)
    assert reader.read_new() == [Progress("redis", "done", ""), second]
