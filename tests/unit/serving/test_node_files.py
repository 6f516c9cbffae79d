"""Files that replicas of a node leave for each other."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tidegate.replica_args import NODE_FOLDER_VARIABLE, EngineSpec, ReplicaArgs
from tidegate.serving import node_files
from tidegate.serving.node_files import CHECKS


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


ARGS = ReplicaArgs(
    model="one", revision="r1", redis_url="redis://:secret@127.0.0.1:1/0", engine=EngineSpec("simulated")
)


def test_a_folder_is_made_for_this_user_alone(temporary: Path) -> None:
    found = node_files.folder(CHECKS)
    assert found.parent == temporary
    assert found.stat().st_mode & 0o777 == 0o700
    assert node_files.folder(CHECKS) == found


def test_a_host_says_where(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE_FOLDER_VARIABLE, str(temporary / "home" / "node"))
    assert node_files.folder(CHECKS) == temporary / "home" / "node" / CHECKS
    assert node_files.folder(CHECKS).stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_not_used(temporary: Path) -> None:
    name = f"tidegate-{CHECKS}-{os.getuid()}"
    (temporary / "elsewhere").mkdir(mode=0o700)
    (temporary / name).symlink_to(temporary / "elsewhere")
    assert node_files.check_record(ARGS) is None
    (temporary / name).unlink()
    (temporary / name).mkdir(mode=0o777)
    (temporary / name).chmod(0o777)
    with pytest.raises(PermissionError, match="of this user alone"):
        node_files.folder(CHECKS)
    assert node_files.check_record(ARGS) is None
    (temporary / name).chmod(0o700)
    assert node_files.check_record(ARGS) is not None


def test_each_revision_of_each_platform_has_its_own() -> None:
    others = [{"model": "two"}, {"revision": "r2"}, {"key_prefix": "other"}, {"redis_url": "redis://other"}]
    names = [node_files.name_of(msgspec.structs.replace(ARGS, **each)) for each in ({}, *others)]
    assert len(set(names)) == 5
    assert all("secret" not in name and "one" not in name for name in names)
