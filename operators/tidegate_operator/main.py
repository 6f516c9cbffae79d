"""`tidegate-operator`: answer for health and the control API, wait for the Lease, lead until it is lost or a
signal comes.

A process that lost its Lease ends with exit code 1, to be started anew.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from contextlib import AsyncExitStack
from functools import partial

from tidegate.errors import ConfigError, TidegateError
from tidegate.settings import read_settings
from tidegate.store.audit import AuditStream
from tidegate.store.connection import Connection
from tidegate.store.depths import QueueDepths
from tidegate.store.registry import Registry
from tidegate.telemetry import configure_logging
from tidegate_operator.apply import Applier
from tidegate_operator.cache import Cache
from tidegate_operator.cluster import Cluster, configuration
from tidegate_operator.control_api import serve_control_api
from tidegate_operator.controller import Controller
from tidegate_operator.gather import Gatherer, Troubles
from tidegate_operator.handlers import EventHandler
from tidegate_operator.health import Liveness, serve_health
from tidegate_operator.informer import Informers
from tidegate_operator.kinds import WATCHED
from tidegate_operator.leader import lead
from tidegate_operator.metrics import Metrics
from tidegate_operator.objects import ResourceReader
from tidegate_operator.reconcile import Reconciler
from tidegate_operator.serves import Serves
from tidegate_operator.settings import OperatorSettings
from tidegate_operator.work_queue import ReconcileQueue

log = logging.getLogger("tidegate.operator")


def main() -> int:
    try:
        settings = read_settings(OperatorSettings)
    except ConfigError as error:
        sys.stderr.write(f"tidegate-operator: {error.message}\n")
        return 2
    configure_logging(settings.log_format, settings.log_level)
    try:
        return asyncio.run(run(settings))
    except TidegateError as error:
        log.error("%s: %s", error.reason, error.message)
    except Exception:
        log.exception("the operator ends")
    return 1


async def run(settings: OperatorSettings) -> int:
    """Returns the exit code."""
    metrics, liveness = Metrics(), Liveness()
    identity = f"{settings.pod_name}-{time.time_ns():x}"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(
            serve_health(settings.health_host, settings.health_port, liveness, metrics)
        )
        cluster = await stack.enter_async_context(Cluster(await configuration(), metrics.count_write))
        # Opened by the first call: the operator starts and tells the truth also while Redis is away.
        redis = Connection(settings.redis_url, name="tidegate-operator")
        stack.push_async_callback(redis.close)
        serves = Serves(settings.serve_url, cluster)
        stack.push_async_callback(serves.close)
        if settings.control_key_file is not None:
            await stack.enter_async_context(
                serve_control_api(settings, settings.control_key_file, cluster, redis, serves)
            )
        controller = build(settings, cluster, redis, serves, metrics, liveness)
        leading = asyncio.create_task(
            lead(cluster.client, settings.lease_name, settings.own_namespace, identity, controller.run)
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, leading.cancel)
        try:
            return 0 if await leading else 1
        except asyncio.CancelledError:  # by the signal
            return 0


def build(
    settings: OperatorSettings,
    cluster: Cluster,
    redis: Connection,
    serves: Serves,
    metrics: Metrics,
    liveness: Liveness,
) -> Controller:
    cache, queue = Cache(), ReconcileQueue()
    handler = EventHandler(cache, queue)
    for kind in WATCHED:
        metrics.objects.labels(kind).set_function(partial(cache.count, kind))
    registry = Registry(redis, key_prefix=settings.key_prefix, times=settings.times)
    gatherer = Gatherer(
        cache,
        ResourceReader(cache),
        registry,
        QueueDepths(redis, key_prefix=settings.key_prefix),
        serves,
        Troubles(cluster),
        settings.replica_settings,
        settings.queue_url,
        settings.ray_defaults,
    )
    audit = AuditStream(redis, key_prefix=settings.key_prefix)
    applier = Applier(cluster, cache, registry, serves, settings.pod_name, settings.own_namespace, audit)
    reconciler = Reconciler(gatherer, applier)
    informers = Informers(cluster, handler, liveness, settings.watched_namespaces)
    return Controller(settings, cache, queue, handler, informers, reconciler, metrics, liveness)


if __name__ == "__main__":
    raise SystemExit(main())
