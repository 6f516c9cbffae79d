"""One look at a pool: gather, plan, apply. The same look twice writes nothing.

One worker at a time looks at a pool (`work_queue`), so there is one writer of each Serve config and of each
Model's status. Between two looks nothing is remembered that decides anything: the memory is in the status of
Models and Pools. What is kept here only saves work (clients, what Serve refused), so an operator that starts
anew goes on where the last one stopped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tidegate.control.conditions import condition
from tidegate.control.moving import Move
from tidegate.control.observed import Observation, PodProblem
from tidegate.control.plan import Plan, make_plan
from tidegate.control.pod_template import POOL_LABEL, RayDefaults
from tidegate.control.ray_cluster import generation_of, in_place_patch, ray_cluster
from tidegate.control.reasons import READY
from tidegate.control.resources import Pool
from tidegate.control.serve_config import Application
from tidegate.errors import QueueUnavailable
from tidegate.messages.registry import Condition
from tidegate.replica_args import ReplicaSettings
from tidegate.serve_api import ServeRejected, ServeUnavailable
from tidegate.serve_writer import ServeWriter
from tidegate_operator import ray_state, upgrade
from tidegate_operator.apply import Applier
from tidegate_operator.cache import Body, Cache, is_deleting, labels
from tidegate_operator.gather import Gatherer, Serves
from tidegate_operator.ray_view import RayView, name_of, pool_numbers, pool_ready, serve_problem
from tidegate_operator.status_patch import (
    conditions_of,
    deleting_since,
    outage_status,
    pool_status,
    refused_status,
    without_pool_status,
)
from tidegate_operator.subjects import Reader, Subject
from tidegate_operator.work_queue import Key

log = logging.getLogger(__name__)

PROGRESSING_SECONDS = 0.5
STARTING_SECONDS = 1.0  # a Ray cluster takes half a minute
SETTLED_SECONDS = 3.0
OUTAGE_SECONDS = 2.0

WITHOUT_REDIS = (
    "Requests are refused until it answers; look at its pod, or at externalRedis in the release's values. "
    "Tidegate comes back by itself."
)


@dataclass(slots=True)
class Abilities:
    """What the cluster can do; `main` finds it out."""

    has_kuberay: bool = True


@dataclass(slots=True)
class _Memory:
    """What is kept of one cluster between looks; losing it costs only repeated work."""

    writer: ServeWriter = field(default_factory=ServeWriter)
    rejected: Mapping[str, str] = field(default_factory=dict)
    problem: tuple[str, str] | None = None


class Reconciler:
    def __init__(
        self,
        cache: Cache,
        reader: Reader,
        gatherer: Gatherer,
        applier: Applier,
        serves: Serves,
        replicas: ReplicaSettings,
        defaults: RayDefaults,
        abilities: Abilities,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._cache = cache
        self._reader = reader
        self._gatherer = gatherer
        self._applier = applier
        self._serves = serves
        self._replicas = replicas
        self._defaults = defaults
        self._abilities = abilities
        self._now = now
        self._memories: dict[tuple[str, str], _Memory] = {}  # by (namespace, RayCluster)

    async def reconcile(self, key: Key) -> float | None:
        """Look at one pool. Returns after how many seconds to look again; None: when there is news."""
        namespace, name = key
        now = self._now()
        subjects = self._reader.subjects(namespace, name)
        clusters = self._cache.of("RayCluster", namespace, lambda body: labels(body).get(POOL_LABEL) == name)
        for body in clusters:
            if (finalizers := ray_state.stuck_finalizers(body, now)) is not None:
                await self._applier.free(body, finalizers)
        await self._refuse(subjects, name, now)
        pool_body = self._cache.get("Pool", namespace, name)
        if pool_body is None or is_deleting(pool_body):
            return await self._without_pool(key, subjects, clusters, now)
        pool, refusal = self._reader.pool(pool_body)
        if pool is None:
            told = condition(READY, "False", "InvalidConfig", refusal)
            await self._pool_status(pool_body, told, (), {}, now)
            return None
        return await self._with_pool(key, pool_body, pool, refusal, subjects, clusters)

    async def sweep(self) -> None:
        """Forget models of which no resource is left, as after a deletion that nobody drained. Raises
        `QueueUnavailable`."""
        for name in await self._gatherer.board.read_models():
            if not self._cache.named("Model", name):
                log.info("model %s has no resource any more", name)
                await self._applier.forget_model(name)

    async def tidy(self) -> None:
        """Let go what belongs to objects that are gone."""
        clusters = self._cache.everywhere("RayCluster")
        await self._serves.keep(clusters)
        self._gatherer.troubles.keep(clusters)
        standing = {(item["metadata"]["namespace"], name_of(item)) for item in clusters}
        self._memories = {key: memory for key, memory in self._memories.items() if key in standing}
        bodies = [*self._cache.everywhere("Model"), *self._cache.everywhere("Pool")]
        uids = frozenset(item["metadata"]["uid"] for item in bodies)
        self._reader.forget(uids)
        self._applier.forget(uids)

    # Models that cannot be planned for -----------------------------------------------------------------

    async def _refuse(self, subjects: Sequence[Subject], pool: str, now: float) -> None:
        """Models of which nothing may run: say why, and do not hold them."""
        for subject in subjects:
            if subject.model is not None or subject.refusal is None:
                continue
            if is_deleting(subject.body):
                await self._applier.release(subject.body)
                continue
            status = refused_status(subject.status, subject.generation, *subject.refusal, pool, now)
            await self._applier.status("Model", subject.body, status)

    async def _without_pool(
        self, key: Key, subjects: Sequence[Subject], clusters: Sequence[Body], now: float
    ) -> float | None:
        """The Pool is gone or never was: its clusters go with it (Kubernetes sees to that)."""
        namespace, name = key
        message = (
            f"There is no Pool {name!r} in the namespace {namespace!r}; create it, or name another in "
            "spec.pool of a new Model."
        )
        ours = [subject for subject in subjects if subject.model is not None]
        problem: QueueUnavailable | None = None
        try:
            names = [subject.name for subject in ours]
            entries = await self._gatherer.board.read_models(names) if names else {}
        except QueueUnavailable as error:
            entries, problem = {}, error
        for subject in ours:
            if deleting_since(subject.body) is not None:
                if problem is not None:
                    raise problem
                await self._applier.forget_model(subject.name)
                await self._applier.release(subject.body)
                continue
            status = without_pool_status(subject.status, subject.generation, message, now)
            await self._applier.status("Model", subject.body, status)
            await self._applier.refuse(subject.name, entries, conditions_of(status))
        return SETTLED_SECONDS if clusters or problem is not None else None

    async def _outage(self, subjects: Sequence[Subject], reason: str, message: str, now: float) -> None:
        for subject in subjects:
            if subject.model is not None:
                status = outage_status(subject.status, subject.generation, reason, message, now)
                await self._applier.status("Model", subject.body, status)

    # A pool that stands --------------------------------------------------------------------------------

    async def _with_pool(
        self,
        key: Key,
        body: Body,
        pool: Pool,
        refusal: str,
        subjects: Sequence[Subject],
        clusters: Sequence[Body],
    ) -> float | None:
        namespace, name = key
        for subject in subjects:
            if subject.model is not None and subject.refusal is None:
                await self._applier.hold(subject)
        # What was just written is in the cache.
        subjects = self._reader.subjects(namespace, name)
        ray = await self._ray(namespace, body, pool, clusters)
        told = (PodProblem("", "", "InvalidConfig", refusal),) if refusal else ()
        now = self._now()
        try:
            seen = await self._observe(namespace, subjects, pool, ray)
        except QueueUnavailable as error:
            message = f"{error.message} {WITHOUT_REDIS}"
            await self._outage(subjects, "RedisUnreachable", message, now)
            ready = condition(READY, "False", "RedisUnreachable", message)
            await self._pool_status(body, ready, told, pool_numbers(ray, None), now)
            return OUTAGE_SECONDS
        records = {
            subject.name: subject.record
            for subject in subjects
            if subject.model is not None and subject.record is not None
        }
        deleting = {
            subject.name: since
            for subject in subjects
            if subject.model is not None and (since := deleting_since(subject.body)) is not None
        }
        models = [subject.model for subject in subjects if subject.model is not None]
        plan = make_plan(models, pool.spec, records, seen, now, deleting=deleting)
        entries = await self._applier.statuses(plan, subjects, seen, name, now)
        await self._applier.publish(plan, entries, seen)
        await self._applier.jobs(plan, subjects, pool, namespace)
        part = upgrade.shared_out(ray.choice, ray.states, plan.applications, pool.spec.max_unbuilt)
        has_written = await self._write_serve(namespace, part.new, ray)
        for subject in subjects:
            if subject.name in plan.drained:
                await self._applier.release(subject.body)
        is_moving = await self._retire(ray, part)
        ready = pool_ready(ray, self._now())
        problems = (*told, *seen.pod_problems)
        await self._pool_status(body, ready, problems, pool_numbers(ray, len(plan.applications)), now)
        if ray.view.state is None:
            return STARTING_SECONDS
        if has_written or is_moving or not plan.is_settled:
            return PROGRESSING_SECONDS
        return _pause(plan, ray, self._now())

    async def _ray(self, namespace: str, body: Body, pool: Pool, found: Sequence[Body]) -> RayView:
        """Make the pool's clusters stand as they should and see what their Serves say."""
        generation = generation_of(pool.spec, self._defaults)
        live = [item for item in found if not is_deleting(item)]
        views = dict(
            zip(
                map(name_of, live),
                await asyncio.gather(*(self._serves.look(item) for item in live)),
                strict=True,
            )
        )
        choice = upgrade.choose(
            generation,
            found,
            pool.spec.upgrade,
            str((body.get("status") or {}).get("rayCluster") or ""),
            lambda item: views[name_of(item)].state is not None,
        )
        if self._abilities.has_kuberay:
            manifest = ray_cluster(pool, namespace, generation, self._defaults)
            if choice.create:
                await self._applier.ray_cluster(manifest, body)
            elif choice.wanted is not None:
                await self._applier.in_place(choice.wanted, in_place_patch(choice.wanted, manifest))
            for item in choice.abandoned:
                await self._applier.delete_cluster(item)
        active = choice.active
        pods = (
            ray_state.pods_of(self._cache.of("Pod", namespace), name_of(active)) if active is not None else []
        )
        return RayView(choice, views, pods, generation, self._abilities.has_kuberay)

    async def _observe(
        self, namespace: str, subjects: Sequence[Subject], pool: Pool, ray: RayView
    ) -> Observation:
        memory = self._memory(namespace, ray.choice.active)
        return await self._gatherer.observe(
            namespace,
            subjects,
            pool,
            ray.choice.active,
            upgrade.standing(ray.choice, ray.states),
            serve_problem(ray, memory.problem, self._now()),
            memory.rejected,
        )

    async def _write_serve(self, namespace: str, applications: Sequence[Application], ray: RayView) -> bool:
        """Give the active cluster its config; whether something was sent."""
        active = ray.choice.active
        if active is None or ray.view.state is None:
            return False
        memory = self._memory(namespace, active)
        try:
            memory.rejected = await memory.writer.write(
                self._serves.api(active), applications, self._replicas, ray.view.state
            )
            memory.problem = None
        except (ServeRejected, ServeUnavailable) as error:
            log.error("pool %s: %s", labels(active).get(POOL_LABEL), error.message)
            memory.problem = (error.reason, error.message)
        return memory.writer.has_written

    async def _retire(self, ray: RayView, part: Move) -> bool:
        """Take off clusters of other generations what they are not needed for, and let empty ones go;
        whether the pool is on its way from one cluster to another."""
        for old in ray.choice.retiring:
            state = ray.states[name_of(old)]
            if state is not None:
                kept = upgrade.kept_configs(state, part.old)
                held = {name for name, item in state.applications.items() if item.status != "DELETING"}
                if held != {config["name"] for config in kept}:
                    await self._take_off(old, kept)
            if upgrade.may_go(state, part):
                await self._applier.delete_cluster(old)
        return bool(ray.choice.retiring or ray.choice.wanted is not ray.choice.active)

    async def _take_off(self, old: Body, kept: Sequence[Mapping[str, object]]) -> None:
        log.info("RayCluster %s keeps %d applications", name_of(old), len(kept))
        try:
            await self._serves.api(old).put(
                {"proxy_location": "Disabled", "applications": [dict(config) for config in kept]}
            )
        except (ServeRejected, ServeUnavailable) as error:
            log.error("RayCluster %s: %s", name_of(old), error.message)

    # What is told of the pool --------------------------------------------------------------------------

    async def _pool_status(
        self,
        body: Body,
        ready: Condition,
        problems: Sequence[PodProblem],
        numbers: Mapping[str, object],
        now: float,
    ) -> None:
        past = body.get("status") or {}
        generation = int(body["metadata"].get("generation") or 0)
        status = pool_status(past, generation, ready, problems, numbers, now)
        await self._applier.status("Pool", body, status)

    def _memory(self, namespace: str, cluster: Body | None) -> _Memory:
        if cluster is None:
            return _Memory()
        return self._memories.setdefault((namespace, name_of(cluster)), _Memory())


def _pause(plan: Plan, ray: RayView, now: float) -> float:
    """Until time alone may have changed something; drift is found at the latest after `SETTLED_SECONDS`."""
    times = [at for at in (plan.next_look_at, ray_state.next_slow_at(ray.pods, now)) if at is not None]
    soonest = min((at - now for at in times), default=SETTLED_SECONDS)
    return min(SETTLED_SECONDS, max(PROGRESSING_SECONDS, soonest))
