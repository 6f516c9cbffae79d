"""One snapshot of a pool, from the cache, Ray Serve and the registry.

Reads only. Kubernetes is asked for two things that no watch brings: Events of pods that stay pending (the
only place where a volume that cannot be mounted is told) and the nodes (how much of a resource is missing),
each rarely and only while something is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tidegate.control.desired import revision_of
from tidegate.control.observed import (
    Observation,
    PodProblem,
    QueueDepth,
    RevisionKey,
    ServeState,
    SourceState,
)
from tidegate.control.resources import Pool
from tidegate.messages.registry import ModelEntry, ReplicaStats, RevisionReport
from tidegate.serve_api import ServeApi, ServeUnavailable
from tidegate_operator import ray_state
from tidegate_operator.cache import Body, Cache
from tidegate_operator.cluster import ApiError, ApiUnavailable, Cluster, Object
from tidegate_operator.pod_problems import Ended, cluster_problems, ended_badly, pod_problems, told
from tidegate_operator.ray_cluster import groups_of
from tidegate_operator.resolve_job import job_name, no_job_needed, read_job
from tidegate_operator.subjects import Subject

log = logging.getLogger(__name__)

EVENTS_SECONDS = 5.0
NODES_SECONDS = 30.0


class Board(Protocol):
    """What the operator reads of the registry and the queues. All raise `QueueUnavailable`."""

    async def reports(self, wanted: Collection[RevisionKey]) -> dict[RevisionKey, RevisionReport]: ...

    async def replicas(self) -> list[ReplicaStats]: ...

    async def read_models(self, wanted: Collection[str] | None = None) -> dict[str, ModelEntry]: ...

    async def depths(self, queues: Sequence[RevisionKey]) -> Mapping[RevisionKey, QueueDepth]: ...


@dataclass(frozen=True, slots=True)
class ServeView:
    """What one cluster's Serve says; `state` is None while it does not answer, `problem` says why."""

    state: ServeState | None
    problem: str = ""


class Serves:
    """The Serve APIs of all clusters, one client each."""

    def __init__(self, url: Callable[[str, str, str], str]) -> None:
        self._url = url
        self._open: dict[str, ServeApi] = {}

    def api(self, cluster: Body) -> ServeApi:
        meta = cluster["metadata"]
        url = self._url(ray_state.head_service(cluster), meta["namespace"], meta["name"])
        if url not in self._open:
            self._open[url] = ServeApi(url, timeout_seconds=15.0)
        return self._open[url]

    async def look(self, cluster: Body) -> ServeView:
        try:
            return ServeView(await self.api(cluster).get())
        except ServeUnavailable as error:
            return ServeView(None, error.message)

    async def keep(self, clusters: Sequence[Body]) -> None:
        """Close the clients of clusters that are gone."""
        urls = {
            self._url(ray_state.head_service(item), item["metadata"]["namespace"], item["metadata"]["name"])
            for item in clusters
        }
        for url in [url for url in self._open if url not in urls]:
            await self._open.pop(url).__aexit__(None, None, None)

    async def close(self) -> None:
        await self.keep([])


