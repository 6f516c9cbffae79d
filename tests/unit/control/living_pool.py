"""A pool that lives by its plans: Serve with its delays and our policy, replicas that prove themselves, work
and beat, and a Ray that seats them. A tick is a second."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from tests.unit.control.builders import REPLICAS, World
from tidegate.control.desired import revision_of
from tidegate.control.observed import (
    ApplicationState,
    PodProblem,
    ReplicaState,
    RevisionKey,
    ServeState,
    Worker,
)
from tidegate.control.plan import PoolPlan
from tidegate.control.resources import Model
from tidegate.control.seating import places
from tidegate.control.serve_config import application_config, split_application_name
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ReplicaStats, RevisionReport
from tidegate.serving.autoscale import desired_replicas

SLOTS = 4


@dataclass
class Replica:
    name: str
    started: float
    idle_since: float
    running: int = 0
    tokens: int = 0
    is_ending: bool = False
    node: str = ""


@dataclass
class Served:
    """One application in Serve."""

    config: dict[str, Any]
    replicas: list[Replica] = field(default_factory=list)
    fewer_since: float | None = None

    @property
    def scaling(self) -> dict[str, Any]:
        return dict(self.config["deployments"][0]["autoscaling_config"])

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.config["deployments"][0]["ray_actor_options"])

    @property
    def live(self) -> list[Replica]:
        return [replica for replica in self.replicas if not replica.is_ending]


class LivingPool(World):
    """`work` holds the seconds that each request of a queue still takes, in their order; those of a loaded
    replica run, `SLOTS` each. Ray spreads replicas over the workers of the one group. `nodes` are how many of
    these find a node (None: all)."""

    nodes: int | None = None

    def __init__(self, *models: Model, **pool: Any) -> None:
        super().__init__(*models, **pool)
        self.served: dict[str, Served] = {}
        self.work: dict[RevisionKey, list[int]] = {}
        self.starts: Counter[str] = Counter()
        self.ended_at_work: list[str] = []
        self.most_cpus = 0.0
        self.most_gpus = 0.0
        self.pending = 0

    def ask(self, name: str, seconds: int = 1) -> None:
        spec = next(model.spec for model in self.models if model.name == name)
        self.work.setdefault((name, revision_of(spec)), []).append(seconds)

    def tick(self) -> PoolPlan:
        self._observe()
        plan = self.plan()
        self.records = dict(plan.records)
        self.see(entries=plan.entries)
        self._put(plan)
        for name, served in self.served.items():
            self._scale(name, served)
        self._place()
        self._run()
        self._weigh()
        self.now += 1
        return plan

    def ticks(self, count: int) -> PoolPlan:
        for _ in range(count - 1):
            self.tick()
        return self.tick()

    def left(self, name: str) -> int:
        """Count the requests of a model that have not ended."""
        return sum(len(queue) for key, queue in self.work.items() if key[0] == name)

    def awake(self) -> set[str]:
        return {_key(name)[0] for name, served in self.served.items() if served.live}

    def _put(self, plan: PoolPlan) -> None:
        wanted = {each.name: application_config(each, REPLICAS) for each in plan.applications}
        for name, config in wanted.items():
            if (served := self.served.get(name)) is None:
                self.served[name] = Served(config)
            elif served.config != config:
                served.config, served.fewer_since = config, None
        self.served = {name: served for name, served in self.served.items() if name in wanted}

    def _scale(self, name: str, served: Served) -> None:
        """Serve's own bounds and delays around the policy."""
        served.replicas = served.live  # what ended a second ago is gone
        scaling, load, present = served.scaling, len(self.work.get(_key(name), [])), len(served.live)
        most = scaling["max_replicas"]
        wanted = desired_replicas(
            waiting=load,
            running=0,
            replicas=present,
            target_in_flight=SLOTS,
            is_active=False,
            minimum=scaling["min_replicas"],
            maximum=most if scaling["upscale_delay_s"] == 0 else min(most, present),
        ).replicas
        if wanted >= present:
            served.fewer_since = None
            for _ in range(wanted - present):
                self.starts[_key(name)[0]] += 1
                title = f"{name}#{self.starts.total()}"
                served.replicas.append(Replica(title, self.now, self.now))
            return
        served.fewer_since = self.now if served.fewer_since is None else served.fewer_since
        delay = scaling["downscale_to_zero_delay_s" if present == 1 else "downscale_delay_s"]
        if self.now - served.fewer_since < delay:
            return
        idle_first = sorted(served.live, key=lambda replica: replica.running)
        for replica in idle_first[: present - (wanted if present == 1 else max(1, wanted))]:
            replica.is_ending = True
            if replica.running:
                self.ended_at_work.append(replica.name)

    def _place(self) -> None:
        """Where most is free, in the order of starting; what finds no room pends."""
        group = places(replace(self.seen, pod_problems=()))[0]
        count = group.max_workers if self.nodes is None else self.nodes
        everything = [(served, each) for served in self.served.values() for each in served.replicas]
        cpus = {f"w{number}": group.cpus for number in range(count)}
        gpus = {node: [1.0] * group.gpus_per_worker for node in cpus}
        for served, each in sorted(everything, key=lambda item: (not item[1].node, item[1].started)):
            options = served.options
            fitting = [
                node
                for node in ([each.node] if each.node else cpus)
                if cpus[node] >= options["num_cpus"] - 1e-9
                and (not options["num_gpus"] or max(gpus[node], default=0) >= options["num_gpus"] - 1e-9)
            ]
            if not fitting:
                assert not each.node, "Ray has given out more than there is"
                continue
            node = max(fitting, key=lambda node: cpus[node])
            cpus[node] -= options["num_cpus"]
            if options["num_gpus"]:
                best = min(
                    (free, at) for at, free in enumerate(gpus[node]) if free >= options["num_gpus"] - 1e-9
                )
                gpus[node][best[1]] -= options["num_gpus"]
            if not each.node:
                each.node, each.started = node, self.now
        self.pending = sum(not each.node for _, each in everything)
        problem = PodProblem("w", "", "Unschedulable", "No node.", group.name)
        self.see(
            pod_problems=(problem,) if self.pending and self.nodes is not None else (),
            workers=tuple(Worker(node, "1.2.3.4", group.name) for node in cpus),
        )

    def _run(self) -> None:
        for name, served in self.served.items():
            key = _key(name)
            queue = self.work.get(key, [])
            loaded = [each for each in served.live if each.node and self.now > each.started]
            if loaded and key not in self.seen.reports:
                report = RevisionReport(*key, at=self.now, proved=True, slots=SLOTS)
                self.see(reports={**self.seen.reports, key: report})
            for number, replica in enumerate(loaded):
                running = queue[number * SLOTS : (number + 1) * SLOTS]
                replica.running = len(running)
                replica.tokens += len(running)
                if running:
                    replica.idle_since = self.now + 1
            busy = len(loaded) * SLOTS
            left = [seconds - 1 for seconds in queue[:busy]] + queue[busy:]
            self.work[key] = [seconds for seconds in left if seconds > 0]
            for replica in loaded:
                replica.running = min(replica.running, len(self.work[key]))

    def _weigh(self) -> None:
        """Look at what Serve was told to start, what ends included: never more than there is. `_place` looks
        at each worker; only where one replica finds no gap large enough may Serve have been told of more."""
        cpus = gpus = 0.0
        for served in self.served.values():
            cpus += served.options["num_cpus"] * len(served.replicas)
            gpus += served.options["num_gpus"] * len(served.replicas)
        self.most_cpus, self.most_gpus = max(self.most_cpus, cpus), max(self.most_gpus, gpus)
        (group,) = places(self.seen)
        if not self.pending:
            assert cpus <= group.max_workers * group.cpus + 1e-9
            assert gpus <= group.max_workers * group.gpus_per_worker + 1e-9
        assert not self.pending or group.max_workers > 1 or self.nodes is not None

    def _observe(self) -> None:
        states, stats = {}, []
        for name, served in self.served.items():
            replicas = tuple(
                ReplicaState(each.name, "STOPPING" if each.is_ending else "RUNNING", 1, each.node)
                for each in served.replicas
            )
            wanted = max(len(served.live), served.scaling["min_replicas"])
            states[name] = ApplicationState(
                name, "RUNNING", config=served.config, wanted_replicas=wanted, replicas=replicas
            )
            for each in served.live:
                if each.node and self.now > each.started:
                    stats.append(self._beat(name, each))
        depths = {key: Depth(len(queue), 0, 0.0) for key, queue in self._queues().items()}
        self.see(serve=ServeState("c", states), replicas=tuple(stats), depths=depths)

    def _queues(self) -> dict[RevisionKey, list[int]]:
        known = {(model.name, revision_of(model.spec)): list[int]() for model in self.models}
        return {**known, **self.work}

    def _beat(self, name: str, each: Replica) -> ReplicaStats:
        return ReplicaStats(
            each.name,
            *_key(name),
            pid=1,
            node="n",
            started=each.started,
            updated=self.now,
            slots=SLOTS,
            running=each.running,
            tokens_total=each.tokens,
            tokens_per_second=0.0,
            idle_since=0.0 if each.running else each.idle_since,
        )


def _key(name: str) -> RevisionKey:
    key = split_application_name(name)
    assert key is not None
    return key
