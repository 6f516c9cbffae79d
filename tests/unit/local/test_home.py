"""What runs, from its record: a number that another process has now is not the host."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec
import pytest

from tidegate.errors import ConfigError
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


def test_a_made_home_is_ours_and_one_of_before_the_marker_too(home: Home) -> None:
    answers = [home.is_ours]
    home.marker.unlink()
    answers.append(home.is_ours)
    home.lock.touch()
    answers.append(home.is_ours)
    assert answers == [True, False, True]


@pytest.mark.parametrize("name", ["data", "logs", "run", "key"])
def test_a_folder_with_things_of_its_own_is_no_home(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"TIDEGATE_HOME: .*holds {name} that Tidegate did not make"):
        Home(tmp_path).make()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_that_leads_nowhere_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="holds data"):
        Home(tmp_path).check()


@pytest.mark.parametrize("where", ["/", "user", "above", "temporary", "link"])
def test_what_others_share_is_no_home_even_with_a_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    user = tmp_path / "people" / "ann"
    user.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(user))
    (user / ".tidegate-home").touch()
    (tmp_path / "link").symlink_to(user)
    roots = {
        "/": Path("/"),
        "user": user,
        "above": user.parent,
        "temporary": Path(tempfile.gettempdir()),
        "link": tmp_path / "link",
    }
    with pytest.raises(ConfigError, match="name a folder of its own"):
        Home(roots[where]).check()