class Troubles:
    """What keeps pods from running, with the Events and nodes that explain it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._events: dict[str, tuple[float, list[Object]]] = {}
        self._nodes: tuple[float, list[Object]] = (float("-inf"), [])
        self._ended: dict[str, dict[str, Ended]] = {}  # by RayCluster's uid and group

    async def events(self, namespace: str, pods: Sequence[Body]) -> Sequence[Object]:
        """Warnings about pods of the namespace, where some of `pods` are slow."""
        if not ray_state.slow_pods(pods, time.time()):
            return ()
        at, found = self._events.get(namespace, (float("-inf"), []))
        if time.monotonic() - at >= EVENTS_SECONDS:
            chosen = "involvedObject.kind=Pod,type=Warning"
            found = await self._asked("CoreEvent", namespace, chosen)
            self._events[namespace] = (time.monotonic(), found)
        return found

    async def problems(self, namespace: str, cluster: Body, pods: Sequence[Body]) -> tuple[PodProblem, ...]:
        nodes: Sequence[Object] = ()
        if ray_state.is_unschedulable(pods):
            if time.monotonic() - self._nodes[0] >= NODES_SECONDS:
                self._nodes = (time.monotonic(), await self._asked("Node", "", ""))
            nodes = self._nodes[1]
        events = await self.events(namespace, pods)
        found = pod_problems(pods, events, nodes)
        uid = cluster["metadata"]["uid"]
        ended = self._ended[uid] = ended_badly(found, self._ended.get(uid, {}), pods, time.time())
        return (*told(found, ended), *cluster_problems(cluster))

    def keep(self, clusters: Sequence[Body]) -> None:
        """Forget clusters that are gone."""
        standing = {item["metadata"]["uid"] for item in clusters}
        self._ended = {uid: ended for uid, ended in self._ended.items() if uid in standing}

    async def _asked(self, kind: str, namespace: str, selector: str) -> list[Object]:
        """Nothing where the operator may not ask: a message is then less exact."""
        try:
            found, _ = await self._cluster.list(kind, namespace, field_selector=selector)  # type: ignore[arg-type]
        except (ApiError, ApiUnavailable) as error:
            log.warning("gather: %s", error.message)
            return []
        return found


@dataclass(frozen=True, slots=True)
class Gatherer:
    cache: Cache
    board: Board
    troubles: Troubles

    async def sources(
        self, namespace: str, subjects: Sequence[Subject], pool: Pool
    ) -> dict[RevisionKey, SourceState]:
        """How far the looks at the newest revisions' sources are, from their Jobs."""
        pods = self.cache.of("Pod", namespace)
        found: dict[RevisionKey, SourceState] = {}
        for subject in subjects:
            model = subject.model
            if model is None or model.spec.source is None:
                continue
            revision = revision_of(model.spec)
            if _is_remembered(subject, revision):
                continue  # a finished Job goes by itself, its pod first: it then seems to have failed
            job = self.cache.get("Job", namespace, job_name(model.name, revision))
            if job is not None:
                own = ray_state.pods_of_job(pods, job["metadata"]["name"])
                events = await self.troubles.events(namespace, own)
                found[(model.name, revision)] = read_job(job, own, events)
            elif (known := no_job_needed(model, pool)) is not None:
                found[(model.name, revision)] = known
        return found

    async def observe(
        self,
        namespace: str,
        subjects: Sequence[Subject],
        pool: Pool,
        active: Body | None,
        serve: ServeState | None,
        serve_problem: tuple[str, str] | None,
        rejected: Mapping[str, str],
    ) -> Observation:
        """Raises `QueueUnavailable`. What is read and kept of the registry is this pool's alone, so that a
        look costs what its pool costs."""
        ours = {subject.name: subject.model for subject in subjects if subject.model is not None}
        queues = [
            (subject.name, revision)
            for subject in subjects
            if subject.record is not None
            for revision in subject.record.revisions
        ]
        sources = await self.sources(namespace, subjects, pool)
        problems: tuple[PodProblem, ...] = ()
        pods: Sequence[Body] = ()
        if active is not None:
            pods = ray_state.pods_of(self.cache.of("Pod", namespace), active["metadata"]["name"])
            problems = await self.troubles.problems(namespace, active, pods)
        targets = [(name, revision_of(model.spec)) for name, model in ours.items()]
        reports, replicas, entries, depths = await asyncio.gather(
            self.board.reports({*queues, *targets}),
            self.board.replicas(),
            self.board.read_models(ours),
            self.board.depths(queues),
        )
        return Observation(
            serve=serve,
            serve_problem=serve_problem,
            sources=sources,
            reports=reports,
            replicas=tuple(stats for stats in replicas if stats.model in ours),
            depths=depths,
            entries=entries,
            groups=groups_of(pool.spec),
            workers=ray_state.worker_pods(pods),
            pod_problems=problems,
            rejected=rejected,
        )


def _is_remembered(subject: Subject, revision: str) -> bool:
    kept = subject.record.revisions.get(revision) if subject.record is not None else None
    return kept is not None and bool(kept.checkpoint)
