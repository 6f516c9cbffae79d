"""Signals to the child processes of an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal


def send_signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal to a child, unless it has ended.

    Not by its own `send_signal`, `kill` or `terminate`: before Python 3.13 they look first whether it has
    just ended, which takes its exit status from under the event loop, that then says 255
    (https://github.com/python/cpython/issues/119710).
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
