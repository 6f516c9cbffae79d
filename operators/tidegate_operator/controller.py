"""The controller is what the leader runs, all of it on one event loop.

    informers ──> cache, queue ──> workers (one key each) ──> reconcile
    resync ─────────────^ every pool now and then, for what no watch brings

No worker starts before every informer has had an answer, and a pool waits until its namespace is ready
(`informer` says why).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from tidegate.errors import QueueUnavailable
from tidegate.runtime import calm_collector
from tidegate.tasks import end_tasks
from tidegate_operator.cache import Cache
from tidegate_operator.cluster import ApiConflict, ApiUnavailable
from tidegate_operator.handlers import EventHandler
from tidegate_operator.health import Liveness
from tidegate_operator.informer import Informers
from tidegate_operator.metrics import Metrics
from tidegate_operator.reconcile import Reconciler
from tidegate_operator.settings import OperatorSettings
from tidegate_operator.work_queue import CONFLICT_BACKOFF_SECONDS, Key, ReconcileQueue

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Controller:
    settings: OperatorSettings
    cache: Cache
    queue: ReconcileQueue
    handler: EventHandler
    informers: Informers
    reconciler: Reconciler
    metrics: Metrics
    liveness: Liveness

    async def run(self) -> None:
        """Ends only with what one of its tasks raises."""
        self.metrics.leading.set(1)
        self.metrics.show(self.cache, self.settings.watched_namespaces, self._is_followed)
        tasks = [asyncio.create_task(self.informers.run(), name="informers")]
        try:
            await self.informers.answered()
            log.info(
                "%d Models in %d Pools; KubeRay is %s",
                self.cache.count("Model"),
                self.cache.count("Pool"),
                "missing" if "RayCluster" in self.cache.missing else "there",
            )
            calm_collector()
            tasks += [asyncio.create_task(self._work(), name="worker") for _ in range(self.settings.workers)]
            tasks.append(asyncio.create_task(self._resync(), name="resync"))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end_tasks(*tasks)

    async def _work(self) -> None:
        """One worker: a key at a time, for ever."""
        while True:
            key = await self.queue.take()
            self.metrics.queue_depth.set(len(self.queue))
            if not self.informers.is_ready(key[0]):
                self.queue.end(key)  # all of the namespace's come again when it is
                continue
            asked_at = self.handler.changed_at.pop(key, None)
            began = time.monotonic()
            outcome = await self._reconcile(key)
            ended = time.monotonic()
            self.metrics.reconcile_seconds.labels(outcome).observe(ended - began)
            if asked_at is not None and outcome == "failed":
                self.handler.changed_at.setdefault(key, asked_at)
            elif asked_at is not None:
                self.metrics.change_seconds.observe(ended - asked_at)

    async def _reconcile(self, key: Key) -> str:
        """Reconcile a pool and give its key back to the queue. Returns the outcome: settled, progressing or
        failed."""
        name = "/".join(key)
        try:
            with self.liveness.work(f"the reconcile of {name}"):
                pause = await self.reconciler.reconcile(key)
        except ApiConflict as error:
            retry = self.queue.end_failed(key, CONFLICT_BACKOFF_SECONDS)
            log.info("pool %s: %s Again in %.2f s.", name, error.message, retry)
        except (ApiUnavailable, QueueUnavailable) as error:
            retry = self.queue.end_failed(key)
            log.warning("pool %s: %s Again in %.1f s.", name, error.message, retry)
        except Exception:
            retry = self.queue.end_failed(key)
            log.exception("pool %s: a reconcile failed; again in %.1f s", name, retry)
        else:
            self.queue.end(key)
            if pause is not None:
                self.queue.add(key, pause)
            return "progressing" if pause is not None and pause < 1.0 else "settled"
        return "failed"

    def _is_followed(self, namespace: str) -> bool:
        return self.informers.is_ready(namespace) and not self.reconciler.is_ending(namespace)

    async def _resync(self) -> None:
        while True:
            # Of a namespace that cannot be listed nothing is known, also not that its Models are gone.
            if self.informers.are_ready():
                with contextlib.suppress(QueueUnavailable):  # the pools say so in their status
                    await self.reconciler.sweep()
            await asyncio.sleep(self.settings.resync_seconds)
            await self.reconciler.tidy()
            self.handler.resync(*self.settings.watched_namespaces)
