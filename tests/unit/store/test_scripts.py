from __future__ import annotations

import hashlib
from importlib.resources import files

from tidegate.store import names, scripts


def test_every_lua_file_is_a_script_and_each_starts_with_the_common_part() -> None:
    folder = files("tidegate.store") / "lua"
    found = {entry.name.removesuffix(".lua") for entry in folder.iterdir()} - {"common"}
    loaded = {name.lower(): script for name, script in vars(scripts).items() if name.isupper()}
    assert set(loaded) == found
    common = (folder / "common.lua").read_text("utf-8")
    for script in loaded.values():
        assert script.text.startswith(common)
        assert script.sha == hashlib.sha1(script.text.encode()).hexdigest()


def test_names_start_with_the_prefix() -> None:
    assert names.queue_name("m", "r") == "m--r"
    assert names.prefix("p") == "p:"
    made = [
        names.gateway_channel("p", "g"),
        names.replica_channel("p", "r"),
        names.wake_channel("p", "q"),
        names.change_channel("p", "keys"),
    ]
    assert made == ["p:gw:g", "p:rep:r", "p:wake:q", "p:changed:keys"]
