"""Operators of our own are compiled once, and where they cannot be, PyTorch's ways stay."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
from pathlib import Path

import pytest

from tidegate.engines.transformers import native
from tidegate.engines.transformers.native import OPERATORS, compile_operator, is_ready

on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="they are for processors of that kind")


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


def compiled_in(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note where what is loaded was compiled."""
    load = ctypes.CDLL

    def noting(path: str) -> ctypes.CDLL:
        found = load(path)
        folders.append(Path(path).parent)
        return found

    monkeypatch.setattr(ctypes, "CDLL", noting)


@on_x86
def test_where_the_environment_cannot_be_written_to_it_is_compiled_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked, folders = tmp_path / "file", list[Path]()
    blocked.touch()
    compiled_in(folders, monkeypatch)
    monkeypatch.setattr(native, "FOLDER", blocked / "folder")
    assert is_ready("attention", alike)
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert is_ready("attention", alike)
    assert folders[0] == tmp_path / "cache" / "tidegate" / "operators"
    assert tmp_path not in folders[1].parents
    assert not folders[1].exists()


@on_x86
def test_what_does_not_load_in_the_environment_is_compiled_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As when it was compiled for another machine."""
    folders = list[Path]()
    compile_operator("attention", tmp_path / "new").write_bytes(b"\x7fELF")
    monkeypatch.setattr(native, "FOLDER", tmp_path / "new")
    compiled_in(folders, monkeypatch)
    assert is_ready("attention", alike)
    assert folders == [tmp_path / "cache" / "tidegate" / "operators"]


@on_x86
def test_what_others_can_write_is_not_loaded(tmp_path: Path) -> None:
    path = compile_operator("attention", tmp_path / "new")
    path.chmod(0o777)
    with pytest.raises(PermissionError, match="may be somebody else's: remove it"):
        compile_operator("attention", tmp_path / "new")


def test_whatever_is_raised_leaves_pytorchs_ways(caplog: pytest.LogCaptureFixture) -> None:
    """As when PyTorch refuses the operator, which then is no attribute of its."""

    def refused() -> bool:
        raise AttributeError("'_OpNamespace' 'tidegate' object has no attribute 'attention'")

    with caplog.at_level(logging.WARNING):
        assert not is_ready("attention", refused)
    assert "the operator attention is not used, which is slower" in caplog.text


@on_x86
@pytest.mark.parametrize("name", OPERATORS)
def test_it_is_compiled_once(name: str, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = compile_operator(name, tmp_path / "new")
    finally:
        os.umask(before)
    told = path.stat()
    assert compile_operator(name, tmp_path / "new") == path
    assert path.stat() == told
    assert [*path.parent.iterdir()] == [path]


@on_x86
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
