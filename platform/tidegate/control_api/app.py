"""The routes of the control API, the same over both hosts.

A call goes: address that failed too often (429), key (401), scope (403), body within its bounds, then the
host. What changes something is in the audit log before it is answered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.middleware import Middleware

from tidegate import __version__
from tidegate.control_api import checks, views
from tidegate.control_api.differences import differences
from tidegate.control_api.document import build_document, described
from tidegate.control_api.ports import AuditLog, Host, Keys, UsageReader
from tidegate.control_api.sign_in import Failures, KeyRing, SignedIn
from tidegate.errors import (
    ConfigError,
    Conflict,
    HostUnavailable,
    InvalidRequest,
    NotFound,
    QueueUnavailable,
    RequestTooLarge,
)
from tidegate.gateway.asgi import ASGIApp, Receive, Scope, Send, read_body
from tidegate.gateway.middleware import ErrorBodies, RequestIds
from tidegate.messages.administration import AuditEntry, Usage
from tidegate.messages.registry import Key
from tidegate.messages.rollouts import Action
from tidegate.telemetry import fields

log = logging.getLogger("tidegate.audit")
log.setLevel(logging.INFO)  # also where less is logged of all else

MAX_BODY_BYTES = 1024 * 1024  # as a resource file
RETRY_SECONDS = 2.0
MOST_ENTRIES = 1000  # of one page of the audit log

AnyBody = TypeVar("AnyBody", bound=views.Body)
DryRun = Annotated[bool, Query(alias="dryRun", description="Answer with the plan and change nothing.")]


@dataclass(frozen=True, slots=True)
class Services:
    """`key_ring` knows who may call; `keys` are those that are created, listed and revoked."""

    host: Host
    keys: Keys
    key_ring: KeyRing
    usage: UsageReader
    audit: AuditLog
    now: Callable[[], float] = time.time


class ControlApp(FastAPI):
    """FastAPI with exactly these layers, outermost first."""

    def __init__(self, services: Services) -> None:
        super().__init__(
            title="Tidegate control API",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
        )
        self.layers = [
            Middleware(RequestIds),
            Middleware(ErrorBodies, who="control API", index="/openapi.json"),
            Middleware(_Errors),
            Middleware(AsyncExitStackMiddleware),
        ]
        self.include_router(_routes(services))

        @self.get("/healthz", operation_id="healthz", summary="Whether the API answers", tags=["health"])
        async def healthz() -> dict[str, str]:
            return {"status": "ok"}

        @self.get("/openapi.json", include_in_schema=False)
        async def openapi_json() -> Response:
            return _json(self.openapi())

    def build_middleware_stack(self) -> Any:
        app: ASGIApp = self.router
        for cls, args, kwargs in reversed(self.layers):
            app = cls(app, *args, **kwargs)
        return app

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = build_document(self)
        return self.openapi_schema


def _routes(services: Services) -> APIRouter:
    host, failures = services.host, Failures()
    reads = Depends(SignedIn(services.key_ring, failures, "read"))
    writes = Depends(SignedIn(services.key_ring, failures, "admin"))
    router = APIRouter(prefix="/v1")
    trail = _Trail(services)

    async def changed_spec(
        key: Key, what: str, past: views.ModelView, spec: dict[str, Any], version: str, *, dry_run: bool
    ) -> Response:
        if dry_run:
            return _json(checks.fitting(await host.plan(past.name, spec=spec)))
        if checks.counts_accelerators(spec):
            with suppress(Conflict, HostUnavailable):  # without a plan the status says it later
                checks.fitting(await host.plan(past.name, spec=spec))
        after = await host.put_spec(past.name, spec, version, key.name)
        await trail.note(key, what, past.name, past.spec, after.spec)
        return _json(after)

    async def acted(key: Key, name: str, action: Action, *, dry_run: bool) -> Response:
        past = await host.model(name)
        checks.takes_revision(action)
        plan = await host.plan(name, action=action)
        if plan.refusal:
            raise Conflict(plan.refusal)
        if dry_run:
            return _json(plan)
        await host.act(name, action)
        await trail.note(key, f"rollout {action.verb}", name, checks.brief(past.rollout), action)
        return _json(action, 202)

    # Models ----------------------------------------------------------------------------------------

    @router.get("/models", tags=["models"], operation_id="list_models", **described(views.ModelList))
    async def list_models(_: Key = reads) -> Response:
        """All models, by name."""
        return _json(views.ModelList(await host.models()))

    @router.get(
        "/models/{name}", tags=["models"], operation_id="get_model", **described(views.ModelView, 404)
    )
    async def get_model(name: str, _: Key = reads) -> Response:
        """One model."""
        return _json(await host.model(name))

    @router.put(
        "/models/{name}",
        tags=["models"],
        operation_id="put_model",
        **described(views.ModelView, 400, 404, 409, or_plan=True, takes=views.SpecBody),
    )
    async def put_model(name: str, request: Request, dry_run: DryRun = False, key: Key = writes) -> Response:
        """Replace a model's spec, at the version that was read. On a laptop until its file changes."""
        body = await _body(request, views.SpecBody)
        past = await host.model(name)
        return await changed_spec(key, "set", past, body.spec, body.resource_version, dry_run=dry_run)

    @router.post(
        "/models/{name}/scale",
        tags=["models"],
        operation_id="scale_model",
        **described(views.ModelView, 400, 404, 409, or_plan=True, takes=views.ScaleBody),
    )
    async def scale_model(
        name: str, request: Request, dry_run: DryRun = False, key: Key = writes
    ) -> Response:
        """Change the bounds of a model's replicas."""
        body = await _body(request, views.ScaleBody)
        past = await host.model(name)
        version = body.resource_version or past.resource_version
        return await changed_spec(
            key, "scale", past, checks.scaled(past.spec, body), version, dry_run=dry_run
        )

    @router.post(
        "/models/{name}/restart",
        tags=["models"],
        operation_id="restart_model",
        **described(Action, 404, 409, or_plan=True, status=202),
    )
    async def restart_model(name: str, dry_run: DryRun = False, key: Key = writes) -> Response:
        """Replace a model's replicas by fresh ones."""
        return await acted(key, name, Action("restart", "", key.name, services.now()), dry_run=dry_run)

    @router.post(
        "/models/{name}/drain",
        tags=["models"],
        operation_id="drain_model",
        **described(views.ModelView, 400, 404, takes=views.DrainBody),
    )
    async def drain_model(name: str, request: Request, key: Key = writes) -> Response:
        """Let a model take no new requests and end those that it has; or end that."""
        body = await _body(request, views.DrainBody)
        past = await host.model(name)
        after = await host.drain(name, body.drain, key.name)
        await trail.note(key, "drain", name, {"drains": past.drains}, {"drains": after.drains})
        return _json(after)

    # Rollouts --------------------------------------------------------------------------------------

    @router.get(
        "/models/{name}/revisions",
        tags=["rollouts"],
        operation_id="list_revisions",
        **described(views.RevisionList, 404),
    )
    async def list_revisions(name: str, _: Key = reads) -> Response:
        """A model's revisions, newest first."""
        return _json(views.RevisionList(await host.revisions(name)))

    @router.get(
        "/models/{name}/rollout",
        tags=["rollouts"],
        operation_id="get_rollout",
        **described(views.RolloutAnswer, 404),
    )
    async def get_rollout(name: str, _: Key = reads) -> Response:
        """A model's rollout with its steps, gates and evidence."""
        return _json(views.RolloutAnswer((await host.model(name)).rollout))

    @router.post(
        "/models/{name}/rollout",
        tags=["rollouts"],
        operation_id="act_on_rollout",
        **described(Action, 400, 404, 409, or_plan=True, status=202, takes=views.ActionBody),
    )
    async def act_on_rollout(
        name: str, request: Request, dry_run: DryRun = False, key: Key = writes
    ) -> Response:
        """Ask something of a model's rollout. The controller acts on it in its next round."""
        body = await _body(request, views.ActionBody)
        action = Action(body.verb, body.revision, key.name, services.now())
        return await acted(key, name, action, dry_run=dry_run)

    # Pools, keys, usage, audit ---------------------------------------------------------------------

    @router.get("/pools", tags=["pools"], operation_id="list_pools", **described(views.PoolList))
    async def list_pools(_: Key = reads) -> Response:
        """All pools, by name."""
        return _json(views.PoolList(await host.pools()))

    @router.get("/keys", tags=["keys"], operation_id="list_keys", **described(views.KeyList))
    async def list_keys(_: Key = reads) -> Response:
        """All keys, revoked ones too, oldest first. No secrets."""
        return _json(views.KeyList(await services.keys.list()))

    @router.post(
        "/keys",
        tags=["keys"],
        operation_id="create_key",
        **described(views.NewKey, 400, status=201, takes=views.KeyBody),
    )
    async def create_key(request: Request, key: Key = writes) -> Response:
        """Make a key. Its secret is in this answer and nowhere else."""
        body = await _body(request, views.KeyBody)
        try:
            new, secret = await services.keys.create(body.name, body.tenant, body.scopes)
        except ConfigError as error:
            raise InvalidRequest(error.message, param=error.problems[0].field) from error
        await trail.note(key, "key create", "", None, msgspec.to_builtins(new))
        return _json(views.NewKey(new, secret), 201)

    @router.delete("/keys/{key_id}", tags=["keys"], operation_id="revoke_key", **described(Key, 404))
    async def revoke_key(key_id: str, key: Key = writes) -> Response:
        """End a key; gateways refuse it within a second."""
        past = next((one for one in await services.keys.list() if one.id == key_id), None)
        if past is None:
            raise NotFound(f"No key has the id {key_id!r}; GET /v1/keys lists them.")
        after = await services.keys.revoke(key_id)
        await trail.note(key, "key revoke", "", msgspec.to_builtins(past), msgspec.to_builtins(after))
        return _json(after)

    @router.get("/usage", tags=["usage"], operation_id="get_usage", **described(Usage))
    async def get_usage(_: Key = reads) -> Response:
        """What each tenant holds of the queues now."""
        return _json(await services.usage.read())

    @router.get("/audit", tags=["audit"], operation_id="list_audit", **described(views.AuditPage, 400))
    async def list_audit(
        before: Annotated[str, Query(max_length=40, pattern=r"^([0-9]+-[0-9]+)?$")] = "",
        limit: Annotated[int, Query(ge=1, le=MOST_ENTRIES)] = 100,
        _: Key = reads,
    ) -> Response:
        """Changes, newest first: who, what, before, after, when."""
        found = await services.audit.page(before, limit)
        return _json(views.AuditPage(found, found[-1].id if len(found) == limit else ""))

    return router


