from __future__ import annotations

import hashlib
from importlib.resources import files

from tidegate.store import names, scripts
from tidegate.store.connection import Script


def test_every_lua_file_is_a_script_and_each_carries_what_it_uses_of_the_shared_ones() -> None:
    folder = files("tidegate.store") / "lua"
    found = {entry.name.removesuffix(".lua") for entry in folder.iterdir()} - set(scripts.SHARED)
    loaded = {name.lower(): script for name, script in vars(scripts).items() if isinstance(script, Script)}
    when_full = loaded.pop("emit_when_full")
    assert set(loaded) == found
    assert when_full.text.splitlines()[1:] == loaded["emit"].text.splitlines()[1:]
    base = (folder / "base.lua").read_text("utf-8").split("\n\n")[0]
    for name, script in loaded.items():
        first_line, _, rest = script.text.partition("\n")
        assert rest.startswith(base if name != "probe" else "-- Does nothing")
        # Where memory is full, these are refused and the others are not.
        assert (first_line == "#!lua") == (name in ("submit", "shadow", "emit", "probe", "keep"))
        assert script.text.endswith((folder / f"{name}.lua").read_text("utf-8"))
        assert script.sha == hashlib.sha1(script.text.encode()).hexdigest()
    assert "local function lose(" in loaded["sweep"].text
    assert "local function rejoin(" in loaded["sweep"].text  # which only `lose` uses, through `requeue`
    assert "local function lose(" not in loaded["emit"].text
    assert "local function flush(" not in loaded["beating"].text


def test_the_waiting_line_is_known_to_one_file() -> None:
    for entry in (files("tidegate.store") / "lua").iterdir():
        text = entry.read_text("utf-8")
        keys = [key for key in ("'waiting:'", "'suspects:'", "'deadlines'") if key in text]
        assert bool(keys) == (entry.name == "waiting.lua"), (entry.name, keys)


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
