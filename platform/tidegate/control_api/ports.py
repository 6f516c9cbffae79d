"""The control API asks this of its host, and of the store behind it.

`Host` is implemented by `local.api_port` and by the operator's `api_port`. All may raise `RequestError`:
`NotFound`, `Conflict`, `InvalidRequest` (a spec that is refused), `HostUnavailable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tidegate.control_api.views import ModelView, PlanView, PoolView
from tidegate.messages.administration import AuditEntry, Usage
from tidegate.messages.registry import Key, Scope
from tidegate.messages.rollouts import Action, RevisionView


class Host(Protocol):
    async def models(self) -> list[ModelView]:
        """All models, by name."""
        ...

    async def model(self, name: str) -> ModelView: ...

    async def pools(self) -> list[PoolView]: ...

    async def revisions(self, name: str) -> list[RevisionView]:
        """Newest first."""
        ...

    async def put_spec(
        self, name: str, spec: Mapping[str, Any], resource_version: str, author: str
    ) -> ModelView:
        """Replace the spec of exactly this version. `Conflict` where it is another by now."""
        ...

    async def act(self, name: str, action: Action) -> None:
        """Have the controller act on it; an action that still waits is replaced."""
        ...

    async def drain(self, name: str, is_on: bool, author: str) -> ModelView:
        """Let the model take no new requests and end those that it has, or take new ones again."""
        ...

    async def plan(
        self, name: str, *, spec: Mapping[str, Any] | None = None, action: Action | None = None
    ) -> PlanView:
        """Decide as the controller would with this spec and action. Changes nothing."""
        ...


class Keys(Protocol):
    """`store.keys.Keys`. `create` and `revoke` raise `ConfigError`."""

    def find(self, secret: str) -> Key | None: ...

    async def create(
        self, name: str, tenant: str = "default", scopes: Sequence[Scope] = ("inference",)
    ) -> tuple[Key, str]: ...

    async def list(self) -> list[Key]: ...

    async def revoke(self, key_id: str) -> Key: ...


class UsageReader(Protocol):
    """`store.usage.UsageReader`."""

    async def read(self) -> Usage: ...


class AuditLog(Protocol):
    """Append-only, and bounded: the oldest entries go. `store.audit` and `local.audit_file`."""

    async def append(self, entry: AuditEntry) -> None: ...

    async def page(self, before: str, limit: int) -> list[AuditEntry]:
        """Up to `limit` entries, newest first, from before the one with this id; empty: from the newest."""
        ...
