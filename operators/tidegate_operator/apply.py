"""Carry a plan out, writing only what differs from what the cache and the registry say.

Order: memories (the status) first, because a crash after them repeats a step and never forgets one; the
entries that gateways read; the Jobs; then Serve, so that traffic has moved before an old revision goes; the
finalizers of drained Models last. What one Model's objects refuse is logged and told, and the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from msgspec.structs import replace

from tidegate.control.conditions import condition
from tidegate.control.observed import Observation
from tidegate.control.plan import Plan
from tidegate.control.reasons import CONFIG_VALID, PROGRESSING, READY
from tidegate.control.resources import Pool
from tidegate.messages.registry import Condition, ModelEntry
from tidegate_operator import ray_state
from tidegate_operator.cache import Body, Cache, is_deleting
from tidegate_operator.cluster import ApiConflict, ApiError, ApiGone, ApiUnavailable, Kind, Object
from tidegate_operator.pod_template import RayDefaults
from tidegate_operator.resolve_job import resolve_job
from tidegate_operator.status_patch import Status, is_due, is_trouble, model_status, noted, transitions
from tidegate_operator.subjects import Subject

log = logging.getLogger(__name__)

FINALIZER = "tidegate.dev/drain"
MAX_NOTE_CHARACTERS = 1000
WRITES_AT_ONCE = 4  # of one pool's Models
CONTROLLER = "tidegate.dev/operator"


class Writer(Protocol):
    """What of `Cluster` is used here."""

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


class Registry(Protocol):
    """Where gateways read. All raise `QueueUnavailable`."""

    async def put_model(self, entry: ModelEntry) -> None: ...

    async def delete_model(self, name: str) -> None: ...

    async def drop_revision(self, model: str, revision: str, message: str) -> None: ...


class Applier:
    def __init__(
        self,
        cluster: Writer,
        cache: Cache,
        registry: Registry,
        defaults: RayDefaults,
        instance: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._registry = registry
        self._defaults = defaults
        self._instance = instance
        self._clock = clock
        self._written_at: dict[str, float] = {}  # by uid

    async def statuses(
        self, plan: Plan, subjects: Sequence[Subject], seen: Observation, pool: str, now: float
    ) -> dict[str, ModelEntry]:
        """Write what is remembered and told of each Model. Returns the entries for the registry.

        A write that fails does not hold up those of other Models, but nothing follows from this plan then:
        the failure is raised in the end. An API server that is away is not asked for every Model.
        """
        entries = dict(plan.entries)
        gate = asyncio.Semaphore(WRITES_AT_ONCE)
        conflicts: list[ApiConflict] = []
        outages: list[ApiUnavailable] = []

        async def write(subject: Subject, status: Status) -> None:
            async with gate:
                if len(outages) >= WRITES_AT_ONCE:
                    return
                try:
                    await self.status("Model", subject.body, status)
                except ApiConflict as error:
                    conflicts.append(error)
                except ApiUnavailable as error:
                    outages.append(error)

        writes = []
        for subject in subjects:
            if subject.name not in plan.entries or subject.model is None:
                continue
            entry = plan.entries[subject.name]
            if subject.refusal is not None:
                told = condition(CONFIG_VALID, "False", *subject.refusal)
                entry = entries[subject.name] = noted(entry, told, seen.entries.get(subject.name), now)
            record = plan.records[subject.name]
            waiting = sum(
                seen.depths[(subject.name, revision)].waiting
                for revision in record.revisions
                if (subject.name, revision) in seen.depths
            )
            status = model_status(entry, record, subject.generation, pool, waiting)
            if self._is_due(subject.body, status):
                writes.append(write(subject, status))
        await asyncio.gather(*writes)
        if failures := [*outages, *conflicts]:
            raise failures[0]
        return entries

    async def status(self, kind: Kind, body: Body, new: Status) -> None:
        """Write a status that differs, and an Event for each transition in it."""
        if not self._is_due(body, new):
            return
        past, uid = body.get("status") or {}, body["metadata"]["uid"]
        try:
            answer = await self._cluster.apply_status(kind, body, new)
        except ApiGone:
            return  # the watch tells
        except ApiConflict:
            await self._read_again(kind, body)
            raise  # decided on an old version; nothing may follow from it
        except ApiError as error:
            log.error("apply: %s", error.message)
            return
        self._written_at[uid] = self._clock()
        self._cache.put(kind, answer)  # type: ignore[arg-type]
        for item in transitions(past, new):
            if item.type != PROGRESSING:  # its steps are `Ready`'s reasons on the way up
                await self._event(body, item)

    def _is_due(self, body: Body, new: Status) -> bool:
        age_seconds = self._clock() - self._written_at.get(body["metadata"]["uid"], float("-inf"))
        return is_due(body.get("status") or {}, new, age_seconds)

    async def publish(self, plan: Plan, entries: Mapping[str, ModelEntry], seen: Observation) -> None:
        """Make the registry what gateways should read."""
        for name in plan.delete:
            log.info("model %s is removed", name)
            await self._registry.delete_model(name)
        for (model, revision), message in plan.drop:
            log.info("revision %s of model %s goes: %s", revision, model, message)
            await self._registry.drop_revision(model, revision, message)
        for name, entry in entries.items():
            past = seen.entries.get(name)
            if entry != past:
                await self._registry.put_model(entry)
                if past is None or (past.ready, past.reason) != (entry.ready, entry.reason):
                    log.info("model %s: ready %s, %s: %s", name, entry.ready, entry.reason, entry.message)

    async def forget_model(self, name: str) -> None:
        await self._registry.delete_model(name)

    async def refuse(
        self, name: str, entries: Mapping[str, ModelEntry], conditions: Sequence[Condition]
    ) -> None:
        """Have gateways refuse a model that nothing can serve now; its condition `Ready` says why."""
        entry = entries.get(name)
        if entry is None:
            return
        ready = next(item for item in conditions if item.type == READY)
        refused = replace(
            entry,
            accepts=False,
            ready=False,
            reason=ready.reason,
            message=ready.message,
            replicas_ready=0,
            replicas_wanted=0,
            conditions=list(conditions),
        )
        if refused != entry:
            await self._registry.put_model(refused)

    async def jobs(self, plan: Plan, subjects: Sequence[Subject], pool: Pool, namespace: str) -> None:
        """Start the looks that the plan asks for."""
        by_name = {subject.name: subject for subject in subjects}
        for name, revision in plan.resolve:
            subject = by_name[name]
            if subject.model is None:
                continue
            manifest = resolve_job(subject.model, revision, pool, namespace, self._defaults)
            try:
                answer = await self._cluster.create("Job", ray_state.owned(manifest, subject.body))
            except ApiConflict:
                continue  # the one before it is still being removed, or the watch is behind
            except ApiError as error:
                log.error("apply: %s", error.message)
                continue
            self._cache.put("Job", answer)

    async def hold(self, subject: Subject) -> None:
        """Keep the Model from vanishing before its requests have ended."""
        meta = subject.body["metadata"]
        finalizers = meta.get("finalizers") or []
        if FINALIZER in finalizers or is_deleting(subject.body):
            return
        await self._finalizers("Model", subject.body, [*finalizers, FINALIZER])

    async def release(self, body: Body) -> None:
        """Let the Model go."""
        finalizers = body["metadata"].get("finalizers") or []
        if FINALIZER in finalizers:
            newest = self._cache.get("Model", body["metadata"]["namespace"], body["metadata"]["name"]) or body
            await self._finalizers("Model", newest, [name for name in finalizers if name != FINALIZER])

    async def free(self, cluster: Body, finalizers: Sequence[str]) -> None:
        """Let a RayCluster go that KubeRay cannot clean up after."""
        name = cluster["metadata"]["name"]
        log.warning("RayCluster %s does not go by itself; taking KubeRay's finalizer away", name)
        await self._finalizers("RayCluster", cluster, finalizers)

    async def ray_cluster(self, manifest: Mapping[str, Any], owner: Body) -> None:
        answer = await self._cluster.apply("RayCluster", ray_state.owned(manifest, owner))
        log.info("RayCluster %s is made", manifest["metadata"]["name"])
        self._cache.put("RayCluster", answer)

    async def in_place(self, cluster: Body, operations: Sequence[Mapping[str, Any]]) -> None:
        if not operations:
            return
        try:
            answer = await self._cluster.patch("RayCluster", cluster, operations)
        except ApiConflict:
            await self._read_again("RayCluster", cluster)
            raise
        self._cache.put("RayCluster", answer)

    async def delete_cluster(self, cluster: Body) -> None:
        log.info("RayCluster %s goes", cluster["metadata"]["name"])
        await self._cluster.delete("RayCluster", cluster)

    def forget(self, uids: frozenset[str]) -> None:
        """Keep only what is remembered of these objects."""
        self._written_at = {uid: at for uid, at in self._written_at.items() if uid in uids}

    async def _finalizers(self, kind: Kind, body: Body, finalizers: Sequence[str]) -> None:
        try:
            answer = await self._cluster.set_finalizers(kind, body, finalizers)
        except ApiGone:
            return
        except ApiConflict:
            await self._read_again(kind, body)
            raise
        if answer["metadata"].get("deletionTimestamp") and not answer["metadata"].get("finalizers"):
            self._cache.drop(kind, answer)  # type: ignore[arg-type]
        else:
            self._cache.put(kind, answer)  # type: ignore[arg-type]

    async def _read_again(self, kind: Kind, body: Body) -> None:
        """After a conflict: the next look decides on what stands, also where a watch is late or broken."""
        with contextlib.suppress(ApiGone):  # the watch tells
            self._cache.put(kind, await self._cluster.read(kind, body))  # type: ignore[arg-type]

    async def _event(self, body: Body, item: Condition) -> None:
        """Best effort: an Event is a note for people and nothing is decided by it."""
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
                "name": meta["name"],
                "namespace": meta["namespace"],
                "uid": meta["uid"],
                "resourceVersion": meta["resourceVersion"],
            },
        }
        try:
            await self._cluster.create("Event", event)
        except (ApiError, ApiConflict, ApiUnavailable) as error:
            log.warning("apply: %s", error.message)
