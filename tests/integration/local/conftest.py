"""One whole platform for all tests of this folder: real Redis, real Ray, simulated models."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.waiting import await_until
from tidegate.local import lifecycle
from tidegate.local.home import Home, Running, read_record
from tidegate.local.progress import Progress
from tidegate.messages.registry import ModelEntry, ReplicaStats
from tidegate.settings import Settings
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry

UP_SECONDS = 150.0  # other work shares the machine


def model_text(name: str, **spec: Any) -> str:
    return json.dumps(
        {
            "apiVersion": "tidegate.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": name},
            "spec": {"engine": {"name": "simulated"}, **spec},
        }
    )


@dataclass
class Platform:
    """A running platform and how tests touch it."""

    settings: Settings
    models: Path
    shown: list[Progress]

    @property
    def home(self) -> Home:
        return Home(self.settings.home)

    @property
    def running(self) -> Running:
        found = read_record(self.home)
        assert found is not None
        return found

    def define(self, name: str, **spec: Any) -> None:
        (self.models / f"{name}.yaml").write_text(model_text(name, **spec), encoding="utf-8")

    def remove(self, name: str) -> None:
        (self.models / f"{name}.yaml").unlink(missing_ok=True)

    async def entries(self) -> dict[str, ModelEntry]:
        async with Connection(self.running.redis_url, name="test") as connection:
            return await Registry(connection, key_prefix=self.running.key_prefix).read_models()

    async def replicas(self) -> list[ReplicaStats]:
        async with Connection(self.running.redis_url, name="test") as connection:
            return await Registry(connection, key_prefix=self.running.key_prefix).replicas()

    async def pids(self, name: str) -> set[int]:
        return {stats.pid for stats in await self.replicas() if stats.model == name}

    async def until(
        self, name: str, holds: Callable[[ModelEntry], object], timeout: float = 60.0
    ) -> ModelEntry:
        async def look() -> ModelEntry | None:
            entry = (await self.entries()).get(name)
            return entry if entry is not None and holds(entry) else None

        found = await await_until(look, timeout)
        assert found is not None
        return found

    async def ask(self, model: str, *, key: str = "", **body: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.running.url, timeout=60.0) as client:
            return await client.post(
                "/v1/completions",
                headers={"authorization": f"Bearer {key or self.running.key}"},
                json={"model": model, "prompt": "Hello", "max_tokens": 4, **body},
            )


@pytest.fixture(scope="session")
def platform() -> Iterator[Platform]:
    root = Path(tempfile.mkdtemp(prefix="tg-test-"))
    models = root / "models"
    models.mkdir()
    settings = Settings(home=root / "home", port=0)
    shown: list[Progress] = []
    made = Platform(settings, models, shown)
    made.define("first")
    made.define("second")
    try:
        started = asyncio.run(bring_up(made))
        assert started.model is not None
        assert started.model.ready
        yield made
    finally:
        asyncio.run(lifecycle.clean(settings))
        shutil.rmtree(root, ignore_errors=True)


async def bring_up(made: Platform) -> lifecycle.Started:
    async with asyncio.timeout(UP_SECONDS):
        return await lifecycle.up(made.settings, [made.models], made.shown.append)


@pytest.fixture
async def steady(platform: Platform) -> AsyncIterator[Platform]:
    """The platform with its two models serving, and only those when the test has ended."""
    names = {"first", "second"}
    for name in names:
        await platform.until(name, lambda entry: entry.ready and entry.replicas_ready, timeout=90.0)
    yield platform
    for path in platform.models.glob("*.yaml"):
        if path.stem not in names:
            path.unlink()
    for name in names:
        platform.define(name)

    async def restored() -> bool:
        return (await platform.entries()).keys() == names

    await await_until(restored, timeout=60.0)
