"""Resources, records and observations for the control tests."""

from __future__ import annotations

from typing import Any

from tidegate.control.desired import revision_of
from tidegate.control.observed import (
    ApplicationState,
    Observation,
    ReplicaState,
    ServeState,
    SourceState,
)
from tidegate.control.plan import PoolPlan, PoolSnapshot, plan_pool
from tidegate.control.resources import Model, PoolSpec
from tidegate.control.serve_config import application_config
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ReplicaStats, RevisionReport
from tidegate.replica_args import ReplicaSettings

NOW = 1_800_000_000.0
REPLICAS = ReplicaSettings(redis_url="unix:///redis.sock")


def document(name: str = "one", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": name},
        "spec": {"engine": {"name": "simulated"}, **spec},
    }


def model(name: str = "one", **spec: Any) -> Model:
    return Model.model_validate(document(name, **spec))


class World:
    """A platform that does what plans say: the shortest way from plan to plan."""

    def __init__(self, *models: Model, **pool: Any) -> None:
        self.models = list(models)
        self.pool = PoolSpec.model_validate(pool)
        self.records: dict[str, Any] = {}
        self.now = NOW
        self.seen = Observation(serve=ServeState())
        self.deleting: dict[str, float] = {}

    def plan(self, wave: int | None = None) -> PoolPlan:
        return plan_pool(self.snapshot(wave), self.now)

    def snapshot(self, wave: int | None = None) -> PoolSnapshot:
        return PoolSnapshot(
            self.models, self.pool, self.records, self.seen, deleting=self.deleting, wave=wave
        )

    def step(self, status: str = "RUNNING", wave: int | None = None, seconds: float = 1.0) -> PoolPlan:
        """Plan, and apply it: applications stand in Serve with `status` if they are new."""
        plan = self.plan(wave)
        self.records = dict(plan.records)
        before = self.seen.serve.applications if self.seen.serve is not None else {}
        applications = {
            wanted.name: before.get(wanted.name)
            or ApplicationState(wanted.name, status, config=application_config(wanted, REPLICAS))
            for wanted in plan.applications
        }
        self.see(serve=ServeState("c", applications), entries=plan.entries)
        self.now += seconds
        return plan

    def see(self, **changes: Any) -> None:
        fields = {name: getattr(self.seen, name) for name in Observation.__dataclass_fields__}
        self.seen = Observation(**{**fields, **changes})

    def report(self, name: str, revision: str, **changes: Any) -> None:
        report = RevisionReport(name, revision, at=self.now, **{"proved": True, **changes})
        self.see(reports={**self.seen.reports, (name, revision): report})

    def status(self, application: str, status: str, message: str = "") -> None:
        """Serve reports another status."""
        assert self.seen.serve is not None
        replica = ReplicaState("r", "RUNNING", 1, "n")
        changed = ApplicationState(application, status, message, {}, 1, (replica,))
        self.see(serve=ServeState("c", {**self.seen.serve.applications, application: changed}))

    def replica(self, name: str, revision: str) -> None:
        stats = ReplicaStats("r", name, revision, 1, "n", self.now, self.now, 4, 0, 0, 0.0)
        self.see(replicas=(*self.seen.replicas, stats))

    def source(self, number: int, state: SourceState) -> None:
        """The look at the source of the model with this place in the list has come so far."""
        wanted = self.models[number]
        self.see(sources={**self.seen.sources, (wanted.name, revision_of(wanted.spec)): state})

    def depth(self, name: str, revision: str, waiting: int, running: int) -> None:
        self.see(depths={**self.seen.depths, (name, revision): Depth(waiting, running, 0.0)})

    def settle(self, name: str) -> str:
        """Bring a model up until its newest revision serves; that revision."""
        self.step()
        revision = next(reversed(self.records[name].revisions))
        self.report(name, revision)
        self.replica(name, revision)
        self.step()
        return str(revision)
