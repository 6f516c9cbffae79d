"""The whole decision of one reconcile: what was gathered in, all writes out, in the order of writing. Pure.

`control.pool_plan` decides what models need. Here that becomes Kubernetes objects: statuses with their
Events, Jobs, RayClusters, finalizers, and which cluster's Serve holds what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from tidegate.control.conditions import condition
from tidegate.control.observed import Observation, PodProblem, RevisionKey, ServeState, SourceState
from tidegate.control.pool_plan import (
    PROGRESSING_SECONDS,
    SETTLED_SECONDS,
    PoolPlan,
    PoolSnapshot,
    RegistryChanges,
    pause_seconds,
    plan_pool,
)
from tidegate.control.reasons import READY
from tidegate.control.resources import Pool
from tidegate.control.serve_config import ReplicaRuntime, application_configs
from tidegate.messages.registry import Condition, ModelEntry
from tidegate_operator import ray_state, upgrade
from tidegate_operator.cache import Body
from tidegate_operator.moving import Move
from tidegate_operator.objects import ModelObject
from tidegate_operator.pod_template import RayDefaults
from tidegate_operator.ray_cluster import generation_of, groups_of, in_place_patch, ray_cluster
from tidegate_operator.ray_view import RayView, ServeView, name_of, pool_numbers, pool_ready, serve_problem
from tidegate_operator.resolve_job import resolve_job
from tidegate_operator.status_patch import (
    Status,
    conditions_of,
    deleting_since,
    is_due,
    model_status,
    outage_status,
    pool_status,
    refused_status,
    transitions,
    without_pool_status,
)

STARTING_SECONDS = 1.0  # a Ray cluster takes half a minute
OUTAGE_SECONDS = 2.0
FINALIZER = "tidegate.dev/drain"

WITHOUT_REDIS = (
    "Requests are refused until it answers; look at its pod, or at externalRedis in the release's values. "
    "Tidegate comes back by itself."
)

Manifest = Mapping[str, Any]
NO_CHANGES = RegistryChanges()


@dataclass(frozen=True, slots=True)
class Gathered:
    """One snapshot of a pool. `body` is None where the Pool is gone, or goes; `pool` is how it should stand,
    None where its spec is refused and was never valid. By the names of `clusters` (the Pool's RayClusters,
    oldest first): what their Serves say, their pods, and what keeps these from running.

    `stored` is what Redis holds; None: it does not answer, and `outage` says why. `since_write` says how many
    seconds ago the status of an object (by uid) was written.
    """

    namespace: str
    name: str
    models: Sequence[ModelObject]
    body: Body | None
    pool: Pool | None
    refusal: str
    clusters: Sequence[Body]
    serves: Mapping[str, ServeView]
    pods: Mapping[str, Sequence[Body]]
    problems: Mapping[str, Sequence[PodProblem]]
    sources: Mapping[RevisionKey, SourceState]
    stored: Observation | None
    outage: str
    since_write: Mapping[str, float]
    has_kuberay: bool
    defaults: RayDefaults
    runtime: ReplicaRuntime

    @property
    def entries(self) -> Mapping[str, ModelEntry]:
        """The pool's models as gateways read them now."""
        return self.stored.entries if self.stored is not None else {}


@dataclass(frozen=True, slots=True)
class ObjectWrite:
    """What one object is given: its finalizers, and then its status on that very version. None: as it is."""

    kind: Literal["Model", "Pool", "RayCluster"]
    body: Body
    status: Status | None = None
    finalizers: Sequence[str] | None = None

    @property
    def events(self) -> Sequence[Condition]:
        """What people should be told of the new status."""
        return transitions(self.body.get("status") or {}, self.status) if self.status is not None else ()


@dataclass(frozen=True, slots=True)
class ServeWrite:
    """What the Serve of a cluster should hold, by application; `standing` is its last answer."""

    cluster: Body
    configs: Mapping[str, Mapping[str, Any]]
    standing: ServeState


