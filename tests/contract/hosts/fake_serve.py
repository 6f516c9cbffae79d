"""Ray Serve's REST API in memory: an application that is PUT runs at once, its revision proves itself and its
replica beats, as replicas do. One that may sleep follows its queue. What is refused, broken, held back or
away is set from the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from msgspec.structs import replace

from tests.contract.hosts.fake_store import Journal, Queue
from tidegate.control.observed import ServeState
from tidegate.control.serve_config import split_application_name
from tidegate.messages.registry import ReplicaStats, RevisionReport
from tidegate.serve_api import ServeRejected, ServeUnavailable, parse_state


class Board(Protocol):
    """Where replicas speak (`store.registry.Registry`)."""

    async def report(self, report: RevisionReport) -> None: ...

    async def beat(self, stats: ReplicaStats) -> None: ...

    async def gone(self, stats: ReplicaStats) -> None: ...


class Faults:
    """What goes wrong, by the names of models; one for all Serves of a test."""

    def __init__(self) -> None:
        self.refused: set[str] = set()  # Serve refuses the application
        self.broken: set[str] = set()  # the revision cannot load
        self.slow: set[str] = set()  # the revision says nothing until `FakeServe.prove`


class FakeServe:
    """The Serve of one Ray cluster. `puts` are the names of applications of every PUT; `journal` gets them
    among all that hosts write."""

    def __init__(
        self,
        board: Board,
        faults: Faults,
        now: Callable[[], float],
        name: str = "ray",
        journal: Journal | None = None,
        queues: Mapping[Queue, int] | None = None,
    ) -> None:
        self.journal: Journal = journal if journal is not None else []
        self._board = board
        self._faults = faults
        self._now = now
        self._name = name
        self._queues = queues if queues is not None else {}
        self._replicas: dict[str, int] = {}
        self._worked_at: dict[str, float] = {}
        self._loading: set[str] = set()
        self.configs: dict[str, Mapping[str, Any]] = {}
        self.puts: list[list[str]] = []
        self.is_away = False  # answers nothing
        self.is_deaf = False  # answers, and takes no config
        self.is_closed = False

    async def get(self) -> ServeState:
        if self.is_away:
            raise ServeUnavailable("Serve is away.")
        return parse_state(self.body())

    async def put(self, config: Mapping[str, Any]) -> None:
        if self.is_away or self.is_deaf:
            raise ServeUnavailable("Serve is away.")
        configs = {str(each["name"]): each for each in config["applications"]}
        self.puts.append(list(configs))
        self.journal.append((f"PUT {self._name}", sorted(configs)))
        for name in configs:
            if _key(name)[0] in self._faults.refused:
                raise ServeRejected(f"{name}: import_path: not one that can be imported")
        fresh = configs.keys() - self.configs.keys()
        self.configs = configs
        self._loading &= configs.keys()
        self._scale()
        for name in fresh:
            if _key(name)[0] in self._faults.slow:
                self._loading.add(name)
            else:
                await self._report(name)
        await self.beat()

    async def close(self) -> None:
        self.is_closed = True

    def body(self) -> dict[str, Any]:
        """Return what a GET is answered."""
        found = {name: self._details(name, config) for name, config in self.configs.items()}
        return {"controller_info": {"actor_id": "c"}, "applications": found}

    async def prove(self) -> None:
        """All replicas that were held back have loaded."""
        for name in list(self._loading):
            await self._report(name)
        self._loading.clear()
        await self.beat()

    async def beat(self) -> None:
        """All replicas say that they live."""
        self._scale()
        now = self._now()
        beats = []
        for name in self.configs:
            model, revision = _key(name)
            if model in self._faults.broken or name in self._loading:
                continue
            stats = ReplicaStats(f"{self._name}-{name}", model, revision, 1, "n", now, now, 4, 0, 0, 0.0)
            if name in self._worked_at:
                running = self._queues.get((model, revision), 0)
                stats = replace(stats, running=running, tokens_total=1, idle_since=self._worked_at[name])
            beats.append(self._board.beat(stats) if self._replicas[name] else self._board.gone(stats))
        await asyncio.gather(*beats)  # hundreds, one after the other, would take longer than a beat may

    def _scale(self) -> None:
        """As Serve does with our policy; load wants one replica, and what was never asked need not rest."""
        before, self._replicas = self._replicas, {}
        for name, config in self.configs.items():
            scaling, present = config["deployments"][0]["autoscaling_config"], before.get(name, 0)
            has_load = self._queues.get(_key(name), 0) > 0
            if has_load and present:
                self._worked_at[name] = self._now()
            rested = self._now() - self._worked_at.get(name, float("-inf"))
            if has_load and scaling["upscale_delay_s"] == 0:
                wanted = 1
            elif has_load or rested < scaling["downscale_to_zero_delay_s"]:
                wanted = min(1, present)
            else:
                wanted = 0
            self._replicas[name] = max(wanted, scaling["min_replicas"])

    async def _report(self, name: str) -> None:
        model, revision = _key(name)
        proved = model not in self._faults.broken
        report = RevisionReport(
            model,
            revision,
            self._now(),
            proved,
            reason="" if proved else "WeightsMissing",
            message="" if proved else "model.safetensors is not there.",
            context_length=self.configs[name]["args"]["engine"]["context_length"],
        )
        await self._board.report(report)

    def _details(self, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
        state = "STARTING" if name in self._loading else "RUNNING"
        replicas = [
            {"replica_id": f"{name}-{number}", "state": state, "pid": 1, "node_id": "n"}
            for number in range(self._replicas[name])
        ]
        deployment = {"target_num_replicas": len(replicas), "replicas": replicas, "message": ""}
        return {
            "status": "RUNNING" if state == "RUNNING" else "DEPLOYING",
            "message": "",
            "deployed_app_config": config,
            "deployments": {"Replica": deployment},
        }


def _key(name: str) -> tuple[str, str]:
    key = split_application_name(name)
    assert key is not None, name
    return key
