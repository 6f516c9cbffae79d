"""The whole decision of one reconcile: what was gathered in, all writes out, in the order of writing. Pure.

`control.plan` decides what models need. Here that becomes Kubernetes objects: statuses with their
Events, Jobs, RayClusters, finalizers, and which cluster's Serve holds what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from tidegate.control.conditions import condition
from tidegate.control.desired import ModelRecord
from tidegate.control.looks import questions
from tidegate.control.observed import Observation, PodProblem, RevisionKey, ServeState, SourceState
from tidegate.control.packing import Refusal
from tidegate.control.plan import (
    PROGRESSING_SECONDS,
    SETTLED_SECONDS,
    PoolPlan,
    PoolSnapshot,
    RegistryChanges,
    plan_pool,
)
from tidegate.control.reasons import READY, Reason
from tidegate.control.resources import Pool
from tidegate.control.rollout_state import Note
from tidegate.control.serve_config import application_configs
from tidegate.messages.registry import Condition, ModelEntry
from tidegate.replica_args import REDIS_FOLDER_VARIABLE, REDIS_VARIABLE, ReplicaSettings
from tidegate_operator import ray_state, upgrade
from tidegate_operator.asked import action_of, drains, wrong_action
from tidegate_operator.cache import Body, author_of, is_deleting
from tidegate_operator.kinds import Kind
from tidegate_operator.moving import Move
from tidegate_operator.objects import ModelObject
from tidegate_operator.pod_problems import REFUSED_REMEDY
from tidegate_operator.pod_template import RayDefaults
from tidegate_operator.ray_cluster import cluster_name, generation_of, groups_of, in_place_patch, ray_cluster
from tidegate_operator.ray_view import RayView, ServeView, name_of, pool_numbers, pool_ready, serve_problem
from tidegate_operator.resolve_job import resolve_job
from tidegate_operator.revision_objects import history_writes
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

Manifest = Mapping[str, Any]
NO_CHANGES = RegistryChanges()


@dataclass(frozen=True, slots=True)
class Gathered:
    """One snapshot of a pool. `body` is None where the Pool is gone, or goes; `pool` is how it should stand,
    None where its spec is refused and was never valid. By the names of `clusters` (the Pool's RayClusters,
    oldest first): what their Serves say, their pods, and what keeps these from running.

    `stored` is what Redis holds; None: it does not answer, and `outage` says why (reason, sentence).
    `refusals` are what the API server said of objects that it did not take, by kind, namespace and name.
    `is_ending`: the namespace is being deleted. `since_write` says how many seconds ago the status of an
    object (by uid) was written. `queue_url` is what replicas were told before their pods said it.
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
    outage: Refusal
    since_write: Mapping[str, float]
    has_kuberay: bool
    defaults: RayDefaults
    replicas: ReplicaSettings
    queue_url: str
    refusals: Mapping[tuple[Kind, str, str], str]
    is_ending: bool

    @property
    def entries(self) -> Mapping[str, ModelEntry]:
        """The pool's models as gateways read them now."""
        return self.stored.entries if self.stored is not None else {}

    @property
    def runnable(self) -> list[ModelObject]:
        """The Models of which something may run."""
        return [each for each in self.models if each.model is not None]

    @property
    def pool_problems(self) -> tuple[PodProblem, ...]:
        """A refused spec of a Pool that stands as it last was, reported as problems of its pods are."""
        return (PodProblem("", "", Reason.InvalidConfig, self.refusal),) if self.refusal else ()

    def cluster_refused(self, generation: str) -> tuple[PodProblem, ...]:
        """A RayCluster that the API server does not take."""
        name = cluster_name(self.name, generation)
        said = self.refusals.get(("RayCluster", self.namespace, name))
        text = f"Kubernetes refuses the RayCluster {name}: {said} {REFUSED_REMEDY}"
        return (PodProblem("", "", Reason.PodsRefused, text),) if said else ()


@dataclass(frozen=True, slots=True)
class ObjectWrite:
    """One object is given its finalizers, and then its status on that very version. None: as it is."""

    kind: Literal["Model", "Pool", "RayCluster"]
    body: Body
    status: Status | None = None
    finalizers: Sequence[str] | None = None

    @property
    def events(self) -> Sequence[Condition]:
        """The transitions in the new status, for Events."""
        return transitions(self.body.get("status") or {}, self.status) if self.status is not None else ()