@dataclass(frozen=True, slots=True)
class Decision:
    """All writes of one reconcile, in their order. Statuses are the operator's records and come first: a
    crash after them repeats a step and never forgets one. Then what gateways read, Jobs, new and changed
    RayClusters, Serve's configs (traffic has moved by then), and last what goes: finalizers that are taken
    off, and RayClusters.

    `pause_seconds` is when to reconcile again; None: when something changes.
    """

    objects: tuple[ObjectWrite, ...] = ()
    registry: RegistryChanges = NO_CHANGES
    jobs: tuple[Manifest, ...] = ()
    new_clusters: tuple[Manifest, ...] = ()
    patches: tuple[tuple[Body, Sequence[Mapping[str, Any]]], ...] = ()
    serves: tuple[ServeWrite, ...] = ()
    released: tuple[ObjectWrite, ...] = ()
    deleted: tuple[Body, ...] = ()
    pause_seconds: float | None = None


def decide(found: Gathered, now: float) -> Decision:
    if found.body is None:
        decision = _without_pool(found, now)
    elif found.pool is None:
        ready = condition(READY, "False", "InvalidConfig", found.refusal)
        decision = Decision(objects=_pool_write(found, found.body, ready, (), {}, now))
    else:
        decision = _with_pool(found, found.body, found.pool, now)
    stuck = [
        ObjectWrite("RayCluster", body, finalizers=kept)
        for body in found.clusters
        if (kept := ray_state.stuck_finalizers(body, now)) is not None
    ]
    refused = [each for each in found.models if each.model is None]
    return replace(
        decision,
        objects=(*_refusals(found, refused, now), *decision.objects),
        released=(*stuck, *_released(each for each in refused if each.is_deleting), *decision.released),
    )


# Models that cannot be planned for -------------------------------------------------------------------------


def _refusals(found: Gathered, refused: Iterable[ModelObject], now: float) -> Iterable[ObjectWrite]:
    """Models of which nothing may run are told why, and are not held."""
    for each in refused:
        if each.refusal is not None and not each.is_deleting:
            status = refused_status(each.status, each.generation, *each.refusal, found.name, now)
            yield from _model_write(found, each, status)


def _without_pool(found: Gathered, now: float) -> Decision:
    """The Pool is gone or never was: its clusters go with it (Kubernetes sees to that). Models being deleted
    wait for Redis, which is to forget them."""
    message = (
        f"There is no Pool {found.name!r} in the namespace {found.namespace!r}; create it, or name another "
        "in spec.pool of a new Model."
    )
    ours = [each for each in found.models if each.model is not None]
    going = [each for each in ours if each.is_deleting and found.stored is not None]
    statuses = {
        each.name: without_pool_status(each.status, each.generation, message, now)
        for each in ours
        if not each.is_deleting
    }
    refused = [
        _refused_entry(entry, conditions_of(status))
        for name, status in statuses.items()
        if (entry := found.entries.get(name)) is not None
    ]
    writes = (_model_write(found, each, statuses[each.name]) for each in ours if each.name in statuses)
    return Decision(
        objects=tuple(write for each in writes for write in each),
        registry=RegistryChanges(
            delete=tuple(each.name for each in going),
            put=tuple(entry for entry in refused if entry != found.entries[entry.name]),
        ),
        released=_released(going),
        pause_seconds=SETTLED_SECONDS if found.clusters or found.stored is None else None,
    )


def _refused_entry(entry: ModelEntry, conditions: list[Condition]) -> ModelEntry:
    """Return the entry of a model that nothing can serve now; its condition `Ready` says why."""
    ready = next(item for item in conditions if item.type == READY)
    return msgspec.structs.replace(
        entry,
        accepts=False,
        ready=False,
        reason=ready.reason,
        message=ready.message,
        replicas_ready=0,
        replicas_wanted=0,
        conditions=conditions,
    )


