"""`tidegate-operator`: wait for the Lease, then watch, reconcile, and end when the Lease is lost.

    health server ── always, in every process
    leader ── kopf's watches ──> cache, queue ──> workers (one key each) ──> reconcile
           └─ resync: lists everything now and then, for what a watch has missed

The cache is filled by listings before the first worker starts: a plan made from half of the Models would take
the other half out of Serve. After that kopf's watches keep it fresh, and a periodic listing finds what they
miss (kopf tells nothing of an object that went while its watch was broken).

The process ends, and is started anew, where that is the simplest way to be right again: the Lease is lost
(exit code 1), a watch fails for good (1), or KubeRay has come and must be watched (0).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import kopf

from tidegate.errors import ConfigError, QueueUnavailable, TidegateError
from tidegate.runtime import calm_collector
from tidegate.settings import read_settings
from tidegate.store.connection import Connection
from tidegate.store.depths import QueueDepths
from tidegate.store.registry import Registry
from tidegate.tasks import end_tasks
from tidegate.telemetry import configure_logging
from tidegate_operator.apply import Applier
from tidegate_operator.cache import KINDS, Cache, Kind, pool_of
from tidegate_operator.cluster import ApiConflict, ApiGone, ApiUnavailable, Cluster, configuration
from tidegate_operator.gather import Abilities, Gatherer, Troubles
from tidegate_operator.handlers import OURS, SELECTOR, News, kopf_settings, watch
from tidegate_operator.health import Pulse, serve_health
from tidegate_operator.leader import lead
from tidegate_operator.metrics import Metrics
from tidegate_operator.objects import ResourceReader
from tidegate_operator.reconcile import Reconciler
from tidegate_operator.serves import Serves
from tidegate_operator.settings import OperatorSettings
from tidegate_operator.work_queue import CONFLICT_BACKOFF_SECONDS, WorkQueue

log = logging.getLogger("tidegate.operator")

KUBERAY_SECONDS = 5.0  # how often a missing KubeRay is looked for
LIST_RETRY_SECONDS = 2.0

Places = Sequence[tuple[Kind, str]]  # kinds of objects in namespaces


class Operator:
    """What the leader runs. All of it on one event loop."""

    def __init__(
        self, settings: OperatorSettings, cluster: Cluster, redis: Connection, metrics: Metrics, pulse: Pulse
    ) -> None:
        self._settings = settings
        self._cluster = cluster
        self._metrics = metrics
        self._pulse = pulse
        self._cache = Cache()
        self._queue = WorkQueue()
        self._news = News(self._cache, self._queue)
        self._abilities = Abilities()
        self.serves = Serves(settings.serve_url)
        registry = Registry(redis, key_prefix=settings.key_prefix, times=settings.times)
        gatherer = Gatherer(
            self._cache,
            ResourceReader(self._cache),
            registry,
            QueueDepths(redis, key_prefix=settings.key_prefix),
            self.serves,
            Troubles(cluster),
            self._abilities,
            settings.replica_settings,
            settings.ray_defaults,
        )
        applier = Applier(cluster, self._cache, registry, self.serves, settings.pod_name)
        self._reconciler = Reconciler(gatherer, applier)

    async def run(self) -> None:
        """Until the process is asked to end, or should be started anew."""
        self._metrics.leading.set(1)
        await self._first_listing()
        calm_collector()
        kinds = [kind for kind in KINDS if kind != "RayCluster" or self._abilities.has_kuberay]
        # Started before kopf, which ends every task that is younger than itself when it stops.
        tasks = [asyncio.create_task(self._work(), name="worker") for _ in range(self._settings.workers)]
        tasks.append(asyncio.create_task(self._resync(), name="resync"))
        if not self._abilities.has_kuberay:
            tasks.append(asyncio.create_task(self._await_kuberay(), name="kuberay"))
        watching = kopf.operator(
            registry=watch(self._news, kinds),
            settings=kopf_settings(),
            standalone=True,
            namespaces=list(self._settings.watched_namespaces),
        )
        try:
            tasks.append(asyncio.create_task(watching, name="watches"))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end_tasks(*tasks)

    async def _work(self) -> None:
        """One worker: a key at a time, for ever."""
        while True:
            key = await self._queue.take()
            self._metrics.queue_depth.set(len(self._queue))
            asked_at = self._news.changed_at.pop(key, None)
            began = time.monotonic()
            outcome = "failed"
            try:
                with self._pulse.work("/".join(key)):
                    pause = await self._reconciler.reconcile(key)
            except ApiConflict as error:
                retry = self._queue.end_failed(key, CONFLICT_BACKOFF_SECONDS)
                log.info("pool %s: %s Again in %.2f s.", "/".join(key), error.message, retry)
            except (ApiUnavailable, QueueUnavailable) as error:
                retry = self._queue.end_failed(key)
                log.warning("pool %s: %s Again in %.1f s.", "/".join(key), error.message, retry)
            except Exception:
                retry = self._queue.end_failed(key)
                log.exception("pool %s: a look failed; again in %.1f s", "/".join(key), retry)
            else:
                outcome = "progressing" if pause is not None and pause < 1.0 else "settled"
                self._queue.end(key)
                if pause is not None:
                    self._queue.add(key, pause)
            ended = time.monotonic()
            self._metrics.reconcile_seconds.labels(outcome).observe(ended - began)
            if asked_at is not None and outcome == "failed":
                self._news.changed_at.setdefault(key, asked_at)
            elif asked_at is not None:
                self._metrics.change_seconds.observe(ended - asked_at)

    async def _first_listing(self) -> None:
        missing = await self._list(self._everything)
        while missing:
            await asyncio.sleep(LIST_RETRY_SECONDS)
            missing = await self._list(missing)
        log.info(
            "%d Models in %d Pools; KubeRay is %s",
            len(self._cache.everywhere("Model")),
            len(self._cache.everywhere("Pool")),
            "there" if self._abilities.has_kuberay else "missing",
        )

    async def _resync(self) -> None:
        while True:
            with contextlib.suppress(QueueUnavailable):  # the pools say so in their status
                await self._reconciler.sweep()
            await asyncio.sleep(self._settings.resync_seconds)
            missing = await self._list(self._everything)
            while missing:
                await asyncio.sleep(LIST_RETRY_SECONDS)
                missing = await self._list(missing)
            await self._reconciler.tidy()
            for body in self._cache.everywhere("Pool"):
                self._queue.add((body["metadata"]["namespace"], body["metadata"]["name"]))
            for body in self._cache.everywhere("Model"):
                self._queue.add((body["metadata"]["namespace"], pool_of(body)))

    @property
    def _everything(self) -> Places:
        return [(kind, namespace) for namespace in self._settings.watched_namespaces for kind in KINDS]

    async def _list(self, places: Places) -> Places:
        """List these into the cache. Returns those that the API server did not list; the others' news need
        not wait for them. Raises `ApiGone` where our own definitions are missing."""
        missing = []
        for kind, namespace in places:
            try:
                await self._list_kind(kind, namespace)
            except ApiUnavailable as error:
                log.warning("%s Again in %.0f s.", error.message, LIST_RETRY_SECONDS)
                missing.append((kind, namespace))
        for kind in KINDS:
            self._metrics.objects.labels(kind).set(len(self._cache.everywhere(kind)))
        return missing

    async def _list_kind(self, kind: Kind, namespace: str) -> None:
        try:
            found, version = await self._cluster.list(kind, namespace, SELECTOR if kind in OURS else "")
        except ApiGone:
            if kind != "RayCluster":
                raise
            self._abilities.has_kuberay = False
            return
        self._news.listed(kind, namespace, found, version)

    async def _await_kuberay(self) -> None:
        namespace = self._settings.watched_namespaces[0]
        while True:
            await asyncio.sleep(KUBERAY_SECONDS)
            try:
                await self._cluster.list("RayCluster", namespace, SELECTOR)
            except TidegateError:
                continue  # it is still missing, or the API server is away
            log.info("KubeRay has come; starting anew to watch its clusters")
            return


async def run(settings: OperatorSettings) -> int:
    """The exit code."""
    metrics, pulse = Metrics(), Pulse()
    identity = f"{settings.pod_name}-{time.time_ns():x}"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(
            serve_health(settings.health_host, settings.health_port, pulse, metrics)
        )
        cluster = await stack.enter_async_context(Cluster(await configuration(), metrics.count_write))
        # Opened by the first call: the operator starts and tells the truth also while Redis is away.
        redis = Connection(settings.redis_url, name="tidegate-operator")
        stack.push_async_callback(redis.close)
        operator = Operator(settings, cluster, redis, metrics, pulse)
        stack.push_async_callback(operator.serves.close)
        leading = asyncio.create_task(
            lead(cluster.client, settings.lease_name, settings.own_namespace, identity, operator.run)
        )
        # Until kopf puts its own handlers in their place, a signal ends the wait for the Lease.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, leading.cancel)
        try:
            return 0 if await leading else 1
        except asyncio.CancelledError:
            return 0


def main() -> int:
    try:
        settings = read_settings(OperatorSettings)
    except ConfigError as error:
        sys.stderr.write(f"tidegate-operator: {error.message}\n")
        return 2
    configure_logging(settings.log_format, settings.log_level)
    logging.getLogger("kopf").setLevel(logging.WARNING)  # a line for each event otherwise
    try:
        return asyncio.run(run(settings))
    except TidegateError as error:
        log.error("%s: %s", error.reason, error.message)
    except Exception:
        log.exception("the operator ends")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
