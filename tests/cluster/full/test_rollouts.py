"""Rollouts on the whole cluster, under requests by the official client: every way in which a revision is bad,
each found by its own gate; good ones; an operator that is killed at each step; two Models in a Pool with room
for one; and both revisions in need of more replicas.

The replicas are simulated and take shares of a GPU that the node only says it has. They follow each other
on one Model: what one leaves serving is what the next is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from loadtests.bad_revisions import CHANGES, MODEL, spec
from loadtests.steady import Call, SteadyLoad
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NAMESPACES
from tests.cluster.full.figures import Figures
from tests.cluster.full.rolling import Rollouts, Seen
from tests.cluster.release import Release, resource
from tests.in_thread import in_thread
from tests.waiting import wait_until

POOL = "rolling"
RATE = 20.0  # requests a second
BASELINE_REQUESTS = 300  # of the stable one, before it is compared with another
# Of its steps none is over before the errors of 5 % of the requests have had their time.
DEFAULT_STEPS = [{"weight": 15}, {"weight": 50}, {"weight": 100}]
SHORT_STEPS = [{"weight": weight, "holdSeconds": 10} for weight in (15, 50, 100)]
SURGE = {"maxSurge": 1}
ONE_REPLICA = {"minReplicas": 1, "maxReplicas": 1}
MOST_ACCELERATORS = 0.6  # with 0.3 a replica: as many as both revisions may have together
GATES: Mapping[str, set[str]] = {
    "crashes at load": {"load"},
    "a probe answered wrongly": {"probes"},
    "5 % errors": {"errors"},
    "three times as long": {"firstToken", "betweenTokens"},
    "empty answers": {"abnormalEnds"},
    "5 % errors with a shadow": {"shadow"},
    "40 % errors as BlueGreen": {"errors"},
}
UNTOUCHED = ("crashes at load", "a probe answered wrongly", "5 % errors with a shadow")
GOOD = ("good as Recreate", "good as BlueGreen", "good")

pytestmark = pytest.mark.timeout(600)


@dataclass
class Stage:
    release: Release
    rollouts: Rollouts
    figures: Figures
    load: SteadyLoad
    probe: str = ""

    def apply(self, name: str = MODEL, change: Mapping[str, Any] | None = None, **more: Any) -> None:
        """A Model with a change of `CHANGES`, and with more of its spec set."""
        place = {"pool": POOL, "resources": {"gpuMemory": "7Gi"}, "scaling": ONE_REPLICA}
        body = {**spec(change or {}, self.probe), **place, **more}
        self.release.apply(resource("Model", name, body))

    def wait_for_baseline(self) -> None:
        """Until the revision that serves has answered enough to be compared with."""
        began = time.time()
        wait_until(lambda: sum(_is_good(call, began) for call in self.load.calls) >= BASELINE_REQUESTS, 180)

    @contextmanager
    def watched(self, row: str) -> Iterator[Seen]:
        """A rollout of the Model that begins in the block; its figures, once all that it touched is over."""
        self.wait_for_baseline()
        with self.rollouts.followed(MODEL) as seen:
            yield seen[MODEL]
        ended = time.time()
        wait_until(lambda: all(call.ended for call in self.calls_of(seen[MODEL], ended)), 120)
        seen[MODEL].tell(self.figures, row, self.calls_of(seen[MODEL], time.time()))

    def calls_of(self, seen: Seen, until: float) -> list[Call]:
        return list(self.load.between(seen.changed, until))


def _is_good(call: Call, began: float) -> bool:
    return call.began > began and bool(call.ended) and not call.is_bad


@pytest.fixture(autouse=True)
def told_on_failure(request: pytest.FixtureRequest, shared_release: Release) -> None:
    request.node.stash[NAMESPACES] = [shared_release.namespace]


@pytest.fixture(scope="module")
def stage(cluster: Cluster, shared_release: Release, figures: Figures) -> Iterator[Stage]:
    release = shared_release
    pool = {
        "head": {"cpus": "500m", "memory": "3Gi"},
        "groups": [{"name": "gpu", "gpus": 1, "gpuMemory": "24Gi", "memory": "4Gi", "maxWorkers": 1}],
        "maxLiveRevisions": 8,
        "faultTolerance": {"enabled": False},
    }
    with cluster.offering_gpus(1):
        release.apply(resource("Pool", POOL, pool))
        try:
            release.wait_for_pool(POOL)
            load = SteadyLoad(release.address, release.key, MODEL, RATE)
            stage = Stage(release, Rollouts(cluster, release, POOL), figures, load)
            stage.apply()
            release.wait_for(MODEL, "Ready", reason="Serving")
            question = spec({}, "x")["rollout"]["probes"][0]
            stage.probe = _completion(release, question["prompt"], question["maxTokens"])
            with in_thread(load.running()):
                yield stage
        finally:
            for item in cluster.get_all("models", release.namespace):
                if item["spec"].get("pool") == POOL:
                    cluster.delete("model", item["metadata"]["name"], release.namespace)
            cluster.delete("pool", POOL, release.namespace)


def _completion(release: Release, prompt: str, max_tokens: int) -> str:
    """What the first revision says, greedily: the others must say it as well."""
    with release.client() as client:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0)
    return answer.choices[0].text


@pytest.mark.parametrize("name", GATES)
def test_a_bad_revision_is_aborted_by_its_own_gate(stage: Stage, name: str) -> None:
    stable = stage.release.status(MODEL)["revision"]
    change = dict(CHANGES[name])
    change["rollout"] = {**SURGE, "steps": DEFAULT_STEPS, **change.get("rollout", {})}
    with stage.watched(name) as seen:
        stage.apply(change=change)
    assert seen.view["phase"] == "Aborted", seen.view
    assert seen.failed_gates & GATES[name], seen.view["gates"]
    assert seen.view["stable"] == stable
    calls = stage.calls_of(seen, time.time())
    bad = [call for call in calls if call.is_bad]
    assert all(call.revision in ("", seen.view["target"]) for call in bad), bad
    assert len(bad) <= len(calls) * seen.weight / 100
    if name in UNTOUCHED:
        assert not bad
        assert seen.weight == 0
    assert seen.accelerators <= MOST_ACCELERATORS
    assert stage.release.wait_for(MODEL, "Ready", reason="Serving")
    assert stage.release.status(MODEL)["revision"] == stable


@pytest.mark.parametrize("name", GOOD)
def test_a_good_revision_goes_out_and_nobody_notices(stage: Stage, name: str) -> None:
    change = dict(CHANGES[name])
    change["rollout"] = {**SURGE, "steps": SHORT_STEPS, **change.get("rollout", {})}
    with stage.watched(name) as seen:
        stage.apply(change=change)
    assert seen.view["phase"] == "Completed", seen.view
    assert seen.weights == sorted(seen.weights)
    assert [call for call in stage.calls_of(seen, time.time()) if call.is_bad] == []
    assert seen.accelerators <= MOST_ACCELERATORS


def test_an_operator_that_is_killed_at_each_step_goes_on(stage: Stage) -> None:
    change = {"args": {"answer_tokens": 70}, "rollout": {"steps": SHORT_STEPS}}
    with stage.watched("good, with the operator killed at each step") as seen:
        before = stage.rollouts.views()[MODEL]["id"]
        stage.apply(change=change)
        stage.rollouts.wait_for(MODEL, "another rollout", lambda view: view["id"] != before)
        for weight in (0, 15, 50, 100):
            stage.rollouts.wait_for(MODEL, f"{weight} %", partial(_has, weight))
            _kill_leader(stage.release)
    assert seen.view["phase"] == "Completed", seen.view
    assert seen.weights == sorted(seen.weights)
    assert {15, 50, 100} <= set(seen.weights)
    assert [call for call in stage.calls_of(seen, time.time()) if call.is_bad] == []


def test_an_operator_that_is_killed_loses_no_evidence(stage: Stage) -> None:
    """The bad one has its share when the operator goes; the other one finds it."""
    change = {"args": {"test_error_share": 0.1}, "rollout": {"steps": DEFAULT_STEPS}}
    with stage.watched("10 % errors, with the operator killed in the first step") as seen:
        before = stage.rollouts.views()[MODEL]["id"]
        stage.apply(change=change)
        stage.rollouts.wait_for(MODEL, "its share", lambda view: view["id"] != before and view["weight"] > 0)
        _kill_leader(stage.release)
    assert seen.view["phase"] == "Aborted", seen.view
    assert seen.failed_gates == {"errors"}
    assert seen.weights[:2] == [0, 15]
    assert seen.weights[-1] == 0


def test_two_models_roll_in_a_pool_with_room_for_one(stage: Stage) -> None:
    """Both take 0.6 of the GPU, and each needs 0.3 more while it rolls."""
    other = "reader"
    by_the_clock = {"steps": SHORT_STEPS, "minRequests": 0}
    stage.apply(other, {"rollout": by_the_clock})
    stage.release.wait_for(other, "Ready", reason="Serving")
    stage.wait_for_baseline()
    with stage.rollouts.followed(MODEL, other) as both:
        stage.apply(MODEL, {"args": {"answer_tokens": 71}, "rollout": by_the_clock})
        stage.apply(other, {"args": {"answer_tokens": 71}, "rollout": by_the_clock})
    first, second = both[MODEL], both[other]
    first.tell(stage.figures, "two Models, room for one: the first", stage.calls_of(first, time.time()))
    second.tell(stage.figures, "two Models, room for one: the second", [])
    assert {first.view["phase"], second.view["phase"]} == {"Completed"}
    assert (first.positions, max(second.positions)) == ({0}, 1)
    assert first.accelerators <= 1.0
    assert second.stepped > first.ended
    assert [call for call in stage.calls_of(first, time.time()) if call.is_bad] == []
    stage.release.cluster.delete("model", other, stage.release.namespace)


def test_both_revisions_scale_by_their_own_load(stage: Stage) -> None:
    name, rollout = "elastic", {"steps": [{"weight": 50, "pause": True, "holdSeconds": 0}, {"weight": 100}]}
    small: dict[str, Any] = {
        "resources": {"gpuMemory": "1Gi"},
        "scaling": {"minReplicas": 1, "maxReplicas": 8, "scaleDownSeconds": 1},
    }

    def apply(tokens: int) -> None:
        body = spec({"args": {"step_ms": 40, "answer_tokens": tokens}, "rollout": rollout}, "")
        body["engine"]["maxSlots"] = 2
        stage.apply(name, **{**body, **small})

    apply(64)
    stage.release.wait_for(name, "Ready", reason="Serving")
    before = stage.release.status(name)["revision"]
    apply(65)
    stage.rollouts.wait_for(
        name, "half of the requests", lambda view: view["stable"] == before and view["weight"] == 50
    )

    def are_ready(view: dict[str, Any], least: int, most: int) -> bool:
        ready = [int(each.partition("/")[0]) for each in view["replicas"].values()]
        return len(ready) == 2 and all(least <= each <= most for each in ready)

    # Six answers at a time: three for each revision, whose replicas have two slots.
    load = SteadyLoad(stage.release.address, stage.release.key, name, 10.0)
    with in_thread(load.running()):
        stage.rollouts.wait_for(name, "both have more replicas", lambda view: are_ready(view, 2, 8))
    stage.rollouts.wait_for(name, "both have one again", lambda view: are_ready(view, 1, 1))
    assert not [call for call in load.calls if call.is_bad]
    stage.release.cluster.delete("model", name, stage.release.namespace)


def test_a_change_that_is_taken_back_starts_nothing(stage: Stage) -> None:
    name = "back"
    rollout = {"steps": [{"weight": 50, "pause": True}, {"weight": 100}]}
    one = {"args": {"answer_tokens": 64}, "rollout": rollout}
    stage.apply(name, one)
    stage.release.wait_for(name, "Ready", reason="Serving")
    first, before = stage.release.status(name)["revision"], stage.rollouts.replicas(name)
    stage.apply(name, {"args": {"answer_tokens": 65}, "rollout": rollout})
    stage.rollouts.wait_for(name, "half of the requests", lambda view: view["weight"] == 50)
    stage.apply(name, one)
    stage.release.cluster.wait_for("only the first stands", lambda: len(stage.rollouts.replicas(name)) == 1)
    assert stage.rollouts.replicas(name) == before
    assert stage.release.status(name)["revision"] == first
    stage.release.cluster.delete("model", name, stage.release.namespace)


def _has(weight: int, view: dict[str, Any]) -> bool:
    return bool(view["weight"] == weight)


def _kill_leader(release: Release) -> None:
    release.kill(release.cluster.wait_for("an operator leads", release.leader))
