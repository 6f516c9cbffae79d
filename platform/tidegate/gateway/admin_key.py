"""The key that an installation starts with: made elsewhere, mounted as a file, let in by every gateway.

A gateway registers it at its start and after each reconnect, because a Redis that came back without its data
has lost it. Registering is idempotent, and a key that was revoked stays revoked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tidegate.errors import ConfigError, FieldProblem, QueueUnavailable
from tidegate.tasks import end_tasks

logger = logging.getLogger("tidegate.gateway")

NAME = "admin"
# The store keeps a plain digest, which only a secret that nobody can guess withstands.
LEAST_CHARACTERS = 32


class KeyStore(Protocol):
    async def register(self, secret: str, name: str) -> bool:
        """Let a secret in; whether it was new. Raises `QueueUnavailable`."""
        ...


def read_admin_key(path: Path, setting: str = "TIDEGATE_ADMIN_KEY_FILE") -> str:
    """The secret in the file. Raises `ConfigError` that names the setting, and never the secret."""
    try:
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(setting, path, f"cannot be read as ASCII text: {error}") from error
    if not re.fullmatch(rf"[!-~]{{{LEAST_CHARACTERS},256}}", secret):
        raise _refused(
            setting,
            path,
            f"must hold one key of {LEAST_CHARACTERS} to 256 printable characters without spaces; "
            "make one with: python -c 'import secrets; print(\"tg-\" + secrets.token_urlsafe(32))'",
        )
    return secret


class AdminKey:
    def __init__(self, keys: KeyStore, secret: str) -> None:
        self._keys = keys
        self._secret = secret
        self._task: asyncio.Task[None] | None = None
        self._stop_listening: Callable[[], None] = lambda: None

    async def start(self, on_reconnect: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """Register now and after each reconnect. Raises `QueueUnavailable`."""
        self._stop_listening = on_reconnect(self._register_soon)
        await self._register()

    async def close(self) -> None:
        self._stop_listening()
        await end_tasks(self._task)

    def _register_soon(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._register_again())

    async def _register_again(self) -> None:
        # Redis away once more: the next reconnect comes back here.
        with contextlib.suppress(QueueUnavailable):
            await self._register()

    async def _register(self) -> None:
        if await self._keys.register(self._secret, NAME):
            logger.info("the admin key of TIDEGATE_ADMIN_KEY_FILE is registered")


def _refused(setting: str, path: Path, remedy: str) -> ConfigError:
    problem = FieldProblem(setting, str(path), remedy)
    return ConfigError(str(problem), [problem])
