"""The histories of models on disk."""

from __future__ import annotations

from pathlib import Path

from tidegate.control.desired import RevisionRecord
from tidegate.local.history_folder import HistoryFolder
from tidegate.messages.registry import RevisionReport

PROOF = RevisionReport("m", "a", 1.0, True)
ONE = RevisionRecord("a", {"precision": "auto"}, number=1, digest="d", proof=PROOF)
TWO = RevisionRecord("b", {"precision": "float16"}, number=2)


def files(folder: Path) -> dict[str, int]:
    """Each file with its inode, another one after each write."""
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in folder.rglob("*.json")}


def test_histories_come_back_in_order(tmp_path: Path) -> None:
    ten = RevisionRecord("0", {}, number=10)
    HistoryFolder(tmp_path / "r").write({"m": (ONE, TWO, ten), "n": (TWO,)})
    assert HistoryFolder(tmp_path / "r").read() == {"m": [ONE, TWO, ten], "n": [TWO]}
    assert (tmp_path / "r" / "m" / "a.json").stat().st_mode & 0o777 == 0o600
    assert HistoryFolder(tmp_path / "none").read() == {}


def test_only_what_differs_is_written_and_what_is_no_longer_kept_goes(tmp_path: Path) -> None:
    folder = HistoryFolder(tmp_path)
    folder.write({"m": (ONE, TWO)})
    before = files(tmp_path)
    again = HistoryFolder(tmp_path)
    again.read()
    again.write({"m": (ONE, TWO)})
    assert files(tmp_path) == before
    again.write({"m": (TWO,)})
    assert files(tmp_path) == {"m/b.json": before["m/b.json"]}


def test_a_model_that_is_away_for_a_while_keeps_its_history(tmp_path: Path) -> None:
    folder = HistoryFolder(tmp_path)
    folder.write({"m": (ONE,), "n": (TWO,)})
    folder.write({"n": (TWO,)})
    assert folder.known["m"] == (ONE,)
    assert HistoryFolder(tmp_path).read().keys() == {"m", "n"}


def test_a_broken_file_is_kept_aside(tmp_path: Path) -> None:
    HistoryFolder(tmp_path).write({"m": (ONE, TWO)})
    (tmp_path / "m" / "a.json").write_text("{")
    assert HistoryFolder(tmp_path).read() == {"m": [TWO]}
    assert (tmp_path / "m" / "a.broken").read_text() == "{"