@dataclass(frozen=True, slots=True)
class ServeWrite:
    """The Serve of a cluster should hold these applications; `standing` is its last answer."""

    cluster: Body
    configs: Mapping[str, Mapping[str, Any]]
    standing: ServeState


@dataclass(frozen=True, slots=True)
class Decision:
    """All writes of one reconcile, in their order. Statuses are the operator's records and come first: a
    crash after them repeats a step and never forgets one. Then the histories, what gateways read, Jobs, new
    and changed RayClusters, Serve's configs (traffic has moved by then), and last what goes: finalizers that
    are taken off, and RayClusters.

    `taken` are Models whose records know the action that was asked of them by now, or that asked for one that
    there is not: it is taken off them.

    `notes` are told of Models. `pause_seconds` is when to reconcile again; None: when something changes.
    """

    objects: tuple[ObjectWrite, ...] = ()
    taken: tuple[Body, ...] = ()
    revisions: tuple[Manifest, ...] = ()
    forgotten: tuple[Body, ...] = ()  # ControllerRevisions
    notes: tuple[tuple[Body, Note], ...] = ()
    registry: RegistryChanges = NO_CHANGES
    jobs: tuple[Manifest, ...] = ()
    new_clusters: tuple[Manifest, ...] = ()
    patches: tuple[tuple[Body, Sequence[Mapping[str, Any]]], ...] = ()
    serves: tuple[ServeWrite, ...] = ()
    released: tuple[ObjectWrite, ...] = ()
    deleted: tuple[Body, ...] = ()
    pause_seconds: float | None = None


def decide(found: Gathered, now: float) -> Decision:
    if found.is_ending:
        return _ending(found)
    if found.body is None:
        decision = _without_pool(found, now)
    elif found.pool is None:
        ready = condition(READY, "False", Reason.InvalidConfig, found.refusal)
        decision = Decision(objects=_pool_write(found, ready, (), {}, now))
    else:
        decision = _with_pool(found, found.pool, now)
    refused = {
        each.name: refused_status(each.status, each.generation, *each.refusal, found.name, now)
        for each in found.models
        if each.model is None and each.refusal is not None and not each.is_deleting
    }
    stuck = tuple(
        ObjectWrite("RayCluster", body, finalizers=kept)
        for body in found.clusters
        if (kept := ray_state.stuck_finalizers(body, ray_state.STUCK_SECONDS, now)) is not None
    )
    going = [each for each in found.models if each.model is None and each.is_deleting]
    return replace(
        decision,
        objects=_model_writes(found, refused) + decision.objects,
        taken=decision.taken
        + tuple(each.body for each in found.models if wrong_action(each.body) is not None),
        released=stuck + _released(going) + decision.released,
    )


def _ending(found: Gathered) -> Decision:
    """Nothing new is made in a namespace that is being deleted, nor KubeRay's Job that cleans up after a
    cluster, and the rights there go with all else. So everything is let go at once, requests or not."""
    stored = found.stored is not None  # else a later sweep forgets them
    going = [body for body in found.clusters if is_deleting(body)]
    freed = [(body, ray_state.stuck_finalizers(body, 0.0, math.inf)) for body in going]
    return Decision(
        registry=RegistryChanges(
            delete=tuple(each.name for each in found.runnable if stored and each.name in found.entries)
        ),
        released=_released(found.models)
        + tuple(ObjectWrite("RayCluster", body, finalizers=kept) for body, kept in freed if kept is not None),
        deleted=tuple(body for body in found.clusters if body not in going),
        pause_seconds=STARTING_SECONDS if found.clusters or found.models else None,
    )


