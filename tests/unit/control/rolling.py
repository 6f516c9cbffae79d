"""A platform in which models roll out, in virtual time: Serve with its own scaling, replicas that load, fail
and drain, gateways that follow the registry a tick late, requests with ends, a clock that may jump and a host
that may crash between any two of its writes. A tick is a second. It obeys the plans, and looks at each."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from tests.unit.control.builders import NOW, REPLICAS, model
from tidegate.control.desired import WHOLE, ModelRecord, RevisionRecord, revision_of
from tidegate.control.evidence import Limits, judge
from tidegate.control.observed import (
    ApplicationState,
    Capacity,
    Group,
    Observation,
    ReplicaState,
    RevisionKey,
    ServeState,
)
from tidegate.control.plan import PoolPlan, PoolSnapshot, plan_pool
from tidegate.control.resources import Model, PoolSpec
from tidegate.control.rollout_schema import RolloutSpec
from tidegate.control.rollout_state import RolloutState
from tidegate.control.serve_config import application_config, split_application_name
from tidegate.messages.outcomes import Outcomes, Tally, bucket_of
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ModelEntry, ReplicaStats, RevisionReport
from tidegate.messages.rollouts import Action, RolloutView, Verb

SLOTS = 4
LOAD_SECONDS = 3
DRAIN_SECONDS = 2
WORK = 10  # requests that a slot ends in a second
Crash = Literal["", "before", "records", "registry"]  # which write of a round was the last


@dataclass
class Fault:
    """What is wrong with a revision: its load fails for this reason, so many of 1 requests fail, its first
    token takes so many times as long, its requests end so, and so many of its replicas are lost a second."""

    load: str = ""
    errors: float = 0.0
    slow: float = 1.0
    end: str = ""
    lost: float = 0.0


@dataclass
class Replica:
    name: str
    ready_at: float
    ends_at: float | None = None


@dataclass
class Standing:
    config: dict[str, Any]
    replicas: list[Replica] = field(default_factory=list)
    is_going: bool = False

    @property
    def scaling(self) -> Mapping[str, Any]:
        scaling: Mapping[str, Any] = self.config["deployments"][0]["autoscaling_config"]
        return scaling

    @property
    def staying(self) -> list[Replica]:
        return [each for each in self.replicas if each.ends_at is None]


class Rolling:
    """`rates` are requests a second by model, `faults` by revision. `offset` is how far the host's clock is
    off the ticks."""

    def __init__(
        self, *models: Model, seed: int = 1, cpus: float = 1024, gpus: float = 0, **pool: Any
    ) -> None:
        self.models = list(models)
        self.pool = PoolSpec.model_validate(pool)
        self.cpus, self.gpus = cpus, gpus
        self.groups: tuple[Group, ...] = ()  # of a cluster
        self.random = random.Random(seed)
        self.at = NOW
        self.offset = 0.0
        self.records: dict[str, ModelRecord] = {}
        self.entries: dict[str, ModelEntry] = {}
        self.followed: dict[str, ModelEntry] = {}  # by gateways
        self.standing: dict[str, Standing] = {}
        self.reports: dict[RevisionKey, RevisionReport] = {}
        self.queues: dict[RevisionKey, list[str]] = {}
        self.outcomes: dict[RevisionKey, dict[str, Tally]] = {}
        self.rates: dict[str, int] = {}
        self.faults: dict[str, Fault] = {}
        self.actions: dict[str, Action] = {}
        self.history: dict[str, Sequence[RevisionRecord]] = {}
        self.failed: dict[str, int] = {}  # requests that clients saw fail, by revision
        self.starts = 0
        self.starts_of: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.gpu_peaks: dict[str, float] = {}
        self.held_gpus: dict[str, float] = {}
        self.shares: dict[str, float] = {}  # what a replica takes of a GPU, by revision
        self.plans: list[PoolPlan] = []
        self.crash: Crash = ""

    # What a test does ---------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.at + self.offset

    def change(self, name: str, seed: int, **spec: Any) -> str:
        """Ask for the revision of this seed; its name."""
        (old,) = (each for each in self.models if each.name == name)
        wire = old.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
        new = model(name, **{**wire, "engine": {"name": "simulated", "args": {"seed": seed}}, **spec})
        self.models = [new if each.name == name else each for each in self.models]
        return revision_of(new.spec)

    def change_rollout(self, name: str, **fields: Any) -> None:
        (old,) = (each for each in self.models if each.name == name)
        wire = old.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
        new = model(name, **{**wire, "rollout": {**wire["rollout"], **fields}})
        self.models = [new if each.name == name else each for each in self.models]

    def ask(self, name: str, verb: Verb, revision: str = "") -> None:
        self.actions[name] = Action(verb, revision, author="ada", at=self.now)

    def ticks(self, count: int) -> PoolPlan:
        for _ in range(count - 1):
            self.tick()
        return self.tick()

    def until(self, name: str, *phases: str, most: int = 2000) -> int:
        """Tick until the rollout is in one of these phases; after how many seconds."""
        for count in range(1, most + 1):
            self.tick()
            if self.view(name).phase in phases:
                return count
        raise AssertionError(f"{phases} was not reached: {self.view(name)}")

    def view(self, name: str = "one") -> RolloutView:
        return self.plans[-1].rollouts[name]

    def state(self, name: str = "one") -> RolloutState:
        state = self.records[name].rollout
        assert state is not None
        return state

    def up(self, *names: str) -> list[str]:
        """Bring the models up; their revisions."""
        self.ticks(LOAD_SECONDS + 4)
        return [next(iter(self.records[name].weights)) for name in names or ("one",)]

    def ready(self, name: str, revision: str) -> int:
        standing = self.standing.get(f"{name}--{revision}")
        return sum(each.ready_at <= self.at for each in standing.staying) if standing is not None else 0

    def said(self, name: str, kind: str) -> tuple[str, str]:
        found = next(item for item in self.entries[name].conditions if item.type == kind)
        return found.status, found.reason

    # One second ---------------------------------------------------------------------------------------

    def tick(self) -> PoolPlan:
        seen = self.observed()
        plan = plan_pool(self.snapshot(seen), self.now)
        self.plans.append(plan)
        self._look_at(plan, seen)
        crash, self.crash = self.crash, ""
        if crash != "before":
            stored = msgspec.json.encode(dict(plan.records))
            self.records = msgspec.json.decode(stored, type=dict[str, ModelRecord])
            self.history = dict(plan.history)
        if crash not in ("before", "records"):
            for name in plan.records:
                if self.records[name].acted is not None:
                    self.actions.pop(name, None)
            self._publish(plan)
        if crash == "":
            self._put(plan)
        self._scale()
        self._send()
        self._work()
        self.at += 1
        return plan

    def snapshot(self, seen: Observation) -> PoolSnapshot:
        return PoolSnapshot(
            self.models, self.pool, self.records, seen, actions=dict(self.actions), history=self.history
        )

    def observed(self) -> Observation:
        states, stats = {}, []
        for name, each in self.standing.items():
            key = _key(name)
            replicas = tuple(
                ReplicaState(replica.name, "RUNNING" if replica.ends_at is None else "STOPPING", 1, "n")
                for replica in each.replicas
            )
            status = "DELETING" if each.is_going else "RUNNING"
            wanted = max(len(each.staying), each.scaling["min_replicas"])
            states[name] = ApplicationState(name, status, "", each.config, wanted, replicas)
            if each.is_going:  # as Serve: neither its config nor the replicas that are still ending
                states[name] = ApplicationState(name, status)
            for replica in each.staying:
                if replica.ready_at <= self.at:
                    idle = 0.0 if self.queues.get(key) else self.at - 60
                    stats.append(
                        ReplicaStats(replica.name, *key, 1, "n", 0, 0, SLOTS, 0, 9, 0.0, idle_since=idle)
                    )
        known = {(name, revision) for name, record in self.records.items() for revision in record.revisions}
        return Observation(
            ServeState("c", states),
            reports=dict(self.reports),
            replicas=tuple(stats),
            depths={key: Depth(len(self.queues.get(key, [])), 0, 0.0) for key in known},
            entries=dict(self.entries),
            capacity=Capacity(self.cpus, self.gpus),
            groups=self.groups,
            outcomes={key: dict(self.outcomes.get(key, {})) for key in {*known, *self.outcomes}},
        )

    def _publish(self, plan: PoolPlan) -> None:
        for key, _ in plan.registry.drop:
            self.reports.pop(key, None)
            left = self.queues.pop(key, [])
            self.outcomes.pop(key, None)
            if left and key[1] in self.failed:
                raise AssertionError(f"{len(left)} requests are lost with {key}")
        self.entries = dict(plan.entries)
        for source, goal, _ in plan.registry.move:
            self.queues.setdefault(goal, []).extend(self.queues.pop(source, []))
        for queues, rollout in plan.registry.forget_outcomes:
            for key in queues:
                kept = self.outcomes.get(key, {})
                self.outcomes[key] = {
                    cohort: tally for cohort, tally in kept.items() if cohort.rpartition(".")[0] != rollout
                }

    def _put(self, plan: PoolPlan) -> None:
        wanted = {each.name: application_config(each, REPLICAS) for each in plan.applications}
        for name, config in wanted.items():
            if name not in self.standing:
                self.standing[name] = Standing(config)
            elif not self.standing[name].is_going:
                self.standing[name].config = config
        for name, each in self.standing.items():
            if name not in wanted and not each.is_going:
                each.is_going = True
                self._end(each.staying)

    def _scale(self) -> None:
        for name, each in list(self.standing.items()):
            key, fault = _key(name), self._fault(name)
            each.replicas = [one for one in each.replicas if one.ends_at is None or one.ends_at > self.at]
            if each.is_going:
                if not each.replicas:
                    del self.standing[name]
                continue
            for one in each.staying:
                if one.ready_at == self.at:
                    proved = not fault.load
                    self.reports[key] = RevisionReport(
                        *key, self.now, proved, fault.load, "It broke.", slots=SLOTS if proved else 0
                    )
                    if not proved:
                        each.replicas.remove(one)
            least, most = each.scaling["min_replicas"], each.scaling["max_replicas"]
            present = len(each.staying)
            wanted = min(most, max(least, math.ceil(len(self.queues.get(key, [])) / (SLOTS * WORK))))
            if each.scaling["upscale_delay_s"]:
                wanted = min(wanted, present)
            for _ in range(wanted - present):
                self.starts += 1
                self.starts_of[key[1]] = self.starts_of.get(key[1], 0) + 1
                each.replicas.append(Replica(f"{name}#{self.starts}", self.at + LOAD_SECONDS))
            self._end(each.staying[::-1][: max(0, present - wanted)], is_idle=not self.queues.get(key))

    def _end(self, replicas: list[Replica], *, is_idle: bool = False) -> None:
        for one in replicas:
            one.ends_at = self.at + (0 if is_idle else DRAIN_SECONDS)

    def _send(self) -> None:
        """Gateways follow a tick late."""
        for name, rate in self.rates.items():
            entry = self.followed.get(name)
            for _ in range(rate if entry is not None and entry.accepts else 0):
                assert entry is not None
                self.queues.setdefault((name, self._drawn(entry)), []).append(entry.cohort)
                if entry.shadow and self.random.random() * WHOLE < entry.shadow_share:
                    self._pair(name, entry)
        self.followed = dict(self.entries)

    def _drawn(self, entry: ModelEntry) -> str:
        point, last = self.random.random() * WHOLE, ""
        for last, share in entry.revisions.items():
            if point < share:
                return last
            point -= share
        return last

    def _pair(self, name: str, entry: ModelEntry) -> None:
        stable = next(iter(entry.revisions))
        ends = [int(self.random.random() < self._fault(f"x--{it}").errors) for it in (stable, entry.shadow)]
        tally = self.outcomes.setdefault((name, entry.shadow), {}).setdefault(entry.cohort, Tally())
        pair = f"{ends[0]}{ends[1]}"
        tally.pairs[pair] = tally.pairs.get(pair, 0) + 1

    def _work(self) -> None:
        for name, each in self.standing.items():
            key, fault = _key(name), self._fault(name)
            ready = [one for one in each.staying if one.ready_at <= self.at]
            if fault.lost and ready and self.random.random() < fault.lost:
                each.replicas.remove(ready.pop())
                self._count(key, self.entries[key[0]].cohort, "lost")
            queue = self.queues.get(key, [])
            done, self.queues[key] = queue[: len(ready) * SLOTS * WORK], queue[len(ready) * SLOTS * WORK :]
            for cohort in done:
                self._finish(key, cohort, fault)

    def _finish(self, key: RevisionKey, cohort: str, fault: Fault) -> None:
        self.failed.setdefault(key[1], 0)
        if self.random.random() < fault.errors:
            self.failed[key[1]] += 1
            self._count(key, cohort, "error")
            return
        self._count(key, cohort, "ok")
        if fault.end:
            self._count(key, cohort, fault.end)
        tally = self.outcomes[key][cohort]
        bucket = bucket_of(self.random.uniform(0.1, 0.2) * fault.slow)
        tally.first_token[bucket] = tally.first_token.get(bucket, 0) + 1

    def _count(self, key: RevisionKey, cohort: str, end: str) -> None:
        tally = self.outcomes.setdefault(key, {}).setdefault(cohort, Tally())
        tally.ends[end] = tally.ends.get(end, 0) + 1

    def _fault(self, application: str) -> Fault:
        return self.faults.get(_key(application)[1], Fault())

    # What holds at all times ----------------------------------------------------------------------------

    def _look_at(self, plan: PoolPlan, seen: Observation) -> None:
        for name, record in plan.records.items():
            before = self.records.get(name)
            assert not record.weights or sum(record.weights.values()) == WHOLE
            assert set(record.weights) <= set(record.revisions), "traffic of a revision that is not recorded"
            entry = plan.entries[name]
            assert sum(entry.revisions.values()) in (0, WHOLE)
            if record.rollout is not None and record.rollout.strategy != "AllAtOnce":
                self._look_at_step(name, record, before, seen)
        self._look_at_replicas()

    def _look_at_step(
        self, name: str, record: ModelRecord, before: ModelRecord | None, seen: Observation
    ) -> None:
        state = record.rollout
        assert state is not None
        past = before.rollout if before is not None else None
        is_same = past is not None and past.id == state.id
        weight = record.weights.get(state.target, 0)
        had = before.weights.get(state.target, 0) if before is not None else 0
        if state.is_refused:
            assert weight == 0, "what was given up has traffic"
        if not state.stable or weight <= had or state.phase == "Aborted":
            return
        if state.phase == "Completed" and not is_same:
            return  # a change that was taken back
        is_undo = record.pinned is not None and record.pinned.revision == state.target
        assert is_same or is_undo, "traffic before the first look"
        needed = max(1, math.ceil(max(1, state.size) * weight / WHOLE))
        spec = next(each for each in self.models if each.name == name).spec
        if state.size <= spec.scaling.max_replicas:
            assert seen.ready_replicas(name, state.target) >= needed, "a weight before its replicas"
        found = judge(
            _own(self.outcomes.get((name, state.stable), {}), state.id),
            _own(self.outcomes.get((name, state.target), {}), state.id),
            state.id,
            state.thresholds,
            Limits(),
            slowdown=(spec.rollout or RolloutSpec()).allowed_slowdown,
        )
        assert is_undo or found.verdict != "fails", "a failed gate has raised a weight"
        if past is not None and past.phase == "Progressing" and state.skipped != past.step:
            rules = spec.rollout
            held = max(0.0, self.now - past.step_since)  # the clock may have been set back
            assert held >= past.steps[past.step].hold_seconds, "a hold was forgotten"
            if rules is not None and not is_undo:
                assert found.clean >= rules.least_requests, "silence has raised a weight"
                assert not past.steps[past.step].pause or state.released == past.step, "a pause was forgotten"

    def _look_at_replicas(self) -> None:
        for each in self.models:
            rules, name = each.spec.rollout, each.name
            mine = [one for key, one in self.standing.items() if _key(key)[0] == name]
            held = [each for one in mine for each in one.replicas]
            count = sum(each.ends_at is None or each.ends_at > self.at for each in held)
            self.peaks[name] = max(self.peaks.get(name, 0), count)
            if rules is not None and rules.max_surge is not None:
                most = each.spec.scaling.max_replicas + rules.max_surge
                assert count <= most, f"{count} replicas where {most} are allowed"
            self._look_at_gpus(each)
            record = self.records.get(name)
            state = record.rollout if record is not None else None
            if rules is None or state is None or state.has_ended or not state.stable:
                continue
            is_lossy = self._fault(f"{name}--{state.stable}").lost
            if state.phase in ("Shadow", "Progressing") and not is_lossy:
                stable = self.standing.get(f"{name}--{state.stable}")
                staying = len(stable.staying) if stable is not None else 0
                assert staying >= rules.min_available, "the stable is below minAvailable"
                kept = staying * self.shares.get(state.stable, 0.0)
                assert kept >= rules.min_available_accelerators - 1e-9, "below minAvailableAccelerators"

    def _look_at_gpus(self, each: Model) -> None:
        """By what Ray is asked for, whatever the records say. One revision alone may have all that it may
        have, so the larger one's share counts, and also that of what has not gone yet. A bound that was made
        smaller takes nothing away; nothing more may start."""
        held = 0.0
        rolling = set[str]()
        for key, one in self.standing.items():
            if _key(key)[0] == each.name:
                share = one.config["deployments"][0]["ray_actor_options"]["num_gpus"]
                self.shares[_key(key)[1]] = share
                rolling.add(_key(key)[1])
                held += share * sum(it.ends_at is None or it.ends_at > self.at for it in one.replicas)
        before, self.held_gpus[each.name] = self.held_gpus.get(each.name, 0.0), held
        self.gpu_peaks[each.name] = max(self.gpu_peaks.get(each.name, 0.0), held)
        rules = each.spec.rollout
        if rules is None or rules.max_surge_accelerators is None or held <= before:
            return
        largest = max((self.shares[revision] for revision in rolling), default=0.0)
        most = each.spec.scaling.max_replicas * largest + rules.max_surge_accelerators
        assert held <= most + 1e-9, f"{held:g} GPU where {most:g} are allowed"


def _own(outcomes: Outcomes, rollout: str) -> Outcomes:
    return {cohort: tally for cohort, tally in outcomes.items() if cohort.rpartition(".")[0] == rollout}


def _key(name: str) -> RevisionKey:
    key = split_application_name(name)
    assert key is not None
    return key
