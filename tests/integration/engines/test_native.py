"""Operators of our own are compiled once, and where they cannot be, PyTorch's ways stay."""

from __future__ import annotations

import ctypes
import logging
import shutil
from pathlib import Path

import pytest

from tidegate.engines.transformers import native
from tidegate.engines.transformers.native import OPERATORS, compile_operator, is_ready


@pytest.fixture(autouse=True)
def no_other_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def alike() -> bool:
    return True


def test_without_a_compiler_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path / "new")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with caplog.at_level(logging.WARNING):
        assert not is_ready("attention", alike)
    assert "no C compiler is installed (Debian: apt install gcc)" in caplog.text


def test_what_a_compiler_says_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho \"error: unrecognized option '-mamx-tile'\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(native, "FOLDER", tmp_path / "new")
    with caplog.at_level(logging.WARNING):
        assert not is_ready("int4_tiles", alike)
    assert f"{compiler} does not compile it: error: unrecognized option '-mamx-tile'" in caplog.text
    assert not [*(tmp_path / "new").iterdir()]


def test_where_the_environment_cannot_be_written_to_it_is_compiled_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setattr(native, "FOLDER", blocked / "folder")
    users = tmp_path / "cache" / "tidegate" / "operators"
    assert native._library("int4_tiles", tmp_path).parent == users
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert native._library("int4_tiles", tmp_path).parent == tmp_path


@pytest.mark.parametrize("name", OPERATORS)
def test_it_is_compiled_once(name: str, tmp_path: Path) -> None:
    path = compile_operator(name, tmp_path / "new")
    told = path.stat()
    assert compile_operator(name, tmp_path / "new") == path
    assert path.stat() == told
    assert [*path.parent.iterdir()] == [path]


def test_a_file_that_is_no_library_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF")
    monkeypatch.setattr(native, "compile_operator", lambda *_: broken)
    with caplog.at_level(logging.WARNING):
        assert not is_ready("attention", alike)
    assert "the operator attention is not used, which is slower" in caplog.text


def test_all_are_compiled_for_an_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert native.main() == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name.rpartition("-")[0] for path in paths] == [*OPERATORS]
    for path in paths:
        ctypes.CDLL(str(path))
    monkeypatch.setattr(native, "FOLDER", tmp_path / "new")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert native.main() == 1
    assert "no C compiler is installed" in capsys.readouterr().err
