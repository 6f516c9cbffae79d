"""The control API of a cluster, on every replica of the operator: its parts put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from tidegate.control_api.app import ControlApp, Services
from tidegate.control_api.server import serving
from tidegate.control_api.sign_in import OwnKey
from tidegate.errors import TidegateError
from tidegate.gateway.admin_key import read_admin_key
from tidegate.gateway.listen import listen
from tidegate.store.audit import AuditStream
from tidegate.store.connection import Connection
from tidegate.store.depths import QueueDepths
from tidegate.store.keys import Keys
from tidegate.store.registry import Registry
from tidegate.store.usage import UsageReader
from tidegate.tasks import end_tasks
from tidegate_operator.api_port import ClusterHost
from tidegate_operator.cluster import Cluster
from tidegate_operator.serves import Serves
from tidegate_operator.settings import OperatorSettings

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


@contextlib.asynccontextmanager
async def serve_control_api(
    settings: OperatorSettings, key_file: Path, cluster: Cluster, redis: Connection, serves: Serves
) -> AsyncIterator[None]:
    """Answer while the block runs. Raises `ConfigError` where the key or the address cannot be used."""
    secret = read_admin_key(key_file, "TIDEGATE_CONTROL_KEY_FILE")
    prefix = settings.key_prefix
    keys = Keys(redis, key_prefix=prefix)
    host = ClusterHost(
        cluster,
        Registry(redis, key_prefix=prefix, times=settings.times),
        QueueDepths(redis, key_prefix=prefix),
        serves,
        settings.replica_settings,
        settings.queue_url,
        settings.ray_defaults,
        settings.watched_namespaces,
    )
    services = Services(
        host=host,
        keys=keys,
        key_ring=OwnKey(secret, "admin", keys),
        usage=UsageReader(redis, keys, key_prefix=prefix),
        audit=AuditStream(redis, key_prefix=prefix),
    )
    sockets = listen(
        settings.control_host, settings.control_port, "TIDEGATE_CONTROL_HOST, TIDEGATE_CONTROL_PORT"
    )
    following = asyncio.create_task(_follow(keys), name="keys")
    try:
        async with serving(ControlApp(services), sockets):
            yield
    finally:
        await end_tasks(following)
        await keys.close()


async def _follow(keys: Keys) -> None:
    """Know Redis's keys as soon as it answers; until then the key of the file alone opens anything."""
    while True:
        try:
            await keys.start()
            return
        except TidegateError as error:
            log.info("control API: %s", error.message)
            await asyncio.sleep(RETRY_SECONDS)
