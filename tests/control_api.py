"""The control API's app in this process, with keys and an audit log in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import msgspec

from tidegate.control_api.app import ControlApp, Services
from tidegate.control_api.ports import Host
from tidegate.errors import ConfigError, FieldProblem
from tidegate.messages.administration import AuditEntry, Held, Usage
from tidegate.messages.registry import Key, Scope

ADMIN, READ, INFERENCE = "tg-admin", "tg-read", "tg-inference"


@dataclass
class MemoryKeys:
    """`store.keys.Keys` without Redis."""

    by_secret: dict[str, Key] = field(
        default_factory=lambda: {
            ADMIN: Key("key_1", "anna", "default", 1.0, scopes=("admin",)),
            READ: Key("key_2", "rita", "default", 2.0, scopes=("read",)),
            INFERENCE: Key("key_3", "ines", "acme", 3.0),
        }
    )

    def find(self, secret: str) -> Key | None:
        found = self.by_secret.get(secret)
        return found if found is not None and found.revoked is None else None

    async def create(
        self, name: str, tenant: str = "default", scopes: Sequence[Scope] = ("inference",)
    ) -> tuple[Key, str]:
        if not name:
            problem = FieldProblem("name", "''", "must not be empty")
            raise ConfigError(str(problem), [problem])
        secret = f"tg-{name}"
        self.by_secret[secret] = Key(f"key_{name}", name, tenant, 4.0, scopes=tuple(scopes))
        return self.by_secret[secret], secret

    async def list(self) -> list[Key]:
        return list(self.by_secret.values())

    async def revoke(self, key_id: str) -> Key:
        for secret, key in self.by_secret.items():
            if key.id == key_id:
                self.by_secret[secret] = replace(key, revoked=5.0)
                return self.by_secret[secret]
        raise ConfigError(key_id)


@dataclass
class MemoryAudit:
    """`local.audit_file.AuditFile` without a file."""

    entries: list[AuditEntry] = field(default_factory=list)

    async def append(self, entry: AuditEntry) -> None:
        self.entries.append(msgspec.structs.replace(entry, id=f"{len(self.entries)}-0"))

    async def page(self, before: str, limit: int) -> list[AuditEntry]:
        end = int(before.partition("-")[0]) if before else len(self.entries)
        return self.entries[:end][::-1][:limit]


class FixedUsage:
    async def read(self) -> Usage:
        return Usage({"acme": Held(2, 300, 4096)})


@dataclass(frozen=True)
class Api:
    client: httpx.AsyncClient
    keys: MemoryKeys
    audit: MemoryAudit

    async def call(
        self, method: str, path: str, body: Any = None, *, key: str = ADMIN, status: int = 200
    ) -> Any:
        headers = {"authorization": f"Bearer {key}"}
        answer = await self.client.request(method, path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def refused(self, method: str, path: str, body: Any = None, **how: Any) -> str:
        return str((await self.call(method, path, body, **how))["error"]["message"])


@asynccontextmanager
async def control_api(host: Host, address: str = "10.0.0.1") -> AsyncIterator[Api]:
    keys, audit = MemoryKeys(), MemoryAudit()
    app = ControlApp(Services(host, keys, keys, FixedUsage(), audit, now=lambda: 1000.0))
    transport = httpx.ASGITransport(app=app, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://control") as client:
        yield Api(client, keys, audit)