def _without_pool(found: Gathered, now: float) -> Decision:
    """The Pool is gone or never was: its clusters go with it (Kubernetes sees to that). Models being deleted
    wait for Redis, which is to forget them."""
    message = (
        f"There is no Pool {found.name!r} in the namespace {found.namespace!r}; create it, or name another "
        "in spec.pool of a new Model."
    )
    statuses = {
        each.name: without_pool_status(each.status, each.generation, message, now)
        for each in found.runnable
        if not each.is_deleting
    }
    refused = (
        _refused_entry(entry, conditions_of(statuses[name]))
        for name, entry in found.entries.items()
        if name in statuses
    )
    going = [each for each in found.runnable if each.is_deleting and found.stored is not None]
    return Decision(
        objects=_model_writes(found, statuses),
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


def pool_snapshot(found: Gathered, now: float) -> PoolSnapshot | None:
    """Return what the pool's models are decided on; None where nothing can be now, without a Pool or without
    Redis."""
    if found.is_ending or found.body is None or found.pool is None or found.stored is None:
        return None
    ray = _ray_view(found, found.pool)
    return _snapshot(found, found.pool, _observation(found, found.stored, found.pool, ray, now))


def _ray_view(found: Gathered, pool: Pool) -> RayView:
    assert found.body is not None
    generation = generation_of(pool.spec, found.defaults)
    choice = upgrade.choose(
        generation,
        found.clusters,
        pool.spec.upgrade,
        str((found.body.get("status") or {}).get("rayCluster") or ""),
        lambda item: found.serves[name_of(item)].state is not None,
    )
    pods = found.pods[name_of(choice.active)] if choice.active is not None else ()
    return RayView(choice, found.serves, pods, generation, found.has_kuberay)


def _with_pool(found: Gathered, pool: Pool, now: float) -> Decision:
    assert found.body is not None
    ray = _ray_view(found, pool)
    choice, generation = ray.choice, ray.generation
    if found.stored is None:
        decision = _outage(found, ray, now)
    else:
        decision = _planned(found, _observation(found, found.stored, pool, ray, now), pool, ray, now)
    if not found.has_kuberay:
        return decision
    manifest = ray_cluster(pool, found.namespace, generation, found.defaults)
    operations = in_place_patch(choice.wanted, manifest) if choice.wanted is not None else []
    return replace(
        decision,
        new_clusters=(ray_state.owned(manifest, found.body),) if choice.create else (),
        patches=((choice.wanted, operations),) if choice.wanted is not None and operations else (),
        deleted=(*choice.abandoned, *decision.deleted),
    )


def _outage(found: Gathered, ray: RayView, now: float) -> Decision:
    """Nothing can be found out of models now; what keeps Ray up goes on."""
    statuses = {
        each.name: outage_status(each.status, each.generation, *found.outage, now) for each in found.runnable
    }
    ready = condition(READY, "False", *found.outage)
    of_pool = _pool_write(found, ready, found.pool_problems, pool_numbers(ray, None), now)
    return Decision(objects=_model_writes(found, statuses) + of_pool, pause_seconds=OUTAGE_SECONDS)


def _observation(found: Gathered, stored: Observation, pool: Pool, ray: RayView, now: float) -> Observation:
    active = ray.choice.active
    return replace(
        stored,
        serve=upgrade.standing(ray.choice, ray.states),
        serve_problem=serve_problem(ray, now),
        sources=found.sources,
        groups=groups_of(pool.spec),
        workers=ray_state.worker_pods(ray.pods),
        pod_problems=(
            tuple(found.problems[name_of(active)])
            if active is not None
            else found.cluster_refused(ray.generation)
        ),
        rejected=ray.view.rejected,
    )


def _planned(found: Gathered, seen: Observation, pool: Pool, ray: RayView, now: float) -> Decision:
    by_name = {each.name: each for each in found.runnable}
    snapshot = _snapshot(found, pool, seen)
    plan = plan_pool(snapshot, now)
    part = upgrade.shared_out(ray.choice, ray.states, plan.applications, pool.spec.max_unbuilt)
    statuses = {
        name: model_status(
            entry,
            plan.records[name],
            by_name[name].generation,
            found.name,
            _waiting(plan.records[name], seen),
            plan.rollouts.get(name),
        )
        for name, entry in plan.entries.items()
    }
    problems = found.pool_problems + (found.cluster_refused(ray.generation) or seen.pod_problems)
    numbers = pool_numbers(ray, len(plan.applications))
    histories = [
        history_writes(each.body, each.revisions, each.history, plan.history[each.name])
        for each in by_name.values()
        if each.name in plan.history and not each.is_deleting
    ]
    return Decision(
        objects=_model_writes(found, statuses)
        + _pool_write(found, pool_ready(ray, now), problems, numbers, now),
        revisions=tuple(manifest for written, _ in histories for manifest in written),
        forgotten=tuple(body for _, deleted in histories for body in deleted),
        taken=tuple(by_name[name].body for name in snapshot.actions),
        notes=tuple((by_name[note.model].body, note) for note in plan.notes),
        registry=plan.registry,
        jobs=tuple(_jobs(found, plan, pool, by_name)),
        serves=tuple(_serve_writes(found, ray, part)),
        released=_released(by_name[name] for name in plan.drained),
        deleted=tuple(old for old in ray.choice.retiring if upgrade.may_go(ray.states[name_of(old)], part)),
        pause_seconds=_pause(plan, ray, now),
    )


def _snapshot(found: Gathered, pool: Pool, seen: Observation) -> PoolSnapshot:
    by_name = {each.name: each for each in found.runnable}
    asked = {name: action_of(each.body) for name, each in by_name.items()}
    deleting = {name: deleting_since(each.body) for name, each in by_name.items()}
    return PoolSnapshot(
        [each.model for each in by_name.values() if each.model is not None],
        pool.spec,
        {name: each.record for name, each in by_name.items() if each.record is not None},
        seen,
        deleting={name: since for name, since in deleting.items() if since is not None},
        refused={name: each.refusal for name, each in by_name.items() if each.refusal is not None},
        authors={name: author_of(each.body) for name, each in by_name.items()},
        history={name: each.history for name, each in by_name.items()},
        actions={name: action for name, action in asked.items() if action is not None},
        drains=frozenset(name for name, each in by_name.items() if drains(each.body)),
    )


def _waiting(record: ModelRecord, seen: Observation) -> int:
    depths = (seen.depths.get((record.name, revision)) for revision in record.revisions)
    return sum(depth.waiting for depth in depths if depth is not None)


def _jobs(
    found: Gathered, plan: PoolPlan, pool: Pool, by_name: Mapping[str, ModelObject]
) -> Iterator[Manifest]:
    models = [each.model for each in by_name.values() if each.model is not None]
    asked = questions(models, plan.records)
    for name, key in plan.resolve:
        job = resolve_job(asked[name, key], key, pool, found.namespace, found.defaults)
        yield ray_state.owned(job, by_name[name].body)


def _serve_writes(found: Gathered, ray: RayView, part: Move) -> Iterator[ServeWrite]:
    """The active cluster's Serve holds what has moved there; those that retire keep what they are still
    needed for."""
    if ray.choice.active is not None and (state := ray.view.state) is not None:
        yield ServeWrite(
            ray.choice.active, application_configs(part.new, _replicas(found, ray.choice.active)), state
        )
    for old in ray.choice.retiring:
        if (state := ray.states[name_of(old)]) is not None:
            yield ServeWrite(old, upgrade.kept_configs(state, part.old), state)


def _replicas(found: Gathered, cluster: Body) -> ReplicaSettings:
    """Return what the replicas of a cluster are told. In pods of the version before nothing says where the
    queue is: until the next cluster takes over they are told in their arguments."""
    if ray_state.has_variable(cluster, REDIS_VARIABLE, REDIS_FOLDER_VARIABLE):
        return found.replicas
    return msgspec.structs.replace(found.replicas, redis_url=found.queue_url)


def _pause(plan: PoolPlan, ray: RayView, now: float) -> float:
    if ray.view.state is None:
        return SETTLED_SECONDS if ray.choice.create else STARTING_SECONDS
    if ray.choice.retiring or ray.choice.wanted is not ray.choice.active:
        return PROGRESSING_SECONDS
    return plan.pause_seconds(now, ray_state.next_slow_at(ray.pods, now))


# Writes of single objects ----------------------------------------------------------------------------------


def _model_writes(found: Gathered, statuses: Mapping[str, Status]) -> tuple[ObjectWrite, ...]:
    """Give Models these statuses. One that may run is held, so that it does not vanish before its requests
    have ended."""
    writes = []
    for each in found.models:
        if each.name not in statuses:
            continue
        held = each.body["metadata"].get("finalizers") or []
        may_run = found.pool is not None and each.model is not None and each.refusal is None
        must_hold = may_run and not each.is_deleting and FINALIZER not in held
        status = statuses[each.name] if _is_due(found, each.body, statuses[each.name]) else None
        if must_hold or status is not None:
            finalizers = [*held, FINALIZER] if must_hold else None
            writes.append(ObjectWrite("Model", each.body, status, finalizers))
    return tuple(writes)


def _pool_write(
    found: Gathered,
    ready: Condition,
    problems: Sequence[PodProblem],
    numbers: Mapping[str, object],
    now: float,
) -> tuple[ObjectWrite, ...]:
    assert found.body is not None
    generation = int(found.body["metadata"].get("generation") or 0)
    status = pool_status(found.body.get("status") or {}, generation, ready, problems, numbers, now)
    return (ObjectWrite("Pool", found.body, status),) if _is_due(found, found.body, status) else ()


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
