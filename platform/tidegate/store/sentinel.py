"""Asks Sentinels which server is the master now.

All are asked at once, and what most of them name is taken: one that is cut off from the others may go on
naming a master that is gone. Where no majority answers, the most named one has to do; its role is checked by
who connects to it (Sentinel's guide for clients asks for both).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from tidegate.errors import ConfigError, QueueUnavailable
from tidegate.store.address import Address, Endpoint
from tidegate.store.wire import ReplyError, Wire
from tidegate.tasks import end_tasks


async def find_master(
    address: Address, dial: Callable[[Endpoint], Awaitable[Wire]], *, timeout_seconds: float
) -> Endpoint:
    """Raises `ConfigError` where Sentinels answer but refuse us or know no such master, `QueueUnavailable`
    where none answers within `timeout_seconds`."""
    asking = [asyncio.create_task(_ask(address, dial, sentinel)) for sentinel in address.sentinels]
    votes: Counter[Endpoint] = Counter()
    refusal: ConfigError | None = None
    try:
        for answer in asyncio.as_completed(asking, timeout=timeout_seconds):
            found = await answer
            if isinstance(found, ConfigError):
                refusal = found
            elif found is not None:
                votes[found] += 1
                if votes[found] > len(asking) // 2:
                    break
    except TimeoutError:
        pass  # whoever has answered by now has to do
    finally:
        await end_tasks(*asking)
    if votes:
        return votes.most_common(1)[0][0]
    raise refusal or QueueUnavailable(f"No Sentinel answers for {address}.")


async def _ask(
    address: Address, dial: Callable[[Endpoint], Awaitable[Wire]], sentinel: Endpoint
) -> Endpoint | ConfigError | None:
    """Returns the master that one Sentinel names, its refusal, or None where it cannot be asked."""
    shown = "{}:{}".format(*sentinel)
    try:
        wire = await dial(sentinel)
        try:
            if credentials := address.sentinel_credentials.command:
                await wire.send(*credentials)
            found = await wire.send("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.master)
        finally:
            wire.abort()
    except (OSError, QueueUnavailable):
        return None
    except ReplyError as error:
        remedy = "; put sentinel_username and sentinel_password into the URL"
        is_locked = error.kind in ("WRONGPASS", "NOAUTH")
        return ConfigError(f"redis_url: the Sentinel at {shown}: {error}{remedy if is_locked else ''}")
    if found is None:
        return ConfigError(f"redis_url: the Sentinel at {shown} watches no master {address.master!r}")
    return found[0].decode(), int(found[1])
