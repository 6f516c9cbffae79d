"""A server on an event loop of its own, for tests that are synchronous."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def in_thread(serving: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """What `serving` yields, which goes on in a thread meanwhile."""
    started: queue.Queue[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        ended = asyncio.Event()
        async with serving as served:
            started.put((served, asyncio.get_running_loop(), ended))
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="server", daemon=True)
    thread.start()
    served, loop, ended = started.get(timeout=30)
    try:
        yield served
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
