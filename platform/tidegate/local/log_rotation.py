"""Logs stay small: one that has grown is copied to `NAME.1` and emptied.

Copied, because who writes it holds it open. Each writer opens for appending, so it goes on at the new end;
the few lines that are written between copy and cut are lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from pathlib import Path

log = logging.getLogger("tidegate.local")

MAX_LOG_BYTES = 32 * 1024 * 1024
LOOK_SECONDS = 10.0


async def keep_small(folder: Path) -> None:
    """For ever: look at the logs of a folder now and then."""
    while True:
        await asyncio.to_thread(rotate, folder, MAX_LOG_BYTES)
        await asyncio.sleep(LOOK_SECONDS)


def rotate(folder: Path, most_bytes: int) -> None:
    """Cut each log above `most_bytes`. What cannot be cut is said, and the others go on."""
    for path in folder.glob("*.log"):
        try:
            if path.is_symlink() or path.stat().st_size <= most_bytes:
                continue
            old = path.with_name(path.name + ".1")
            with path.open("rb") as source, old.open("wb") as target:
                old.chmod(0o600)
                source.seek(-most_bytes, os.SEEK_END)  # of one that grew while nobody looked, the end
                shutil.copyfileobj(source, target)
            os.truncate(path, 0)
        except OSError as error:
            log.error("%s cannot be rotated: %s", path, error)
