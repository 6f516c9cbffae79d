"""What runs, from its record: a number that another process has now is not the host."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tidegate.local.home import (
    Home,
    ProcessRecord,
    Running,
    find,
    read_record,
    record_of,
    write_atomically,
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.make()
    return home


def record(home: Home, host: ProcessRecord, url: str = "") -> None:
    write_atomically(home.record, msgspec.json.encode(Running(host=host, url=url)))


def test_a_living_host_is_found_once_its_gateway_answers(home: Home) -> None:
    me = record_of("host", os.getpid())
    record(home, me)
    assert find(home.root) is None
    assert read_record(home) is not None
    record(home, me, "http://127.0.0.1:1")
    found = find(home.root)
    assert found is not None
    assert found.url == "http://127.0.0.1:1"


def test_a_reused_process_id_is_not_the_host(home: Home) -> None:
    me = record_of("host", os.getpid())
    record(home, ProcessRecord("host", me.pid, me.created - 100.0), "http://x")
    assert find(home.root) is None


def test_no_record_and_a_broken_one_mean_nothing_runs(home: Home) -> None:
    assert find(home.root) is None
    home.record.write_text("{")
    assert find(home.root) is None


def test_written_files_are_the_owners_only(home: Home) -> None:
    write_atomically(home.key, b"secret")
    assert home.key.stat().st_mode & 0o777 == 0o600
    assert list(home.root.glob(".key*")) == []


def test_homes_do_not_share_names(tmp_path: Path) -> None:
    one, two = Home(tmp_path / "a"), Home(tmp_path / "b")
    assert one.instance != two.instance
    assert one.temporary != two.temporary
    assert len(str(one.temporary)) < 60  # socket paths end at about 100 characters
