"""What other processes do, which may end while one looks at them."""

from __future__ import annotations

import psutil

from tidegate.local.processes import lives


def command(process: psutil.Process) -> list[str]:
    """Its words; none where it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def runs(pid: int) -> bool:
    """A zombie is gone; only its parent has not looked yet."""
    try:
        return lives(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False
