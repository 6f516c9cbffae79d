"""One reconcile of a pool: gather, decide, apply. The same twice writes nothing.

One worker at a time reconciles a pool (`work_queue`), so there is one writer of each Serve config and of each
Model's status. Between two reconciles nothing is kept that decides anything: the records are in the status of
Models and Pools. What is kept here only saves work (clients, what Serve refused), so an operator that starts
anew goes on where the last one stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tidegate.control.plan import PROGRESSING_SECONDS
from tidegate_operator.apply import Applier
from tidegate_operator.decision import decide
from tidegate_operator.gather import Gatherer
from tidegate_operator.work_queue import Key

log = logging.getLogger(__name__)


class Reconciler:
    def __init__(self, gatherer: Gatherer, applier: Applier, now: Callable[[], float] = time.time) -> None:
        self._gatherer = gatherer
        self._applier = applier
        self._now = now

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile one pool. Returns after how many seconds to do it again; None: when something changes."""
        found = await self._gatherer.gather(key, self._applier)
        decision = decide(found, self._now())
        if await self._applier.apply(decision, found.entries):
            return PROGRESSING_SECONDS  # Serve has something to say soon
        return decision.pause_seconds

    def is_ending(self, namespace: str) -> bool:
        return namespace in self._applier.ending

    async def sweep(self) -> None:
        """Forget models of which no resource is left, as after a deletion that nobody drained. Raises
        `QueueUnavailable`."""
        registry, cache = self._gatherer.registry, self._gatherer.cache
        for name in await registry.read_models():
            if not cache.named("Model", name):
                log.info("model %s has no resource any more", name)
                await registry.delete_model(name)

    async def tidy(self) -> None:
        """Let go what belongs to objects that are gone."""
        cache = self._gatherer.cache
        clusters = cache.everywhere("RayCluster")
        await self._gatherer.serves.keep(clusters)
        self._gatherer.troubles.keep(clusters)
        bodies = [*cache.everywhere("Model"), *cache.everywhere("Pool")]
        uids = frozenset(item["metadata"]["uid"] for item in bodies)
        self._gatherer.reader.forget(uids)
        self._applier.forget(uids)
