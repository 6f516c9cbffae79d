"""One snapshot of a pool, from the cache, Ray Serve and Redis.

Reads only, and all that a decision may need: nothing here waits for a part of the decision. Kubernetes is
asked for two things that no watch brings: Events of pods that stay pending (only they report a volume that
cannot be mounted) and the nodes (how much of a resource is missing), each rarely and only while something is
wrong.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tidegate.control.looks import questions
from tidegate.control.observed import Observation, PodProblem, RevisionKey, SourceState
from tidegate.control.packing import Refusal
from tidegate.control.plan import compared_of, queues_of
from tidegate.control.reasons import Reason
from tidegate.control.resources import Pool
from tidegate.control_round import Depths, Registry, observe_store
from tidegate.errors import QueueRefused, QueueUnavailable
from tidegate.replica_args import ReplicaSettings
from tidegate_operator import ray_state
from tidegate_operator.cache import Body, Cache, is_deleting, labels
from tidegate_operator.cluster import ApiError, ApiUnavailable, Object
from tidegate_operator.decision import Gathered
from tidegate_operator.kinds import Kind
from tidegate_operator.objects import ModelObject, ResourceReader
from tidegate_operator.pod_problems import Ended, cluster_problems, ended_badly, pod_problems, reported
from tidegate_operator.pod_template import POOL_LABEL, RayDefaults
from tidegate_operator.ray_view import ServeView, name_of
from tidegate_operator.resolve_job import job_name, no_job_needed, read_job, refused_job
from tidegate_operator.serves import Serves
from tidegate_operator.work_queue import Key

log = logging.getLogger(__name__)

EVENTS_SECONDS = 5.0
NODES_SECONDS = 30.0

NO_OUTAGE: Refusal = ("", "")
REDIS_AWAY = (
    "Requests are refused until it answers; look at its pod, or at externalRedis in the release's values. "
    "Tidegate comes back by itself."
)
REDIS_REFUSED = "Requests are refused until then; look at redis or externalRedis in the release's values."


class Lister(Protocol):
    """The part of `Cluster` that is used here."""

    async def list(
        self, kind: Kind, namespace: str, selector: str = "", *, field_selector: str = ""
    ) -> tuple[list[Object], int]: ...


class Written(Protocol):
    """The part of `Applier` that is used here: what the API server refused of the last writes, whether it did
    so because the namespace ends, and how many seconds ago each status was written."""

    refusals: dict[tuple[Kind, str, str], str]

    def ends(self, namespace: str, bodies: Iterable[Body]) -> bool: ...

    def since_write(self) -> dict[str, float]: ...


class Troubles:
    """Finds what keeps pods from running, with the Events and nodes that explain it."""

    def __init__(self, cluster: Lister) -> None:
        self._cluster = cluster
        self._events: dict[tuple[str, str], tuple[float, list[Object]]] = {}  # by namespace and kind
        self._nodes: tuple[float, list[Object]] = (float("-inf"), [])
        self._ended: dict[str, dict[str, Ended]] = {}  # by RayCluster's uid and group

    async def events(self, namespace: str, pods: Sequence[Body]) -> Sequence[Object]:
        """Warnings about pods of the namespace, where some of `pods` are slow."""
        return await self._warnings(namespace, "Pod") if ray_state.slow_pods(pods, time.time()) else ()

    async def job_events(self, namespace: str, job: Body, pods: Sequence[Body]) -> Sequence[Object]:
        """Warnings about Jobs of the namespace, where this one should have a pod by now; else about pods."""
        if not pods and ray_state.is_slow(job, time.time()):
            return await self._warnings(namespace, "Job")
        return await self.events(namespace, pods)

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
        return (*reported(found, ended), *cluster_problems(cluster))

    async def _warnings(self, namespace: str, kind: str) -> list[Object]:
        at, found = self._events.get((namespace, kind), (float("-inf"), []))
        if time.monotonic() - at >= EVENTS_SECONDS:
            chosen = f"involvedObject.kind={kind},type=Warning"
            found = await self._asked("CoreEvent", namespace, chosen)
            self._events[namespace, kind] = (time.monotonic(), found)
        return found

    def keep(self, clusters: Sequence[Body]) -> None:
        """Forget clusters that are gone."""
        standing = {item["metadata"]["uid"] for item in clusters}
        self._ended = {uid: ended for uid, ended in self._ended.items() if uid in standing}

    async def _asked(self, kind: Kind, namespace: str, selector: str) -> list[Object]:
        """Nothing where the operator may not ask: a message is then less exact."""
        try:
            found, _ = await self._cluster.list(kind, namespace, field_selector=selector)
        except (ApiError, ApiUnavailable) as error:
            log.warning("gather: %s", error.message)
            return []
        return found


@dataclass(frozen=True, slots=True)
class Gatherer:
    cache: Cache
    reader: ResourceReader
    registry: Registry
    depths: Depths
    serves: Serves
    troubles: Troubles
    replicas: ReplicaSettings
    queue_url: str
    defaults: RayDefaults

    async def gather(self, key: Key, written: Written) -> Gathered:
        namespace, name = key
        models = self.reader.models(namespace, name)
        body = self.cache.get("Pool", namespace, name)
        if body is not None and is_deleting(body):
            body = None
        is_ending = written.ends(namespace, [each.body for each in models] + ([body] if body else []))
        pool, refusal = self.reader.pool(body) if body is not None and not is_ending else (None, "")
        clusters = self.cache.of("RayCluster", namespace, lambda item: labels(item).get(POOL_LABEL) == name)
        live = [item for item in clusters if not is_deleting(item)] if pool is not None else []
        of_namespace = self.cache.of("Pod", namespace)
        pods = {name_of(item): ray_state.pods_of(of_namespace, name_of(item)) for item in live}
        views, (sources, problems), (stored, outage) = await asyncio.gather(
            self._serve_views(live, pods),
            self._objects_say(namespace, models, pool, live, of_namespace, pods, written.refusals),
            self._store_says(models, pool),
        )
        return Gathered(
            namespace=namespace,
            name=name,
            models=models,
            body=body,
            pool=pool,
            refusal=refusal,
            clusters=clusters,
            serves=views,
            pods=pods,
            problems=problems,
            sources=sources,
            stored=stored,
            outage=outage,
            since_write=written.since_write(),
            has_kuberay="RayCluster" not in self.cache.missing,
            defaults=self.defaults,
            replicas=self.replicas,
            queue_url=self.queue_url,
            refusals=written.refusals,
            is_ending=is_ending,
        )

    async def _serve_views(
        self, clusters: Sequence[Body], pods: Mapping[str, Sequence[Body]]
    ) -> dict[str, ServeView]:
        views = await asyncio.gather(*(self.serves.view(item, pods[name_of(item)]) for item in clusters))
        return dict(zip(map(name_of, clusters), views, strict=True))

    async def _objects_say(
        self,
        namespace: str,
        models: Sequence[ModelObject],
        pool: Pool | None,
        clusters: Sequence[Body],
        of_namespace: Sequence[Body],
        pods: Mapping[str, Sequence[Body]],
        refusals: Mapping[tuple[Kind, str, str], str],
    ) -> tuple[dict[RevisionKey, SourceState], dict[str, Sequence[PodProblem]]]:
        """Return how far the Jobs that resolve sources are, and what keeps the pods of each cluster down."""
        if pool is None:
            return {}, {}
        sources = await self._sources(namespace, models, pool, of_namespace, refusals)
        problems: dict[str, Sequence[PodProblem]] = {}
        for item in clusters:
            problems[name_of(item)] = await self.troubles.problems(namespace, item, pods[name_of(item)])
        return sources, problems

    async def _sources(
        self,
        namespace: str,
        models: Sequence[ModelObject],
        pool: Pool,
        of_namespace: Sequence[Body],
        refusals: Mapping[tuple[Kind, str, str], str],
    ) -> dict[RevisionKey, SourceState]:
        found: dict[RevisionKey, SourceState] = {}
        runnable = [each.model for each in models if each.model is not None]
        # A finished Job goes by itself, its pod first: it then seems to have failed. So what is recorded is
        # no question any more.
        asked = questions(runnable, {each.name: each.record for each in models if each.record is not None})
        for key, question in asked.items():
            name = job_name(*key)
            job = self.cache.get("Job", namespace, name)
            if job is not None:
                own = ray_state.pods_of_job(of_namespace, job["metadata"]["name"])
                events = await self.troubles.job_events(namespace, job, own)
                found[key] = read_job(job, own, events)
            elif (known := no_job_needed(question, pool)) is not None:
                found[key] = known
            elif refusal := refusals.get(("Job", namespace, name)):
                found[key] = refused_job(name, refusal)
        return found

    async def _store_says(
        self, models: Sequence[ModelObject], pool: Pool | None
    ) -> tuple[Observation | None, Refusal]:
        """Return what Redis holds of this pool's models alone, so that a reconcile costs what its pool costs;
        or why it does not answer."""
        ours = {each.name: each.model for each in models if each.model is not None}
        if pool is None and not ours:
            return Observation(None), NO_OUTAGE
        records = {each.name: each.record for each in models if each.name in ours and each.record is not None}
        try:
            queues = queues_of(ours.values(), records)
            compared = compared_of(records)
            return await observe_store(self.registry, self.depths, queues, ours, compared), NO_OUTAGE
        except QueueRefused as error:
            return None, (Reason.RedisRefused, f"{error.message}. {REDIS_REFUSED}")
        except QueueUnavailable as error:
            return None, (Reason.RedisUnreachable, f"{error.message} {REDIS_AWAY}")