# A pool that stands ----------------------------------------------------------------------------------------


def _with_pool(found: Gathered, body: Body, pool: Pool, now: float) -> Decision:
    ray = _ray(found, body, pool)
    told = (PodProblem("", "", "InvalidConfig", found.refusal),) if found.refusal else ()
    if found.stored is None:
        decision = _outage(found, body, ray, told, now)
    else:
        decision = _planned(found, found.stored, body, pool, ray, told, now)
    if not found.has_kuberay:
        return decision
    wanted, manifest = ray.choice.wanted, ray_cluster(pool, found.namespace, ray.generation, found.defaults)
    operations = in_place_patch(wanted, manifest) if wanted is not None else []
    return replace(
        decision,
        new_clusters=(ray_state.owned(manifest, body),) if ray.choice.create else (),
        patches=((wanted, operations),) if wanted is not None and operations else (),
        deleted=(*ray.choice.abandoned, *decision.deleted),
    )


def _ray(found: Gathered, body: Body, pool: Pool) -> RayView:
    generation = generation_of(pool.spec, found.defaults)
    choice = upgrade.choose(
        generation,
        found.clusters,
        pool.spec.upgrade,
        str((body.get("status") or {}).get("rayCluster") or ""),
        lambda item: found.serves[name_of(item)].state is not None,
    )
    pods = found.pods[name_of(choice.active)] if choice.active is not None else ()
    return RayView(choice, found.serves, pods, generation, found.has_kuberay)


def _outage(found: Gathered, body: Body, ray: RayView, told: Sequence[PodProblem], now: float) -> Decision:
    message = f"{found.outage} {WITHOUT_REDIS}"
    writes = [
        write
        for each in found.models
        if each.model is not None
        for write in _model_write(
            found, each, outage_status(each.status, each.generation, "RedisUnreachable", message, now)
        )
    ]
    ready = condition(READY, "False", "RedisUnreachable", message)
    pool_writes = _pool_write(found, body, ready, told, pool_numbers(ray, None), now)
    return Decision(objects=(*writes, *pool_writes), pause_seconds=OUTAGE_SECONDS)


def _planned(
    found: Gathered,
    stored: Observation,
    body: Body,
    pool: Pool,
    ray: RayView,
    told: Sequence[PodProblem],
    now: float,
) -> Decision:
    seen = _observation(found, stored, pool, ray, now)
    plan = plan_pool(_snapshot(found, pool, seen), now)
    part = upgrade.shared_out(ray.choice, ray.states, plan.applications, pool.spec.max_unbuilt)
    by_name = {each.name: each for each in found.models if each.model is not None}
    writes = [
        write
        for name, each in by_name.items()
        if name in plan.entries
        for write in _model_write(found, each, _planned_status(plan, each, seen, found.name))
    ]
    problems = (*told, *seen.pod_problems)
    numbers = pool_numbers(ray, len(plan.applications))
    return Decision(
        objects=(*writes, *_pool_write(found, body, pool_ready(ray, now), problems, numbers, now)),
        registry=plan.registry,
        jobs=tuple(_jobs(found, plan, pool, by_name)),
        serves=tuple(_serve_writes(found, ray, part)),
        released=_released(by_name[name] for name in plan.drained),
        deleted=tuple(old for old in ray.choice.retiring if upgrade.may_go(ray.states[name_of(old)], part)),
        pause_seconds=_pause(plan, ray, now),
    )


def _observation(found: Gathered, stored: Observation, pool: Pool, ray: RayView, now: float) -> Observation:
    active = ray.choice.active
    return replace(
        stored,
        serve=upgrade.standing(ray.choice, ray.states),
        serve_problem=serve_problem(ray, now),
        sources=found.sources,
        groups=groups_of(pool.spec),
        workers=ray_state.worker_pods(ray.pods),
        pod_problems=tuple(found.problems[name_of(active)]) if active is not None else (),
        rejected=ray.view.rejected,
    )


