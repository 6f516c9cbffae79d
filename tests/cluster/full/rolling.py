"""What rollouts on the whole cluster did: followed on the Models and on the Pool's Serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loadtests.steady import Call
from tests.cluster.cluster import Cluster, Resource
from tests.cluster.full.figures import Figures
from tests.cluster.full.head import Head
from tests.cluster.release import HEAD, Release
from tidegate.control.observed import ApplicationState
from tidegate.messages.rollouts import ENDED

END_SECONDS = 400.0
LOOK_SECONDS = 0.25


@dataclass
class Seen:
    """What was seen of one Model's rollout. Times are unix seconds; `stepped` is 0 where it never had a share
    of the requests, `moved` when that last changed, and `weight` the largest that it had."""

    changed: float
    view: dict[str, Any] = field(default_factory=dict)
    stepped: float = 0.0
    moved: float = 0.0
    ended: float = 0.0
    weight: int = 0
    weights: list[int] = field(default_factory=list)
    positions: set[int] = field(default_factory=set)
    accelerators: float = 0.0  # the most that its Pool's replicas took

    def take(self, view: dict[str, Any], accelerators: float) -> None:
        now = time.time()
        self.view = view
        weight = int(view["weight"])
        self.accelerators = max(self.accelerators, accelerators)
        self.positions.add(int(view.get("position", 0)))
        self.weight = max(self.weight, weight)
        if self.weights[-1:] != [weight]:
            self.weights.append(weight)
            self.moved = now
        if weight and not self.stepped:
            self.stepped = now
        if view["phase"] in ENDED and not self.ended:
            self.ended = now

    @property
    def failed_gates(self) -> set[str]:
        return {gate["name"] for gate in self.view.get("gates", ()) if gate["state"] == "fails"}

    def tell(self, figures: Figures, row: str, calls: Sequence[Call]) -> None:
        """`calls`: those that began since the change. A row of the table."""
        bad = [call for call in calls if call.is_bad]
        late = [call.ended - self.ended for call in bad if call.ended > self.ended]
        gates = ", ".join(sorted(self.failed_gates))
        found = f"{self.ended - self.stepped:.1f} s" if self.stepped else "before any request"
        for column, value in {
            "end": f"{self.view['phase']}{': ' + gates if gates else ''}",
            "from its first request": found,
            "from the change": f"{self.ended - self.changed:.1f} s",
            "bad answers": f"{len(bad)} of {len(calls)}",
            "back after": f"{max(late):.1f} s" if late else "at once",
            "gateways follow": self._followed(calls),
            "accelerators at most": f"{self.accelerators:.2f}",
        }.items():
            figures.add(row, column, value, of="revision")

    def _followed(self, calls: Sequence[Call]) -> str:
        """How long after the status said that it has none a revision still got requests."""
        loser = self.view["target" if self.view["phase"] == "Aborted" else "stable"]
        late = [call.began - self.moved for call in calls if call.revision == loser]
        return f"{max(0.0, *late):.1f} s" if late else ""


class Rollouts:
    """The rollouts of one Pool's Models, looked at as often as the API server and Serve answer."""

    def __init__(self, cluster: Cluster, release: Release, pool: str) -> None:
        self._cluster, self._release, self._pool = cluster, release, pool
        self._api = cluster.api()
        self._head: Head | None = None

    def views(self) -> Mapping[str, dict[str, Any]]:
        """By Model; without those that have never rolled."""
        path = f"/apis/tidegate.dev/v1alpha1/namespaces/{self._release.namespace}/models"
        items: list[Resource] = self._api.get(path).raise_for_status().json()["items"]
        found = {item["metadata"]["name"]: item.get("status", {}).get("rollout") for item in items}
        return {name: view for name, view in found.items() if view}

    def accelerators(self) -> float:
        """GPUs that the Pool's replicas take by what Serve says, those that start and stop as well."""
        return sum(map(_taken, self._applications().values()))

    def replicas(self, model: str) -> Mapping[str, set[str]]:
        """Serve's own names of a Model's replicas, by application."""
        found = self._applications()
        return {
            name: {each.replica for each in application.replicas}
            for name, application in found.items()
            if name.startswith(f"{model}--")
        }

    @contextmanager
    def followed(self, *names: str) -> Iterator[Mapping[str, Seen]]:
        """What is seen of the rollouts that begin in the block, while it runs and until all have ended."""
        before = {name: view["id"] for name, view in self.views().items()}
        seen = {name: Seen(time.time()) for name in names}
        is_over = threading.Event()
        with ThreadPoolExecutor(1) as watching:
            watch = watching.submit(self._watch, seen, before, is_over)
            try:
                yield seen
                watch.result()
            finally:
                is_over.set()

    def wait_for(self, name: str, what: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The view of a Model's rollout, as soon as this is so."""

        def found() -> dict[str, Any] | None:
            view = self.views().get(name, {})
            return view if view and holds(view) else None

        return self._cluster.wait_for(f"{name}: {what}", found, END_SECONDS)

    def _watch(self, seen: Mapping[str, Seen], before: Mapping[str, str], is_over: threading.Event) -> None:
        end = time.monotonic() + END_SECONDS
        while not is_over.wait(LOOK_SECONDS) and not all(found.ended for found in seen.values()):
            accelerators, views = self.accelerators(), self.views()
            for name, found in seen.items():
                if views.get(name, {}).get("id", "") != before.get(name, ""):
                    found.take(views[name], accelerators)
            told = [f"{name}: {found.view}" for name, found in seen.items() if not found.ended]
            assert time.monotonic() < end, f"no end after {END_SECONDS:.0f} s: {told}"

    def _applications(self) -> Mapping[str, ApplicationState]:
        if self._head is None or not (found := self._head.applications()):
            self._head = self._find_head()
            found = self._head.applications()
        return found

    def _find_head(self) -> Head:
        (pod,) = self._release.pods(f"tidegate.dev/pool={self._pool},{HEAD}")
        name = pod["metadata"]["labels"]["ray.io/cluster"]
        return Head(pod, self._cluster.secret(name, "auth_token", self._release.namespace))


def _taken(application: ApplicationState) -> float:
    config = application.config or {}
    shares = [item["ray_actor_options"].get("num_gpus") or 0.0 for item in config.get("deployments", ())]
    return float(sum(shares)) * len(application.replicas)
