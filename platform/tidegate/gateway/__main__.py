"""`python -m tidegate.gateway`: one gateway process. Settings come from `TIDEGATE_*` and `REDIS_URL`."""

from __future__ import annotations

import logging
import secrets
import signal
import sys
from contextlib import AsyncExitStack

import uvicorn
import uvloop

from tidegate.errors import ConfigError, FieldProblem, QueueUnavailable
from tidegate.gateway.admin_key import AdminKey, read_admin_key
from tidegate.gateway.app import create_app
from tidegate.gateway.auth import check_no_auth
from tidegate.gateway.door import door_class, server_config
from tidegate.gateway.listen import listen, url
from tidegate.gateway.services import make_services
from tidegate.runtime import calm_collector
from tidegate.settings import Settings, load_settings
from tidegate.store.connection import Connection
from tidegate.store.gateway_queue import GatewayQueue
from tidegate.store.kept_calls import KeptCalls
from tidegate.store.keys import Keys
from tidegate.store.registry import Registry
from tidegate.telemetry import configure_logging, fields

logger = logging.getLogger("tidegate.gateway")

CONNECT_SECONDS = 60.0  # that a starting gateway waits for Redis


def main() -> int:
    """Parse, build, run. 2: a setting is wrong; 1: Redis did not come."""
    try:
        settings = load_settings()
        configure_logging(settings.log_format, settings.log_level)
        check_settings(settings)
        # uvicorn raises the signal that stopped it once more when it is done; by then it has had its effect.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        uvloop.run(serve(settings))
    except ConfigError as error:
        sys.stderr.write(f"tidegate gateway: {error.message}\n")
        return 2
    except QueueUnavailable as error:
        sys.stderr.write(f"tidegate gateway: {error.message}\n")
        return 1
    return 0


def check_settings(settings: Settings) -> None:
    """Raises `ConfigError` for what only a gateway needs."""
    check_no_auth(settings)
    if not settings.redis_url:
        problem = FieldProblem("REDIS_URL", "''", "a gateway needs one: redis://host:port/db")
        raise ConfigError(str(problem), [problem])


async def serve(settings: Settings) -> None:
    """Serve until a signal; then stop accepting, let open answers end, cancel what is left."""
    gateway_id = f"gw-{secrets.token_hex(6)}"
    secret = read_admin_key(settings.admin_key_file) if settings.admin_key_file is not None else None
    async with AsyncExitStack() as stack:
        connection = Connection(settings.redis_url, name=f"tidegate-{gateway_id}")
        stack.push_async_callback(connection.close)
        await connection.open(within_seconds=CONNECT_SECONDS)
        keys = Keys(connection, key_prefix=settings.key_prefix)
        registry = Registry(connection, key_prefix=settings.key_prefix)
        for follower in (keys, registry):
            await follower.start()
            stack.push_async_callback(follower.close)
        if secret is not None:
            admin_key = AdminKey(keys, secret)
            await admin_key.start(connection.on_reconnect)
            stack.push_async_callback(admin_key.close)
        queue = GatewayQueue(
            connection,
            key_prefix=settings.key_prefix,
            gateway_id=gateway_id,
            times=settings.times,
        )
        kept = KeptCalls(connection, key_prefix=settings.key_prefix, times=settings.times)
        sockets = listen(settings.host, settings.port)
        app = create_app(make_services(settings, gateway_id, queue, kept, keys, registry))
        grace_seconds = round(settings.shutdown_grace_seconds)
        server = uvicorn.Server(
            server_config(app, door_class(settings), lifespan="on", grace_seconds=grace_seconds)
        )
        logger.info(
            "gateway starts", extra=fields(gateway=gateway_id, host=settings.host, port=settings.port)
        )
        calm_collector()
        logger.info("gateway running on %s", " ".join(map(url, sockets)))
        await server.serve(sockets=sockets)
        logger.info("gateway stopped", extra=fields(gateway=gateway_id))


if __name__ == "__main__":
    sys.exit(main())