def _snapshot(found: Gathered, pool: Pool, seen: Observation) -> PoolSnapshot:
    ours = [each for each in found.models if each.model is not None]
    deleting = {each.name: deleting_since(each.body) for each in ours}
    return PoolSnapshot(
        [each.model for each in ours if each.model is not None],
        pool.spec,
        {each.name: each.record for each in ours if each.record is not None},
        seen,
        deleting={name: since for name, since in deleting.items() if since is not None},
        refused={each.name: each.refusal for each in ours if each.refusal is not None},
    )


def _planned_status(plan: PoolPlan, each: ModelObject, seen: Observation, pool: str) -> Status:
    record = plan.records[each.name]
    waiting = sum(
        seen.depths[(each.name, revision)].waiting
        for revision in record.revisions
        if (each.name, revision) in seen.depths
    )
    return model_status(plan.entries[each.name], record, each.generation, pool, waiting)


def _jobs(
    found: Gathered, plan: PoolPlan, pool: Pool, by_name: Mapping[str, ModelObject]
) -> Iterable[Manifest]:
    for name, revision in plan.resolve:
        each = by_name[name]
        if each.model is not None:
            job = resolve_job(each.model, revision, pool, found.namespace, found.defaults)
            yield ray_state.owned(job, each.body)


def _serve_writes(found: Gathered, ray: RayView, part: Move) -> Iterable[ServeWrite]:
    """The active cluster's Serve holds what has moved there; those that retire keep what they are still
    needed for."""
    if ray.choice.active is not None and (state := ray.view.state) is not None:
        yield ServeWrite(ray.choice.active, application_configs(part.new, found.runtime), state)
    for old in ray.choice.retiring:
        if (state := ray.states[name_of(old)]) is not None:
            yield ServeWrite(old, upgrade.kept_configs(state, part.old), state)


def _pause(plan: PoolPlan, ray: RayView, now: float) -> float:
    if ray.view.state is None:
        return STARTING_SECONDS
    if ray.choice.retiring or ray.choice.wanted is not ray.choice.active:
        return PROGRESSING_SECONDS
    return min(plan.pause_seconds, pause_seconds([ray_state.next_slow_at(ray.pods, now)], now))


# Writes of single objects ----------------------------------------------------------------------------------


def _model_write(found: Gathered, each: ModelObject, status: Status) -> Iterable[ObjectWrite]:
    """A Model that may run is held, so that it does not vanish before its requests have ended."""
    finalizers = each.body["metadata"].get("finalizers") or []
    is_held = FINALIZER in finalizers or each.is_deleting
    must_hold = found.pool is not None and each.model is not None and each.refusal is None and not is_held
    due = status if _is_due(found, each.body, status) else None
    if must_hold or due is not None:
        yield ObjectWrite("Model", each.body, due, [*finalizers, FINALIZER] if must_hold else None)


def _pool_write(
    found: Gathered,
    body: Body,
    ready: Condition,
    problems: Sequence[PodProblem],
    numbers: Mapping[str, object],
    now: float,
) -> tuple[ObjectWrite, ...]:
    generation = int(body["metadata"].get("generation") or 0)
    status = pool_status(body.get("status") or {}, generation, ready, problems, numbers, now)
    return (ObjectWrite("Pool", body, status),) if _is_due(found, body, status) else ()


def _is_due(found: Gathered, body: Body, status: Status) -> bool:
    age_seconds = found.since_write.get(body["metadata"]["uid"], float("inf"))
    return is_due(body.get("status") or {}, status, age_seconds)


def _released(models: Iterable[ModelObject]) -> tuple[ObjectWrite, ...]:
    """Let these Models go: take our finalizer off."""
    return tuple(
        ObjectWrite("Model", each.body, finalizers=[name for name in held if name != FINALIZER])
        for each in models
        if FINALIZER in (held := each.body["metadata"].get("finalizers") or [])
    )
