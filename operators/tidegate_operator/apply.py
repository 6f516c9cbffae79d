"""Carry a decision out, in its order. What one object refuses is logged, and the others go on.

A write names the version that was decided on. Where another has written first, the object is read again and
the failure raised, so that the next decision sees what stands, also where a watch is late or broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from tidegate.control.conditions import condition
from tidegate.control.reasons import DEGRADED, PROGRESSING, Reason
from tidegate.control_round import Audit, Registry, publish, tell
from tidegate.messages.registry import Condition, ModelEntry
from tidegate_operator.asked import removal, wrong_action
from tidegate_operator.cache import Body, Cache
from tidegate_operator.cluster import ApiConflict, ApiEnding, ApiError, ApiGone, ApiUnavailable, Object
from tidegate_operator.decision import Decision, Manifest, ObjectWrite
from tidegate_operator.kinds import Kind
from tidegate_operator.pod_problems import as_sentence
from tidegate_operator.ray_state import created
from tidegate_operator.ray_view import name_of
from tidegate_operator.serves import Serves
from tidegate_operator.status_patch import is_trouble

log = logging.getLogger(__name__)

MAX_NOTE_CHARACTERS = 1000
MOST_REFUSALS = 1000  # that are remembered
WRITES_AT_ONCE = 4  # of one pool's objects
REGARDING = ("name", "namespace", "uid", "resourceVersion")
CONTROLLER = "tidegate.dev/operator"


class Writer(Protocol):
    """The part of `Cluster` that is used here."""

    async def read(self, kind: Kind, body: Mapping[str, Any]) -> Object: ...

    async def apply(self, kind: Kind, manifest: Mapping[str, Any]) -> Object: ...

    async def apply_status(
        self, kind: Kind, body: Mapping[str, Any], status: Mapping[str, Any]
    ) -> Object: ...

    async def set_finalizers(
        self, kind: Kind, body: Mapping[str, Any], finalizers: Sequence[str]
    ) -> Object: ...

    async def patch(
        self, kind: Kind, body: Mapping[str, Any], operations: Sequence[Mapping[str, Any]]
    ) -> Object: ...

    async def create(self, kind: Kind, manifest: Mapping[str, Any]) -> Object: ...

    async def delete(self, kind: Kind, body: Mapping[str, Any]) -> None: ...


class Applier:
    def __init__(
        self,
        cluster: Writer,
        cache: Cache,
        registry: Registry,
        serves: Serves,
        instance: str,
        own_namespace: str,
        audit: Audit,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._registry = registry
        self._serves = serves
        self._instance = instance
        self._own_namespace = own_namespace
        self._audit = audit
        self._clock = clock
        self._now = now
        self._written_at: dict[str, float] = {}  # when a status was written, by uid
        self.refusals: dict[tuple[Kind, str, str], str] = {}  # of what is to be made, by namespace and name
        # Namespaces whose deletion refused a write, and when (unix seconds).
        self.ending: dict[str, float] = {}

    def since_write(self) -> dict[str, float]:
        """Return how many seconds ago the status of an object (by uid) was written."""
        now = self._clock()
        return {uid: now - at for uid, at in self._written_at.items()}

    def ends(self, namespace: str, bodies: Iterable[Body]) -> bool:
        """Tell whether a namespace is being deleted. Nothing is made in one that is: what is newer among
        `bodies` is in another of its name."""
        at = self.ending.get(namespace)
        if at is not None and any(created(body) > at for body in bodies):
            del self.ending[namespace]
            return False
        return at is not None

    def forget(self, uids: frozenset[str]) -> None:
        """Keep only what is known of these objects."""
        self._written_at = {uid: at for uid, at in self._written_at.items() if uid in uids}

    async def apply(self, decision: Decision, published: Mapping[str, ModelEntry]) -> bool:
        """Write all that is decided; `published` is what gateways read now. Returns whether a Serve was sent
        something. Nothing follows a step that fails."""
        refused = await self._write_objects(decision.objects)
        for body in decision.taken:
            if body["metadata"]["uid"] not in refused:  # else the record does not know it
                await self._take_off(body)
        for revision in decision.revisions:
            await self._make("ControllerRevision", revision, self._cluster.apply)
        for revision in decision.forgotten:
            await self._cluster.delete("ControllerRevision", revision)
            self._cache.drop("ControllerRevision", revision)
        await tell((note for _, note in decision.notes), self._audit, self._now())
        for body, note in decision.notes:
            if note.reason != Reason.RolloutAborted:  # its condition has an Event already
                status: Literal["True", "False"] = "False" if note.is_trouble else "True"
                await self._event(body, condition("Rollout", status, note.reason, note.message))
        await publish(self._registry, decision.registry, published)
        for job in decision.jobs:
            await self._start(job)
        for manifest in decision.new_clusters:
            if await self._make("RayCluster", manifest, self._cluster.apply):
                log.info("RayCluster %s is made", name_of(manifest))
        for cluster, operations in decision.patches:
            await self._patch(cluster, operations)
        has_sent = [
            await self._serves.write(each.cluster, each.configs, each.standing) for each in decision.serves
        ]
        for write in decision.released:
            if write.kind == "RayCluster":
                log.warning("RayCluster %s does not go by itself; it is freed", name_of(write.body))
            await self._write(write)
        for cluster in decision.deleted:
            log.info("RayCluster %s goes", name_of(cluster))
            await self._cluster.delete("RayCluster", cluster)
        return any(has_sent)

    async def _write_objects(self, writes: Sequence[ObjectWrite]) -> set[str]:
        """Write all of them; returns the uids of those that the API server refused. A write that fails does
        not hold up the others, and is raised in the end; an API server that is away is not asked for every
        object."""
        refused: set[str] = set()
        gate = asyncio.Semaphore(WRITES_AT_ONCE)
        conflicts: list[ApiConflict] = []
        outages: list[ApiUnavailable] = []

        async def write(each: ObjectWrite) -> None:
            async with gate:
                if len(outages) >= WRITES_AT_ONCE:
                    return
                try:
                    if not await self._write(each):
                        refused.add(each.body["metadata"]["uid"])
                except ApiConflict as error:
                    conflicts.append(error)
                except ApiUnavailable as error:
                    outages.append(error)

        await asyncio.gather(*map(write, writes))
        if failures := [*outages, *conflicts]:
            raise failures[0]
        return refused

    async def _write(self, each: ObjectWrite) -> bool:
        """Returns False where the API server refused it."""
        body = each.body
        try:
            if each.finalizers is not None:
                body = await self._cluster.set_finalizers(each.kind, body, each.finalizers)
                self._take(each.kind, body)
            if each.status is None:
                return True
            self._take(each.kind, await self._cluster.apply_status(each.kind, body, each.status))
        except ApiGone:
            return True  # the watch tells
        except ApiConflict:
            await self._read_again(each.kind, body)
            raise
        except ApiError as error:
            log.error("apply: %s", error.message)
            return False
        self._written_at[body["metadata"]["uid"]] = self._clock()
        for item in each.events:
            if item.type != PROGRESSING:  # its steps are `Ready`'s reasons on the way up
                await self._event(body, item)
        return True

    async def _take_off(self, body: Body) -> None:
        """Take what was asked in annotations off a Model. Where something else is asked by now, or the API
        server is away, it is seen again."""
        if (problem := wrong_action(body)) is not None:
            await self._event(body, problem)
        try:
            self._take("Model", await self._cluster.patch("Model", body, removal(body)))
        except (ApiError, ApiConflict, ApiUnavailable) as error:
            log.info("apply: %s", error.message)

    async def _start(self, job: Manifest) -> None:
        # A conflict: the one before it is still being removed, or the watch is behind.
        with contextlib.suppress(ApiConflict):
            await self._make("Job", job, self._cluster.create)

    async def _make(
        self, kind: Kind, manifest: Manifest, write: Callable[[Kind, Manifest], Awaitable[Object]]
    ) -> bool:
        """Make an object. What refuses it, as a quota does, is remembered to be told. Returns whether it is
        made."""
        key = (kind, manifest["metadata"]["namespace"], name_of(manifest))
        try:
            answer = await write(kind, manifest)
        except ApiConflict:
            raise
        except ApiEnding as error:
            await self._note_ending(key[1], error)
            return False
        except ApiError as error:
            if key not in self.refusals:
                log.error("apply: %s", error.message)
                self.refusals = dict(list(self.refusals.items())[-MOST_REFUSALS:])
            self.refusals[key] = as_sentence(error.message.partition(": 403: ")[2] or error.message)
            return False
        self.refusals.pop(key, None)
        self._cache.put(kind, answer)
        return True

    async def _patch(self, cluster: Body, operations: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._cache.put("RayCluster", await self._cluster.patch("RayCluster", cluster, operations))
        except ApiConflict:
            await self._read_again("RayCluster", cluster)
            raise

    def _take(self, kind: Kind, answer: Body) -> None:
        """Put the answer to a write into the cache; an object that was being deleted and has no finalizer any
        more is gone with it."""
        meta = answer["metadata"]
        if meta.get("deletionTimestamp") and not meta.get("finalizers"):
            self._cache.drop(kind, answer)
        else:
            self._cache.put(kind, answer)

    async def _read_again(self, kind: Kind, body: Body) -> None:
        with contextlib.suppress(ApiGone):  # the watch tells
            self._cache.put(kind, await self._cluster.read(kind, body))

    async def _note_ending(self, namespace: str, error: ApiEnding) -> None:
        """Say once that a namespace ends, where Events can still be written."""
        if namespace in self.ending:
            return
        self.ending[namespace] = self._now()
        log.warning("the namespace %s is being deleted; its Models are let go: %s", namespace, error.message)
        own = {"name": self._instance, "namespace": self._own_namespace}
        note = condition(
            DEGRADED,
            "True",
            "NamespaceEnding",
            f"The namespace {namespace} is being deleted: its Models are let go, and it is skipped. Take it "
            "out of operator.namespaces.",
        )
        if namespace != self._own_namespace:
            await self._event({"apiVersion": "v1", "kind": "Pod", "metadata": own}, note)

    async def _event(self, body: Body, item: Condition) -> None:
        """Best effort: an Event is a note for people. Nothing is decided by it but that a namespace ends."""
        meta = body["metadata"]
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": f"{meta['name']}-", "namespace": meta["namespace"]},
            "eventTime": stamp,
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance,
            "action": f"{item.type}{item.status}",
            "reason": item.reason,
            "note": item.message[:MAX_NOTE_CHARACTERS],
            "type": "Warning" if is_trouble(item) else "Normal",
            "regarding": {
                "apiVersion": body["apiVersion"],
                "kind": body["kind"],
                **{name: meta[name] for name in REGARDING if name in meta},
            },
        }
        try:
            await self._cluster.create("Event", event)
        except ApiEnding as error:
            await self._note_ending(meta["namespace"], error)
        except (ApiError, ApiConflict, ApiUnavailable) as error:
            log.warning("apply: %s", error.message)
