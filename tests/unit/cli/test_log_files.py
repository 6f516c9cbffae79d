"""Last lines of log files, and lines that are added while somebody follows."""

from __future__ import annotations

import threading
from pathlib import Path

from tidegate.cli.log_files import Tail, read_logs


def test_the_last_whole_lines_come_first_and_then_the_new_ones(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_text("one\ntwo\nthree\nhalf a l")
    tail = Tail()
    assert tail.last_lines(log, 2) == ["two", "three"]
    with log.open("a") as file:
        file.write("ine\nfive\n")
    assert tail.new_lines(log) == ["half a line", "five"]
    assert tail.new_lines(log) == []
    tail.close()


def test_no_last_lines_still_follow(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_text("one\n")
    tail = Tail()
    assert tail.last_lines(log, 0) == []
    with log.open("a") as file:
        file.write("two\n")
    assert tail.new_lines(log) == ["two"]
    tail.close()


def test_a_replaced_file_is_read_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_text("old\n")
    tail = Tail()
    assert tail.last_lines(log, 5) == ["old"]
    log.rename(tmp_path / "gateway.log.1")
    log.write_text("new\n")
    assert tail.new_lines(log) == ["new"]
    tail.close()


def test_a_cut_file_is_read_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_text("a long old line\n")
    tail = Tail()
    tail.last_lines(log, 5)
    log.write_text("new\n")
    assert tail.new_lines(log) == ["new"]
    tail.close()


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    tail = Tail()
    assert tail.last_lines(tmp_path / "none.log", 5) == []
    assert tail.new_lines(tmp_path / "none.log") == []


def test_bytes_that_are_no_text_do_not_stop_it(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_bytes(b"\xff\xfe\n")
    assert list(read_logs(lambda: {log: "gateway"}, [tmp_path], 5, follow=False)) == [
        ("gateway", "\ufffd\ufffd")
    ]


def test_following_also_finds_files_that_appear(tmp_path: Path) -> None:
    def files() -> dict[Path, str]:
        return {path: path.stem for path in sorted(tmp_path.glob("*.log"))}

    (tmp_path / "host.log").write_text("old\n")
    lines = read_logs(files, [tmp_path], 5, follow=True)
    assert next(lines) == ("host", "old")

    # The watch begins inside next(), so a writer keeps adding until a line is seen.
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.02):
            with (tmp_path / "gateway.log").open("a") as file:
                file.write("new\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert next(lines) == ("gateway", "new")
    finally:
        stop.set()
        writer.join()
