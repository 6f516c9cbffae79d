"""The Lua scripts of the store, read from package data. Each is `common.lua` followed by its own file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    text: str
    sha: str


def _script(name: str) -> Script:
    folder = files("tidegate.store") / "lua"
    text = "\n".join((folder / f"{part}.lua").read_text("utf-8") for part in ("common", name))
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


SUBMIT = _script("submit")
CLAIM = _script("claim")
EMIT = _script("emit")
RENEW = _script("renew")
RELEASE = _script("release")
CANCEL = _script("cancel")
DROP = _script("drop")
SWEEP = _script("sweep")
PLACES = _script("places")
BEAT = _script("beat")
BEATING = _script("beating")
