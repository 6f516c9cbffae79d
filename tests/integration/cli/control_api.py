"""The real control API on a socket, over a real Redis and a host that a test scripts."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tidegate.control_api.app import ControlApp, Services
from tidegate.control_api.server import serving
from tidegate.control_api.sign_in import OwnKey
from tidegate.control_api.views import ModelView, PlanView, PoolView
from tidegate.errors import Conflict, HostUnavailable, ModelNotFound
from tidegate.local.audit_file import AuditFile
from tidegate.messages.rollouts import Action, RevisionView, RolloutView
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys
from tidegate.store.usage import UsageReader

ADMIN_KEY = "tg-admin-key-of-a-test"


NO_CHANGE = PlanView("bold", [], 1, 1, 0, 0)


@dataclass
class ScriptedHost:
    """One model. Each time that it is read its rollout goes on to the next of `rollouts`, and stays at the
    last; None of them: the host does not answer that time."""

    view: ModelView
    rollouts: list[RolloutView | None] = field(default_factory=list)
    history: list[RevisionView] = field(default_factory=list)
    planned: PlanView = NO_CHANGE
    asked: list[Action] = field(default_factory=list)
    specs: list[Mapping[str, Any]] = field(default_factory=list)
    drains: list[bool] = field(default_factory=list)

    async def models(self) -> list[ModelView]:
        return [self.view]

    async def model(self, name: str) -> ModelView:
        if name != self.view.name:
            raise ModelNotFound(f"No model is called {name!r}; there is: {self.view.name}.")
        if self.rollouts:
            rollout = self.rollouts.pop(0) if len(self.rollouts) > 1 else self.rollouts[0]
            if rollout is None:
                raise HostUnavailable("The operator that answered does not lead.")
            self.view = replace(self.view, rollout=rollout)
        return self.view

    async def pools(self) -> list[PoolView]:
        return []

    async def revisions(self, name: str) -> list[RevisionView]:
        await self.model(name)
        return self.history

    async def put_spec(
        self, name: str, spec: Mapping[str, Any], resource_version: str, author: str
    ) -> ModelView:
        if resource_version != self.view.resource_version:
            raise Conflict(f"Model {name} has changed since it was read; read it again and decide anew.")
        self.specs.append(spec)
        return self.view

    async def act(self, name: str, action: Action) -> None:
        self.asked.append(action)

    async def drain(self, name: str, is_on: bool, author: str) -> ModelView:
        self.drains.append(is_on)
        return self.view

    async def plan(
        self, name: str, *, spec: Mapping[str, Any] | None = None, action: Action | None = None
    ) -> PlanView:
        return self.planned


@dataclass(frozen=True)
class ControlApi:
    url: str
    host: ScriptedHost

    @property
    def environment(self) -> dict[str, str]:
        return {"TIDEGATE_ADMIN_URL": self.url, "TIDEGATE_ADMIN_KEY": ADMIN_KEY}


@contextmanager
def control_api(host: ScriptedHost, redis_url: str, key_prefix: str, folder: Path) -> Iterator[ControlApi]:
    """Answers in a thread of its own while the block runs."""
    listener = socket.create_server(("127.0.0.1", 0))
    loop, stop, is_up = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    async def answer() -> None:
        async with Connection(redis_url) as connection:
            keys = Keys(connection, key_prefix=key_prefix)
            await keys.start()
            services = Services(
                host=host,
                keys=keys,
                key_ring=OwnKey(ADMIN_KEY, "admin", keys),
                usage=UsageReader(connection, keys, key_prefix=key_prefix),
                audit=AuditFile(folder / "audit.jsonl"),
            )
            async with serving(ControlApp(services), [listener]):
                is_up.set()
                await stop.wait()
            await keys.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(answer(),))
    url = "http://{}:{}".format(*listener.getsockname())
    thread.start()
    try:
        assert is_up.wait(10)
        yield ControlApi(url, host)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
