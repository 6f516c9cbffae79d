"""Many Models in ten Pools, and what one change among them costs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.full.control_plane import GROUPS
from tests.cluster.full.model_watch import ModelWatch
from tests.cluster.operator_process import World

POOLS = 10
AT_ONCE = 8  # Models created at once
GROW_SECONDS = 300
CHANGE_SECONDS = 30
QUIET_SECONDS = 15.0  # in which the settled operator's use of the processor is measured

Writes = Mapping[tuple[str, str], int]
Spec = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """Changes of one sort, each of another Model and one after the other."""

    changed: tuple[str, ...]
    taken_in_seconds: tuple[float, ...]  # until the status names the new generation
    settled_seconds: tuple[float, ...]  # until nothing of it is under way any more
    api_writes: Counter[tuple[str, str]]  # by (kind, name), as a watch saw them; the changes themselves apart
    operator_writes: Writes  # by (kind, verb), as the operator counted them

    @property
    def per_change(self) -> dict[str, float]:
        return {
            f"{kind} {verb}": count / len(self.changed)
            for (kind, verb), count in sorted(self.operator_writes.items())
        }

    def of_others(self) -> dict[tuple[str, str], int]:
        """Writes to Models that were not changed."""
        return {
            (kind, name): count
            for (kind, name), count in self.api_writes.items()
            if kind == "Model" and name not in self.changed
        }


class Crowd:
    def __init__(self, world: World, watch: ModelWatch) -> None:
        self._world = world
        self._watch = watch
        self._specs: dict[str, Spec] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self._specs)

    async def grow(self, count: int) -> float:
        """Add Models until there are `count`. Returns after how many seconds all are ready."""
        began = time.monotonic()
        if not self._specs:
            for number in range(POOLS):
                await self._world.pool(f"pool-{number}", groups=GROUPS)
        fresh: dict[str, Spec] = {
            f"model-{number:03}": {"pool": f"pool-{number % POOLS}", "contextLength": 1024}
            for number in range(len(self._specs), count)
        }
        self._specs.update(fresh)
        gate = asyncio.Semaphore(AT_ONCE)

        async def create(name: str) -> None:
            async with gate:
                await self._world.model(name, **fresh[name])

        await asyncio.gather(*map(create, fresh))
        await self._watch.until(
            f"all of {count} Models are ready",
            lambda: all(map(self._watch.is_settled, self._specs)),
            GROW_SECONDS,
        )
        return time.monotonic() - began

    async def changes(self, names: Sequence[str], edit: Callable[[Spec], Spec]) -> Series:
        """Change these Models one after the other."""
        before = await self._world.settled()
        self._watch.forget()
        taken_in, settled = [], []
        for name in names:
            began = time.monotonic()
            generation = await self._change(name, edit)
            await self._until_taken_in(name, generation)
            taken_in.append(time.monotonic() - began)
            await self._watch.until(
                f"{name} is settled again",
                lambda name=name, generation=generation: self._watch.is_settled(name, generation),  # type: ignore[misc]
                CHANGE_SECONDS,
            )
            settled.append(time.monotonic() - began)
        after = await self._world.settled()
        api_writes = Counter((write.kind, write.name) for write in self._watch.writes)
        api_writes.subtract(("Model", name) for name in names)
        return Series(tuple(names), tuple(taken_in), tuple(settled), api_writes, _difference(before, after))

    async def changes_at_once(self, names: Sequence[str], edit: Callable[[Spec], Spec]) -> list[float]:
        """Change these Models together. Returns how long each took to be taken in."""

        async def change(name: str) -> float:
            began = time.monotonic()
            generation = await self._change(name, edit)
            await self._until_taken_in(name, generation)
            return time.monotonic() - began

        return await asyncio.gather(*map(change, names))

    async def memory(self) -> tuple[float, float]:
        """(resident now, the most so far) of the operator, in MB."""
        await self._world.settled()
        return _resident(self._world.operator.pid)

    async def idle_cores(self) -> float:
        """Cores that the operator uses while nothing changes."""
        process = psutil.Process(self._world.operator.pid)
        before = process.cpu_times()
        await asyncio.sleep(QUIET_SECONDS)
        after = process.cpu_times()
        return (after.user + after.system - before.user - before.system) / QUIET_SECONDS

    async def _change(self, name: str, edit: Callable[[Spec], Spec]) -> int:
        """The generation that it makes."""
        self._specs[name] = edit(self._specs[name])
        body = await self._world.model(name, **self._specs[name])
        return int(body["metadata"]["generation"])

    async def _until_taken_in(self, name: str, generation: int) -> None:
        await self._watch.until(
            f"the status of {name} names generation {generation}",
            lambda: self._watch.has_taken_in(name, generation),
            CHANGE_SECONDS,
        )


def another_queue(spec: Spec) -> Spec:
    """A change that needs no new replica."""
    bound = spec.get("queue", {}).get("maxRequests", 1000)
    return {**spec, "queue": {"maxRequests": bound + 1}}


def another_revision(spec: Spec) -> Spec:
    """A change that needs new replicas, which take over from the old ones."""
    return {**spec, "contextLength": spec["contextLength"] + 64}


def _difference(before: Writes, after: Writes) -> dict[tuple[str, str], int]:
    return {key: count - before.get(key, 0) for key, count in after.items() if count > before.get(key, 0)}


def _resident(pid: int) -> tuple[float, float]:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = dict(line.split(":", 1) for line in status.splitlines())
    now, most = (int(found[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return now, most
