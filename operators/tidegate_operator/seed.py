"""`python -m tidegate_operator.seed FILE`: apply the Pools of the chart's values (its post-install hook).

Helm cannot do it: it checks the kinds of a release before it creates their definitions.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tidegate.control.bounded_yaml import YamlRefused, load_documents
from tidegate.errors import TidegateError
from tidegate.telemetry import configure_logging, fields
from tidegate_operator.cluster import ApiGone, ApiUnavailable, Cluster, Object, configuration
from tidegate_operator.kinds import Kind

log = logging.getLogger("tidegate.seed")

TIMEOUT_SECONDS = 120.0
POLL_SECONDS = 1.0


class Api(Protocol):
    async def apply(self, kind: Kind, manifest: Mapping[str, Any]) -> Object: ...


async def seed(
    api: Api,
    pools: Iterable[Mapping[str, Any]],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Apply each, waiting for a definition that is not served yet. Raises `ApiError` with the API server's
    sentence where it refuses one."""
    deadline = clock() + TIMEOUT_SECONDS
    for pool in pools:
        while True:
            try:
                await api.apply("Pool", pool)
            except (ApiGone, ApiUnavailable) as error:
                if clock() >= deadline:
                    raise
                log.info("waiting: %s", error.message)
                await sleep(POLL_SECONDS)
            else:
                break
        log.info("the Pool stands", extra=fields(pool=pool["metadata"]["name"]))


async def serve(pools: Iterable[Mapping[str, Any]]) -> None:
    async with Cluster(await configuration(), lambda *_: None) as cluster:
        await seed(cluster, pools)


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m tidegate_operator.seed FILE\n")
        return 2
    configure_logging("auto", "info")
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    try:
        asyncio.run(serve(document for document in load_documents(text) if document))
    except TidegateError as error:
        log.error("%s", error.message)
        return 1
    except YamlRefused as error:
        log.error("%s: %s", sys.argv[1], error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
