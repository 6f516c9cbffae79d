"""Tables, sizes and ages as people see them; JSON and YAML as programs do."""

from __future__ import annotations

import json

import pytest
import yaml

from tidegate.cli.output import Column, Format, age, put_foreign, say, show_list, show_record, size, table

RECORDS = [{"name": "a", "note": "two\nlines"}, {"name": "longer", "note": ""}]
COLUMNS = (
    Column("NAME", lambda record: record["name"]),
    Column("NOTE", lambda record: record["note"], only_wide=True),
)


def test_table_aligns_columns_and_marks_empty_cells() -> None:
    assert table(["NAME", "NOTE"], [["a", "x"], ["longer", ""]]) == "NAME     NOTE\na        x\nlonger   -"


def test_a_cell_is_one_line() -> None:
    assert table(["NOTE"], [["two\nlines"]]) == "NOTE\ntwo lines"


def test_nothing_that_a_terminal_acts_on_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    wicked = "\x1b]0;title\x07\x9b2J\u202eabc"
    show_list([{"name": wicked, "note": ""}], COLUMNS, Format.table, "none")
    show_record({}, Format.table, f"two\nlines {wicked}")
    say(wicked)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "\\x1b]0;title\\x07\\x9b2J\\u202eabc" in text
        assert all(character.isprintable() or character == "\n" for character in text)


def test_a_models_text_reaches_a_program_as_it_is_and_a_terminal_without_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\x1b[2J👩\u200d🚀 ready\r\n\x9b"
    put_foreign(text, end="")
    assert capsys.readouterr().out == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    put_foreign(text, end="")
    assert capsys.readouterr().out == "\\x1b[2J👩\u200d🚀 ready\\r\n\\x9b"


def test_wide_shows_more_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show_list(RECORDS, COLUMNS, Format.table, "none")
    assert "NOTE" not in capsys.readouterr().out
    show_list(RECORDS, COLUMNS, Format.wide, "none")
    assert "NOTE" in capsys.readouterr().out


def test_an_empty_table_leaves_stdout_empty(capsys: pytest.CaptureFixture[str]) -> None:
    show_list([], COLUMNS, Format.table, "Nothing here.")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "Nothing here.\n")


def test_an_empty_list_is_still_json(capsys: pytest.CaptureFixture[str]) -> None:
    show_list([], COLUMNS, Format.json, "Nothing here.")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == []
    assert printed.err == ""


def test_json_and_yaml_hold_whole_records(capsys: pytest.CaptureFixture[str]) -> None:
    show_list(RECORDS, COLUMNS, Format.json, "none")
    assert json.loads(capsys.readouterr().out) == RECORDS
    show_record(RECORDS[0], Format.yaml, "unused")
    assert yaml.safe_load(capsys.readouterr().out) == RECORDS[0]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, ""), (999, "999 B"), (18_000_000, "18.0 MB"), (1_500, "1.5 kB"), (3.2e12, "3.2 TB")],
)
def test_size(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (45, "45s"), (720, "12m"), (10_800, "3h"), (800_000, "9d")]
)
def test_age(seconds: float, text: str) -> None:
    assert age(seconds) == text
