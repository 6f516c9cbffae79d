"""The platform that a command speaks to: its gateway, its logs.

The one contact between the CLI and the laptop host (`tidegate.local`), besides starting and stopping it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli.output import CommandFailed

if TYPE_CHECKING:
    from tidegate.local.home import Running
    from tidegate.settings import Settings

NOT_RUNNING = "The platform is not running; `tidegate up` starts it."

UrlOption = Annotated[str, typer.Option(help="Another gateway, as in http://host:8000.", metavar="URL")]
KeyOption = Annotated[
    str, typer.Option(help="An API key; left out: this machine's own.", metavar="KEY", show_default=False)
]


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway and how to be let in."""

    url: str
    headers: Mapping[str, str]
    is_loopback: bool

    def unreachable(self, reason: str) -> CommandFailed:
        return CommandFailed(
            f"No gateway answers at {self.url} ({reason}). `tidegate status` shows what runs."
        )


def find_target(url: str, key: str) -> Target:
    """The gateway at `url`, or the one that runs here. Raises `CommandFailed` where none does."""
    if not url:
        running = find_running()
        url, key = running.url, key or running.key
    elif "://" not in url:
        url = f"http://{url}"
    url = url.rstrip("/").removesuffix("/v1")
    host = url.partition("://")[2].rpartition(":")[0] or url.partition("://")[2]
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return Target(url, headers, host in ("127.0.0.1", "localhost", "[::1]"))


def settings() -> Settings:
    """The settings of the environment. Raises `ConfigError`."""
    from tidegate.settings import load_settings

    return load_settings()


def find_running() -> Running:
    """Return the running host's record. Raises `CommandFailed` where none runs."""
    from tidegate.local.home import find

    running = find(settings().home)
    if running is None:
        raise CommandFailed(NOT_RUNNING)
    return running


def log_folder() -> Path:
    """Return the log of each process of this machine's platform, running or not."""
    return settings().home / "logs"
