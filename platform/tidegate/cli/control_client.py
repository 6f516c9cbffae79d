"""The control API as commands ask it: where it is, and a method for each thing that is asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import msgspec

from tidegate.cli import kubectl
from tidegate.cli.output import CommandFailed
from tidegate.cli.target import NOT_RUNNING, settings
from tidegate.control_api.views import (
    KeyList,
    ModelList,
    ModelView,
    NewKey,
    PlanView,
    RevisionList,
)
from tidegate.messages.registry import Key
from tidegate.messages.rollouts import Action, RevisionView, Verb

if TYPE_CHECKING:
    import httpx

# What --context and --namespace name; None: neither was given.
NAMED_CLUSTER: ContextVar[kubectl.Cluster | None] = ContextVar("named cluster", default=None)

TIMEOUT_SECONDS = 30.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
AWAY = (502, 503, 504)  # of a proxy, of an operator that does not lead, while it starts

Answer = TypeVar("Answer")


class ControlAway(CommandFailed):
    """The control API does not answer now. It may soon."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a model that can be planned first."""

    method: str
    path: str
    answer: type[Action] | type[ModelView]
    body: Mapping[str, Any]


def action(model: str, verb: Verb, revision: str = "") -> Change:
    """`revision` is undo's goal; empty: the one before."""
    return Change("POST", f"{_of(model)}/rollout", Action, {"verb": verb, "revision": revision})


def new_spec(model: ModelView, spec: Mapping[str, Any]) -> Change:
    """Refused where the model is no longer as it was read."""
    body = {"spec": spec, "resource_version": model.resource_version}
    return Change("PUT", _of(model.name), ModelView, body)


def new_bounds(model: str, least: int | None, most: int | None) -> Change:
    """How many replicas it may have; None: as it is."""
    body = {"min_replicas": least, "max_replicas": most}
    return Change("POST", f"{_of(model)}/scale", ModelView, body)


@dataclass(frozen=True, slots=True)
class Control:
    """A control API that is open. Each method raises `ControlAway` where it does not answer, and
    `CommandFailed` with its own sentence where it refuses."""

    client: httpx.Client

    def models(self) -> list[ModelView]:
        return self._ask("GET", "/models", ModelList).items

    def model(self, name: str) -> ModelView:
        return self._ask("GET", _of(name), ModelView)

    def revisions(self, model: str) -> list[RevisionView]:
        return self._ask("GET", f"{_of(model)}/revisions", RevisionList).items

    def carry_out(self, change: Change) -> Action | ModelView:
        return self._ask(change.method, change.path, change.answer, change.body)

    def plan(self, change: Change) -> PlanView:
        """What the platform would do first about it. Changes nothing."""
        return self._ask(change.method, f"{change.path}?dryRun=true", PlanView, change.body)

    def drain(self, model: str, *, is_on: bool) -> ModelView:
        return self._ask("POST", f"{_of(model)}/drain", ModelView, {"drain": is_on})

    def keys(self) -> list[Key]:
        return self._ask("GET", "/keys", KeyList).items

    def create_key(self, name: str, tenant: str, scopes: Sequence[str]) -> NewKey:
        return self._ask("POST", "/keys", NewKey, {"name": name, "tenant": tenant, "scopes": scopes})

    def revoke_key(self, key_id: str) -> Key:
        return self._ask("DELETE", f"/keys/{quote(key_id, safe='')}", Key)

    def _ask(self, method: str, path: str, kind: type[Answer], body: Any = None) -> Answer:
        import httpx

        content = None if body is None else msgspec.json.encode(body)
        try:
            answer = self.client.request(method, f"/v1{path}", content=content)
        except httpx.TransportError as error:
            raise ControlAway(
                f"No control API answers at {self.client.base_url} ({error or type(error).__name__}). "
                "`tidegate status` shows what runs here."
            ) from error
        if not answer.is_success:
            raise (ControlAway if answer.status_code in AWAY else CommandFailed)(_refusal(answer))
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.DecodeError as error:
            raise CommandFailed(
                f"{self.client.base_url} answers as no control API does ({error}). Is it the address of a "
                "gateway, or of another version of Tidegate?"
            ) from error


@contextlib.contextmanager
def open_control() -> Iterator[Control]:
    """The control API of the cluster that --context or --namespace names, else of TIDEGATE_ADMIN_URL, else of
    the platform that runs here, else of kubectl's current context. Raises `CommandFailed` where there is
    none."""
    import httpx

    with _address() as (url, key):
        headers = {"content-type": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        is_near = httpx.URL(url).host in LOOPBACK
        with httpx.Client(
            base_url=url, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=not is_near
        ) as client:
            yield Control(client)


def asked(ask: Callable[[Control], Answer]) -> Answer:
    """Open the control API for this one question."""
    with open_control() as control:
        return ask(control)


@contextlib.contextmanager
def _address() -> Iterator[tuple[str, str]]:
    """Its URL, and a key that opens it."""
    from tidegate.local.home import find

    chosen, cluster = settings(), NAMED_CLUSTER.get()
    if cluster is None:
        if chosen.admin_url:
            yield chosen.admin_url, chosen.admin_key
            return
        if running := find(chosen.home):
            yield running.control_url, chosen.admin_key or running.control_key
            return
        if not kubectl.has_kubeconfig():
            raise CommandFailed(NOT_RUNNING)
        cluster = kubectl.Cluster()
    service = kubectl.find_service(cluster)
    key = chosen.admin_key or kubectl.read_key(cluster, service)
    with kubectl.forwarded(cluster, service) as url:
        yield url, key


def _of(model: str) -> str:
    return f"/models/{quote(model, safe='')}"


def _refusal(answer: httpx.Response) -> str:
    """The API's own sentence, with when to try again."""
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"The control API answered {answer.status_code}: {answer.text[:200]}"
    if after := answer.headers.get("retry-after"):
        message = f"{message} Try again in {after} s."
    return message
