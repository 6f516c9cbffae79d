"""Logs are cut while their writers go on."""

from __future__ import annotations

from pathlib import Path

from tidegate.local.log_rotation import rotate


def test_a_large_log_is_cut_and_its_writer_goes_on(tmp_path: Path) -> None:
    small = tmp_path / "small.log"
    small.write_bytes(b"few\n")
    with (tmp_path / "gateway.log").open("ab", buffering=0) as writer:
        writer.write(b"old\n" * 50)
        rotate(tmp_path, 100)
        writer.write(b"new\n")
    assert (tmp_path / "gateway.log").read_bytes() == b"new\n"
    assert (tmp_path / "gateway.log.1").read_bytes() == b"old\n" * 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gateway.log", "gateway.log.1", "small.log"]
    assert small.read_bytes() == b"few\n"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(b"x" * 200)
    (tmp_path / "a.log").symlink_to(target)
    rotate(tmp_path, 100)
    assert target.stat().st_size == 200
