"""Informers keep the cache what the API server has: one for each watched kind in each namespace.

    list, in pages ──> EventHandler.on_list ──> watch from the listing's version ──> on_update, on_delete
         ^                                         │        ^
         │ the watch was refused, was too old,     │        │ the watch brought something and ended:
         └──────────── or brought nothing ─────────┴────────┘ go on from the last version that it brought

Each informer is one task of the operator's event loop. It awaits the API server and its own pauses and
nothing else, so a whole listing, or one event, is taken in without another task in between. No informer knows
of another: what one namespace refuses, or one kind that is missing, stops that informer alone.

What holds at all times:

- Nothing is missed. A watch goes on from the version of the last event or bookmark that was taken in; where
  the API server no longer has it (410 Gone), a listing brings what changed and, by what it lacks, what went.
  So nothing is listed again only because time has passed.
- Nothing hangs. A call ends after `cluster.TIMEOUT_SECONDS`, a watch on which not even a bookmark comes after
  `cluster.QUIET_SECONDS`, and the API server ends every watch after some minutes. Each turn is a beat
  of `Liveness`, which fails the process where an informer makes none.
- Nothing is asked without rest. Every turn ends with a pause that is drawn at random, doubles while the API
  server gives nothing, and is bounded.
- A namespace is ready while each of its kinds was listed and none is refused. Only pools of ready namespaces
  are reconciled: a plan made from half of the Models would take the other half out of Serve. One that becomes
  ready has all its pools reconciled.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from contextlib import aclosing

from tidegate_operator import cache
from tidegate_operator.cluster import ApiError, ApiExpired, ApiGone, ApiUnavailable, Cluster
from tidegate_operator.handlers import EventHandler
from tidegate_operator.health import Liveness
from tidegate_operator.kinds import RESOURCES, WATCHED, Kind

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 8.0  # a kind or a namespace that comes late is seen within this


class Informer:
    """Follows one kind in one namespace. `is_ready` while what the cache has of it may be acted on."""

    def __init__(
        self, cluster: Cluster, handler: EventHandler, liveness: Liveness, kind: Kind, namespace: str
    ) -> None:
        self._cluster = cluster
        self._handler = handler
        self._liveness = liveness
        self._kind = kind
        self._namespace = namespace
        self._name = f"the informer of {kind} in {namespace}"
        self._problem = ""
        self._version: int | None = None  # of what was taken in last; None: to be listed
        self.is_ready = False
        self.answered = asyncio.Event()  # it was listed, or refused

    async def run(self) -> None:
        """Never ends by itself."""
        failures = 0
        while True:
            self._liveness.beat(self._name)
            if await self._turn():
                failures = 0
            else:
                self._version, failures = None, failures + 1
            await asyncio.sleep(pause_seconds(failures, random.random()))

    async def _turn(self) -> bool:
        """List where that is needed, then watch until the watch ends. Returns whether to go on with it."""
        has_brought = False
        try:
            if self._version is None:
                self._version = await self._list()
            stream = self._cluster.watch(
                self._kind, self._namespace, RESOURCES[self._kind].selector, self._version
            )
            async with aclosing(stream) as events:
                async for change, body in events:
                    self._liveness.beat(self._name)
                    self._take(change, body)
                    self._version, has_brought = cache.version(body), True
            return has_brought
        except ApiExpired as error:
            log.debug("%s lists anew: %s", self._name, error.message)
        except ApiUnavailable as error:
            if has_brought:
                return True
            self._tell(error.message)
        except ApiError as error:
            self._refused(error)
        except Exception:
            log.exception("%s failed", self._name)
        return False

    async def _list(self) -> int:
        selector = RESOURCES[self._kind].selector
        found, version = await self._cluster.list(self._kind, self._namespace, selector)
        self._handler.on_list(self._kind, self._namespace, found, version)
        if self._problem:
            log.info("%s goes on", self._name)
            self._problem = ""
        self._answer(is_ready=True)
        return version

    def _take(self, change: str, body: cache.Body) -> None:
        if change == "DELETED":
            self._handler.on_delete(self._kind, body)
        elif change != "BOOKMARK":  # which brings a version and no object
            self._handler.on_update(self._kind, body)

    def _refused(self, error: ApiError) -> None:
        """A refusal stands until somebody changes something: a Role, a namespace, a definition."""
        is_missing = isinstance(error, ApiGone) and RESOURCES[self._kind].is_optional
        if is_missing:
            self._handler.on_missing(self._kind)
        self._tell(error.message)
        self._answer(is_ready=is_missing)

    def _answer(self, *, is_ready: bool) -> None:
        became_ready = is_ready and not self.is_ready
        self.is_ready = is_ready
        if became_ready:
            self._handler.resync(self._namespace)
        self.answered.set()

    def _tell(self, problem: str) -> None:
        """Log a problem once, however often it is met."""
        if problem != self._problem:
            log.warning("%s waits: %s", self._name, problem)
            self._problem = problem


class Informers:
    """Runs an informer for each watched kind in each of some namespaces."""

    def __init__(
        self, cluster: Cluster, handler: EventHandler, liveness: Liveness, namespaces: Iterable[str]
    ) -> None:
        self._of = {
            namespace: [Informer(cluster, handler, liveness, kind, namespace) for kind in WATCHED]
            for namespace in namespaces
        }

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for informers in self._of.values():
                for informer in informers:
                    group.create_task(informer.run())

    async def answered(self) -> None:
        """Wait until all have been listed or refused once. Before that a Model may seem to be the only one of
        its name."""
        for informers in self._of.values():
            for informer in informers:
                await informer.answered.wait()

    def is_ready(self, namespace: str) -> bool:
        return all(informer.is_ready for informer in self._of[namespace])

    def are_ready(self) -> bool:
        return all(map(self.is_ready, self._of))


def pause_seconds(failures: int, drawn: float) -> float:
    """Return the pause after so many turns that brought nothing; `drawn` is from 0 to 1."""
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 16))
    return longest * (0.5 + 0.5 * drawn)
