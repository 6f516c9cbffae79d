"""The control API on sockets, in a process that does other things too: its signals are not uvicorn's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence

import uvicorn

from tidegate.control_api.app import ControlApp
from tidegate.gateway.door import DoorLimits, door_within, server_config

MAX_HEAD_BYTES = 32 * 1024
HEAD_SECONDS = 20.0
BODY_SECONDS = 30.0
STALL_SECONDS = 60.0
MOST_CONNECTIONS = 128
GRACE_SECONDS = 3


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


@contextlib.asynccontextmanager
async def serving(app: ControlApp, sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
    """Answer on these listening sockets while the block runs; they are closed after it."""
    limits = DoorLimits(
        MAX_HEAD_BYTES, HEAD_SECONDS, BODY_SECONDS, STALL_SECONDS, MOST_CONNECTIONS, remedy="Send less."
    )
    server = _Server(server_config(app, door_within(limits), lifespan="off", grace_seconds=GRACE_SECONDS))
    task = asyncio.create_task(server.serve(sockets=list(sockets)), name="control API")
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait({task})
        for listener in sockets:
            listener.close()
