"""The cluster behind the control API. Implements `tidegate.control_api.ports.Host`.

Nothing here needs the Lease: it reads the API server and Redis anew for each call, and its writes are the
spec and annotations of Models, which the operator that leads acts on. So every replica may answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tidegate.control.desired import ModelRecord
from tidegate.control.history import views
from tidegate.control_api.planned import plan_view
from tidegate.control_api.shown import (
    changed_since,
    checked,
    observed,
    shown_fields,
    unknown_model,
    version_of,
)
from tidegate.control_api.views import ModelView, PlanView, PoolView
from tidegate.control_round import Depths, Registry
from tidegate.errors import Conflict, HostUnavailable, InvalidRequest, NotFound
from tidegate.messages.rollouts import Action, RevisionView
from tidegate.replica_args import ReplicaSettings
from tidegate_operator import asked
from tidegate_operator.cache import Body, Cache, pool_of
from tidegate_operator.cluster import ApiConflict, ApiError, ApiGone, ApiUnavailable, Object
from tidegate_operator.decision import pool_snapshot
from tidegate_operator.gather import Gatherer, Troubles
from tidegate_operator.kinds import RESOURCES, WATCHED, Kind
from tidegate_operator.objects import ResourceReader
from tidegate_operator.pod_template import RayDefaults
from tidegate_operator.revision_objects import owned_by, read_history
from tidegate_operator.serves import Serves
from tidegate_operator.status_patch import conditions_of, record_of, rollout_of

MAX_MANAGER_CHARACTERS = 128
RETRY_SECONDS = 2.0


class Writer(Protocol):
    """The part of `Cluster` that is used here."""

    async def list(
        self, kind: Kind, namespace: str, selector: str = "", *, field_selector: str = ""
    ) -> tuple[list[Object], int]: ...

    async def annotate(
        self, kind: Kind, body: Mapping[str, Any], annotations: Mapping[str, str | None], manager: str
    ) -> Object: ...

    async def patch(
        self,
        kind: Kind,
        body: Mapping[str, Any],
        operations: Sequence[Mapping[str, Any]],
        manager: str = ...,
    ) -> Object: ...


@dataclass(slots=True)
class _NothingWritten:
    """What a dry run knows of the writes before it. Implements `gather.Written`."""

    refusals: dict[tuple[Kind, str, str], str] = field(default_factory=dict)

    def ends(self, namespace: str, bodies: Iterable[Body]) -> bool:  # noqa: ARG002 - none is known to
        return False

    def since_write(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True, slots=True)
class ClusterHost:
    cluster: Writer
    registry: Registry
    depths: Depths
    serves: Serves
    replicas: ReplicaSettings
    queue_url: str
    defaults: RayDefaults
    namespaces: Sequence[str]
    now: Callable[[], float] = time.time

    async def models(self) -> list[ModelView]:
        bodies = await self._models()
        return await self._views(bodies)

    async def model(self, name: str) -> ModelView:
        (view,) = await self._views({name: await self._model(name)})
        return view

    async def pools(self) -> list[PoolView]:
        cache = await self._cache(("Pool", "Model"), self.namespaces)
        return sorted(
            (_pool_view(body, cache) for body in cache.everywhere("Pool")),
            key=lambda view: (view.name, view.namespace),
        )

    async def revisions(self, name: str) -> list[RevisionView]:
        body = await self._model(name)
        namespace, record = body["metadata"]["namespace"], record_of(name, body.get("status") or {})
        cache = await self._cache(("ControllerRevision",), [namespace])
        found = owned_by(body, cache.of("ControllerRevision", namespace))
        return views(read_history(found), record or ModelRecord(name, 0))

    async def put_spec(
        self, name: str, spec: Mapping[str, Any], resource_version: str, author: str
    ) -> ModelView:
        body = await self._model(name)
        checked(name, spec)
        past = body.get("spec") or {}
        if version_of(past) != resource_version:
            raise changed_since(name)
        same = {"op": "test", "path": "/spec", "value": past}
        replace = {"op": "replace", "path": "/spec", "value": dict(spec)}
        with _answers(name):
            written = await self.cluster.patch("Model", body, [same, replace], _manager(author))
        (view,) = await self._views({name: written})
        return view

    async def act(self, name: str, action: Action) -> None:
        body = await self._model(name)
        with _answers(name):
            await self.cluster.annotate("Model", body, asked.annotations_for(action), _manager(action.author))

    async def drain(self, name: str, is_on: bool, author: str) -> ModelView:
        body = await self._model(name)
        with _answers(name):
            annotations = {asked.DRAIN: "true" if is_on else None}
            written = await self.cluster.annotate("Model", body, annotations, _manager(author))
        (view,) = await self._views({name: written})
        return view

    async def plan(
        self, name: str, *, spec: Mapping[str, Any] | None = None, action: Action | None = None
    ) -> PlanView:
        body = await self._model(name)
        namespace, pool = body["metadata"]["namespace"], pool_of(body)
        cache = await self._cache(("Model",), self.namespaces)
        others = tuple(kind for kind in WATCHED if kind != "Model")
        cache = await self._cache(others, [namespace], cache)
        cache.put("Model", _changed(name, body, spec, action))
        troubles = Troubles(self.cluster)
        gatherer = Gatherer(
            cache,
            ResourceReader(cache),
            self.registry,
            self.depths,
            self.serves,
            troubles,
            self.replicas,
            self.queue_url,
            self.defaults,
        )
        with _answers(name):
            found = await gatherer.gather((namespace, pool), _NothingWritten())
        snapshot = pool_snapshot(found, self.now())
        if snapshot is None:
            raise _no_plan(pool, found.outage[1])
        return plan_view(snapshot, name, self.now())

    async def _models(self) -> dict[str, Body]:
        """Return the Model of each name: where several namespaces have one, the oldest counts."""
        cache = await self._cache(("Model",), self.namespaces)
        names = sorted({body["metadata"]["name"] for body in cache.everywhere("Model")})
        return {name: cache.named("Model", name)[0] for name in names}

    async def _model(self, name: str) -> Body:
        bodies = await self._models()
        if name not in bodies:
            raise unknown_model(name, bodies)
        return bodies[name]

    async def _cache(
        self, kinds: Sequence[Kind], namespaces: Sequence[str], cache: Cache | None = None
    ) -> Cache:
        """Return what the API server has of these kinds now."""
        cache = cache or Cache()

        async def fill(kind: Kind, namespace: str) -> None:
            try:
                bodies, version = await self.cluster.list(kind, namespace, RESOURCES[kind].selector)
            except ApiGone:
                cache.missing.add(kind)
            else:
                cache.replace(kind, namespace, bodies, version)

        with _answers():
            await asyncio.gather(*(fill(kind, namespace) for kind in kinds for namespace in namespaces))
        return cache

    async def _views(self, bodies: Mapping[str, Body]) -> list[ModelView]:
        found = {name: record_of(name, body.get("status") or {}) for name, body in bodies.items()}
        records = {name: record for name, record in found.items() if record is not None}
        seen = await observed(self.registry, self.depths, records, bodies)
        return [
            _model_view(body, shown_fields(name, seen, records.get(name))) for name, body in bodies.items()
        ]


def _model_view(body: Body, load: Mapping[str, Any]) -> ModelView:
    meta, spec, status = body["metadata"], dict(body.get("spec") or {}), body.get("status") or {}
    return ModelView(
        name=meta["name"],
        namespace=meta["namespace"],
        pool=pool_of(body),
        resource_version=version_of(spec),
        spec=spec,
        is_observed=status.get("observedGeneration") == meta.get("generation"),
        rollout=rollout_of(status),
        drains=asked.drains(body),
        action=asked.action_of(body),
        **load,
    )


def _pool_view(body: Body, cache: Cache) -> PoolView:
    meta = body["metadata"]
    models = cache.of("Model", meta["namespace"], lambda model: pool_of(model) == meta["name"])
    return PoolView(
        name=meta["name"],
        namespace=meta["namespace"],
        resource_version=meta["resourceVersion"],
        spec=dict(body.get("spec") or {}),
        models=sorted(model["metadata"]["name"] for model in models),
        conditions=conditions_of(body.get("status") or {}),
    )


def _changed(name: str, body: Body, spec: Mapping[str, Any] | None, action: Action | None) -> Body:
    """Return the Model as it would be; a version that no cache has."""
    meta = dict(body["metadata"])
    meta["resourceVersion"] = str(int(meta["resourceVersion"]) + 1)
    if spec is not None:
        checked(name, spec)
        meta["generation"] = int(meta.get("generation") or 0) + 1
    if action is not None:
        asks = {key: value for key, value in asked.annotations_for(action).items() if value is not None}
        meta["annotations"] = {**asked.annotations_of(body), **asks}
    return {**body, "metadata": meta, "spec": dict(spec) if spec is not None else body.get("spec")}


def _no_plan(pool: str, outage: str) -> Exception:
    if outage:
        return HostUnavailable(f"Nothing can be decided now: {outage}", retry_after_seconds=RETRY_SECONDS)
    return Conflict(f"There is no valid Pool {pool!r} to plan for; `kubectl get pools` says why.")


def _manager(author: str) -> str:
    """Return the field manager of a change: who made it, as the history of revisions shows it."""
    return f"key:{author}"[:MAX_MANAGER_CHARACTERS]


@contextlib.contextmanager
def _answers(name: str = "") -> Iterator[None]:
    """Raise the API server's refusals as the control API's."""
    try:
        yield
    except ApiConflict as error:
        raise changed_since(name) from error
    except ApiGone as error:
        raise NotFound(f"Model {name} is gone.") from error
    except ApiUnavailable as error:
        raise HostUnavailable(error.message, retry_after_seconds=RETRY_SECONDS) from error
    except ApiError as error:
        raise InvalidRequest(error.message) from error