class _Trail:
    """Writes the audit log: a line of this process's log first, which nothing holds up, then the host's."""

    def __init__(self, services: Services) -> None:
        self._audit = services.audit
        self._now = services.now

    async def note(self, key: Key, what: str, model: str, before: Any, after: Any) -> None:
        old, new = differences(msgspec.to_builtins(before), msgspec.to_builtins(after))
        entry = AuditEntry(self._now(), key.name, what, model, old, new, key.id)
        log.info("%s: %s %s", key.name, what, model, extra=fields(**msgspec.to_builtins(entry)))
        try:
            await self._audit.append(entry)
        except Exception:  # what was changed is changed, and stands in the line above
            log.exception("the audit log could not be written")


class _Errors:
    """A query parameter that FastAPI refuses is a wrong field like any other; an administrator is told what
    Redis says."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except RequestValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][-1])
            raise InvalidRequest(f"{name}: {first.get('input')!r}: {first['msg']}", param=name) from error
        except QueueUnavailable as error:
            raise HostUnavailable(error.message, retry_after_seconds=RETRY_SECONDS) from error


async def _body(request: Request, kind: type[AnyBody]) -> AnyBody:
    """Raises `InvalidRequest`, `RequestTooLarge`."""
    try:
        text = await read_body(request.scope, request.receive, MAX_BODY_BYTES)
    except RequestTooLarge as error:
        raise RequestTooLarge(f"The body has more than {MAX_BODY_BYTES} bytes; send less.") from error
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body: {error}.", param=None) from error


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
