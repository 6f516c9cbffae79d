"""The mounted key: what is accepted, and when it is registered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import await_until
from tidegate.errors import ConfigError, QueueUnavailable
from tidegate.gateway.admin_key import AdminKey, read_admin_key

SECRET = "tg-" + "x" * 43


class Store:
    def __init__(self) -> None:
        self.registered: list[tuple[str, str]] = []
        self.is_away = False

    async def register(self, secret: str, name: str) -> bool:
        if self.is_away:
            raise QueueUnavailable("Redis is away.")
        self.registered.append((secret, name))
        return True


class Link:
    """A connection whose reconnects the test calls."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def reconnect(self) -> None:
        for callback in self.callbacks:
            callback()


def test_a_trailing_newline_is_no_part_of_the_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{SECRET}\n")
    assert read_admin_key(file) == SECRET


@pytest.mark.parametrize("text", ["", "\n", "short", "x" * 31, "x" * 257, f"two {SECRET}", "ü" * 40])
def test_a_bad_key_is_refused_by_the_settings_name_and_not_shown(text: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_admin_key(file)
    assert refused.value.problems[0].field == "TIDEGATE_ADMIN_KEY_FILE"
    assert str(file) in refused.value.message
    assert SECRET not in refused.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TIDEGATE_ADMIN_KEY_FILE.*No such file"):
        read_admin_key(tmp_path / "none")


async def test_it_is_registered_at_start_and_after_each_reconnect() -> None:
    store, link = Store(), Link()
    key = AdminKey(store, SECRET)
    await key.start(link.on_reconnect)
    assert store.registered == [(SECRET, "admin")]
    link.reconnect()
    await await_until(lambda: len(store.registered) == 2)
    await key.close()
    assert link.callbacks == []


async def test_a_second_outage_waits_for_the_next_reconnect() -> None:
    store, link = Store(), Link()
    key = AdminKey(store, SECRET)
    await key.start(link.on_reconnect)
    store.is_away = True
    link.reconnect()
    await await_until(lambda: key._task is not None and key._task.done())
    store.is_away = False
    link.reconnect()
    await await_until(lambda: len(store.registered) == 2)
    await key.close()
