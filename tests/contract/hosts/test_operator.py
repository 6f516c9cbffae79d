"""What only the operator does: objects of Kubernetes, and Ray clusters that come and go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.contract.hosts.rigs import OperatorRig, condition, entry, rounds
from tests.contract.hosts.test_hosts import SETTLED, revisions_in_serve, serving
from tidegate.control.plan import DRAIN_LIMIT_SECONDS
from tidegate.errors import QueueRefused
from tidegate_operator.cluster import ApiEnding, ApiError, Object
from tidegate_operator.decision import FINALIZER
from tidegate_operator.ray_state import STUCK_SECONDS


@pytest.fixture
def rig() -> OperatorRig:
    return OperatorRig()


def body(rig: OperatorRig, name: str) -> Object:
    found = rig.api.get("Model", name)
    assert found is not None
    return found


def clusters(rig: OperatorRig) -> list[str]:
    """The RayClusters that stand, oldest first."""
    found = [item for kind, item in rig.api.everything() if kind == "RayCluster"]
    return [item["metadata"]["name"] for item in found]


def positions(rig: OperatorRig, what: str, name: str) -> list[int]:
    return [at for at, item in enumerate(rig.journal) if item[0].startswith(what) and _names(item[1], name)]


def _names(value: object, name: str) -> bool:
    if isinstance(value, list):
        return any(each.startswith(f"{name}--") for each in value)
    return name in (value, getattr(value, "name", None))


async def test_a_model_is_held_before_anything_of_it_runs(rig: OperatorRig) -> None:
    rig.model("one")
    await rounds(rig, SETTLED)
    held, status = positions(rig, "Model finalizers", "one"), positions(rig, "Model status", "one")
    assert held[0] < status[0] < positions(rig, "PUT", "one")[0]
    assert len(held) == 1
    assert body(rig, "one")["metadata"]["finalizers"] == [FINALIZER]


async def test_each_transition_is_an_event(rig: OperatorRig) -> None:
    rig.faults.broken.add("bad")
    rig.model("bad")
    await serving(rig)
    events = [item for kind, item in rig.api.everything() if kind == "Event"]
    told = {(each["regarding"]["name"], each["action"], each["reason"], each["type"]) for each in events}
    assert ("one", "ReadyTrue", "Serving", "Normal") in told
    assert ("bad", "DegradedTrue", "RevisionFailed", "Warning") in told
    assert ("default", "ReadyTrue", "ClusterReady", "Normal") in told


async def test_a_deleted_model_stays_until_its_requests_have_ended(rig: OperatorRig) -> None:
    revision = await serving(rig)
    rig.store.waiting[("one", revision)] = 1
    rig.remove("one")
    await rounds(rig, SETTLED)
    assert rig.condition("Model", "one", "Ready").reason == "Deleting"
    assert not entry(rig, "one").accepts
    assert revisions_in_serve(rig, "one") == {revision}
    rig.store.waiting.clear()
    await rounds(rig, 2)
    assert rig.api.get("Model", "one") is None
    assert "one" not in rig.store.entries


async def test_in_a_namespace_that_ends_nobody_is_waited_for(rig: OperatorRig) -> None:
    """The rights there go with everything else, so there is one moment to take the finalizer away."""
    revision = await serving(rig)
    rig.store.waiting[("one", revision)] = 1
    rig.api.refused["Event"] = ApiEnding("models is being terminated")
    rig.model("two")  # its first Event is refused
    await rounds(rig, 2)
    for name in ("one", "two"):
        assert body(rig, name)["metadata"]["finalizers"] == [], "before it is deleted itself"
        assert name not in rig.store.entries
    assert clusters(rig) == []
    rig.remove("one")
    assert rig.api.get("Model", "one") is None


async def test_a_deleted_model_goes_in_any_case_when_its_time_is_over(rig: OperatorRig) -> None:
    revision = await serving(rig)
    rig.store.waiting[("one", revision)] = 1
    rig.remove("one")
    rig.clock.now += DRAIN_LIMIT_SECONDS
    await rounds(rig, 2)
    assert rig.api.get("Model", "one") is None
    assert revisions_in_serve(rig, "one") == set()


async def test_an_invalid_change_leaves_what_ran_and_both_say_so(rig: OperatorRig) -> None:
    revision = await serving(rig)
    rig.model("one", scaling={"minReplicas": 3, "maxReplicas": 2})
    await rounds(rig, 3)
    assert entry(rig, "one").revisions == {revision: 100}
    for found in (condition(rig, "one", "ConfigValid"), rig.condition("Model", "one", "ConfigValid")):
        assert (found.status, found.reason) == ("False", "InvalidConfig")
        assert "minReplicas (3) is above maxReplicas (2)" in found.message
    rig.journal.clear()
    await rounds(rig, 3)
    assert rig.journal == []
    rig.model("one")
    await rounds(rig, 3)
    assert condition(rig, "one", "ConfigValid").status == "True"


async def test_a_model_that_was_never_valid_is_told_and_can_go(rig: OperatorRig) -> None:
    rig.model("one", scaling={"minReplicas": 3, "maxReplicas": 2})
    await rounds(rig, 3)
    assert rig.condition("Model", "one", "Ready").reason == "InvalidConfig"
    assert not body(rig, "one")["metadata"].get("finalizers"), "nothing runs that could drain"
    assert "one" not in rig.store.entries
    rig.remove("one")
    assert rig.api.get("Model", "one") is None


async def test_a_write_of_another_is_seen_before_the_next_decision(rig: OperatorRig) -> None:
    await serving(rig)
    rig.model("one", scaling={"minReplicas": 1, "maxReplicas": 3})
    newest = body(rig, "one")
    # The watch is late: the cache has the version before.
    rig.cache.drop("Model", newest)
    older = {**newest, "metadata": {**newest["metadata"], "resourceVersion": "1", "generation": 1}}
    rig.cache.put("Model", {**older, "status": {}})
    await rig.round()
    assert rig.conflicts == 1
    await rounds(rig, 3)
    assert body(rig, "one")["status"]["observedGeneration"] == newest["metadata"]["generation"]
    assert entry(rig, "one").ready


async def test_a_redis_that_refuses_us_is_not_said_to_come_back(rig: OperatorRig) -> None:
    rig.store.is_away = True
    rig.store.away = QueueRefused("redis_url: redis:6379 refuses the user or the password: WRONGPASS")
    rig.model("one")
    await rounds(rig, 2)
    for told in (rig.condition("Model", "one", "Ready"), rig.condition("Pool", "default", "Ready")):
        assert told.reason == "RedisRefused"
        assert "WRONGPASS" in told.message
        assert "by itself" not in told.message
    rig.store.is_away = False
    await rounds(rig, SETTLED)
    assert entry(rig, "one").ready


async def test_without_redis_every_object_says_so_and_ray_still_comes_up(rig: OperatorRig) -> None:
    rig.store.is_away = True
    rig.model("one")
    await rounds(rig, 2)
    assert rig.condition("Model", "one", "Ready").reason == "RedisUnreachable"
    assert rig.condition("Pool", "default", "Ready").reason == "RedisUnreachable"
    assert body(rig, "one")["metadata"]["finalizers"] == [FINALIZER]
    assert len(clusters(rig)) == 1
    rig.store.is_away = False
    await rounds(rig, SETTLED)
    assert rig.condition("Model", "one", "Ready").reason == "Serving"
    assert rig.condition("Pool", "default", "Ready").reason == "ClusterReady"


async def test_a_head_that_does_not_answer_is_told(rig: OperatorRig) -> None:
    await serving(rig)
    rig.serve.is_away = True
    await rounds(rig, 2)
    ready = rig.condition("Pool", "default", "Ready")
    assert (ready.status, ready.reason, ready.message) == ("False", "ServeUnavailable", "Serve is away.")
    assert rig.condition("Model", "one", "Degraded").reason == "ServeUnavailable"


async def test_a_cluster_without_kuberay_is_told_and_no_ray_cluster_made(rig: OperatorRig) -> None:
    rig.cache.missing.add("RayCluster")
    rig.model("one")
    await rounds(rig, 2)
    assert clusters(rig) == []
    assert rig.condition("Pool", "default", "Ready").reason == "KubeRayMissing"
    assert rig.condition("Model", "one", "Ready").reason == "KubeRayMissing"


async def test_a_model_that_went_undrained_is_swept_from_the_registry(rig: OperatorRig) -> None:
    """Somebody took the finalizer off by hand."""
    await serving(rig)
    await serving(rig, "two")
    rig.api.put("Model", {**body(rig, "one"), "metadata": {**body(rig, "one")["metadata"], "finalizers": []}})
    rig.remove("one")
    await rig.reconciler.sweep()
    assert list(rig.store.entries) == ["two"]


async def test_tidying_lets_go_only_what_is_gone(rig: OperatorRig) -> None:
    await serving(rig)
    (old,) = clusters(rig)
    await rig.reconciler.tidy()
    assert not rig.serves[old].is_closed
    rig.delete("RayCluster", old)
    await rig.reconciler.tidy()
    assert rig.serves[old].is_closed
    rig.serves.clear()
    await rounds(rig, SETTLED)
    assert entry(rig, "one").ready


# Pools -----------------------------------------------------------------------------------------------------


async def test_without_its_pool_a_model_is_refused_and_can_still_go(rig: OperatorRig) -> None:
    await serving(rig)
    await serving(rig, "two")
    rig.delete("Pool", "default")
    await rounds(rig, 2)
    assert rig.condition("Model", "one", "Ready").reason == "NoSuchPool"
    assert (entry(rig, "one").accepts, entry(rig, "one").reason) == (False, "NoSuchPool")
    rig.journal.clear()
    await rounds(rig, 3)
    assert rig.journal == []
    # One that is deleted waits for Redis, or gateways would go on reading of it.
    rig.store.is_away = True
    rig.remove("one")
    await rounds_without_pool(rig, 2)
    assert rig.api.get("Model", "one") is not None
    rig.store.is_away = False
    await rounds(rig, 2)
    assert rig.api.get("Model", "one") is None
    assert list(rig.store.entries) == ["two"]
    rig.declare("Pool", "default", {})
    await rounds(rig, SETTLED)
    assert entry(rig, "two").ready


async def rounds_without_pool(rig: OperatorRig, count: int) -> None:
    """With Redis away there is no Pool that could say so."""
    for _ in range(count):
        rig.clock.now += 1
        await rig.reconciler.reconcile(("default", "default"))


async def test_a_refused_change_of_the_pool_leaves_it_as_it_was(rig: OperatorRig) -> None:
    await serving(rig)
    rig.declare("Pool", "default", {"maxLiveRevisions": 0})
    await rounds(rig, 3)
    degraded = rig.condition("Pool", "default", "Degraded")
    assert (degraded.status, degraded.reason) == ("True", "InvalidConfig")
    assert rig.condition("Pool", "default", "Ready").status == "True"
    assert entry(rig, "one").ready
    rig.start()
    rig.journal.clear()
    await rounds(rig, 2)
    assert rig.condition("Pool", "default", "Ready").reason == "InvalidConfig"
    assert not [what for what, _ in rig.journal if what.startswith(("PUT", "put_model", "RayCluster"))]


async def test_bounds_of_workers_change_in_place(rig: OperatorRig) -> None:
    await serving(rig)
    rig.declare("Pool", "default", {"workerIdleSeconds": 777})
    rig.journal.clear()
    await rounds(rig, 3)
    assert [what for what, _ in rig.journal if what.startswith("RayCluster")] == ["RayCluster patch"]
    (name,) = clusters(rig)
    found = rig.api.get("RayCluster", name)
    assert found is not None
    assert found["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] == 777


NEW_PODS: Mapping[str, Any] = {"env": [{"name": "A", "value": "b"}], "maxUnbuilt": 1}


async def test_with_surge_models_move_one_by_one_and_serve_throughout(rig: OperatorRig) -> None:
    for name in ("one", "two", "three"):
        await serving(rig, name)
    (old,) = clusters(rig)
    rig.journal.clear()
    rig.declare("Pool", "default", NEW_PODS)
    for _ in range(2 * SETTLED):
        await rig.round()
        assert all(entry(rig, name).ready for name in ("one", "two", "three"))
        held = set(rig.serves[old].configs).union(*(serve.configs for serve in rig.serves.values()))
        assert len(held) == 3, "each stands on one cluster at least"
    (new,) = clusters(rig)
    assert new != old
    assert len(rig.serves[new].configs) == 3
    # It left the old one bit by bit, which went last.
    sizes = [len(value) for what, value in rig.journal if what == f"PUT {old}" and isinstance(value, list)]
    assert sizes == [2, 1, 0]
    assert positions(rig, "RayCluster delete", old)[0] > max(
        at for at, (what, _) in enumerate(rig.journal) if what == f"PUT {old}"
    )


async def test_what_a_retiring_cluster_does_not_take_is_sent_again(rig: OperatorRig) -> None:
    await serving(rig)
    (old,) = clusters(rig)
    rig.serves[old].is_deaf = True
    rig.declare("Pool", "default", NEW_PODS)
    await rounds(rig, SETTLED)
    assert old in clusters(rig), "it still holds a replica"
    assert entry(rig, "one").ready
    rig.serves[old].is_deaf = False
    await rounds(rig, SETTLED)
    assert old not in clusters(rig)


async def test_with_recreate_the_old_cluster_goes_first(rig: OperatorRig) -> None:
    await serving(rig)
    (old,) = clusters(rig)
    rig.declare("Pool", "default", {**NEW_PODS, "upgrade": "Recreate"})
    rig.journal.clear()
    await rounds(rig, SETTLED)
    (new,) = clusters(rig)
    assert positions(rig, "RayCluster delete", old)[0] < positions(rig, "RayCluster apply", new)[0]
    assert entry(rig, "one").ready
    assert entry(rig, "one").accepts


async def test_a_ray_cluster_that_kuberay_cannot_clean_up_after_is_freed(rig: OperatorRig) -> None:
    await serving(rig)
    (old,) = clusters(rig)
    found = rig.api.get("RayCluster", old)
    assert found is not None
    rig.api.put(
        "RayCluster", {**found, "metadata": {**found["metadata"], "finalizers": ["ray.io/x", "me/x"]}}
    )
    rig.delete("RayCluster", old)
    await rounds(rig, 2)
    rig.clock.now += STUCK_SECONDS
    await rig.round()
    stuck = rig.api.get("RayCluster", old)
    assert stuck is not None
    assert stuck["metadata"]["finalizers"] == ["me/x"]


# Sources ---------------------------------------------------------------------------------------------------


async def test_what_a_quota_refuses_is_told_in_its_words_and_tried_again(rig: OperatorRig) -> None:
    rig.declare("Pool", "default", {"weightCache": {"claim": "weights"}})
    source = {"engine": {"name": "transformers"}, "source": {"uri": "hf://owner/name@main"}}
    rig.declare("Model", "one", source)
    quota = "exceeded quota: small, requested: count/{0}=1, used: count/{0}=2, limited: count/{0}=2"
    rig.api.refused = {
        "Job": ApiError(quota.format("jobs.batch")),
        "RayCluster": ApiError(quota.format("rayclusters.ray.io")),
    }
    await rounds(rig, 3)
    of_pool, of_model = rig.condition("Pool", "default", "Ready"), rig.condition("Model", "one", "Ready")
    assert (of_pool.reason, of_model.reason) == ("PodsRefused", "PodsRefused")
    assert rig.api.refused["RayCluster"].message in of_pool.message
    assert rig.api.refused["Job"].message in of_model.message
    weights = rig.condition("Model", "one", "WeightsAvailable")
    assert (weights.status, weights.reason) == ("False", "PodsRefused")
    rig.journal.clear()
    await rounds(rig, 3)
    assert rig.journal == [], "the same is not written again"
    rig.api.refused = {}
    await rounds(rig, SETTLED)
    assert len(clusters(rig)) == 1
    assert rig.condition("Pool", "default", "Ready").reason == "ClusterReady"
    assert rig.condition("Model", "one", "WeightsAvailable").reason == "Resolving"


async def test_a_source_is_resolved_by_one_job_and_its_answer_kept(rig: OperatorRig) -> None:
    rig.declare("Pool", "default", {"weightCache": {"claim": "weights"}})
    source = {"engine": {"name": "transformers"}, "source": {"uri": "hf://owner/name@main"}}
    rig.declare("Model", "one", source)
    await rounds(rig, SETTLED)
    jobs = [item for kind, item in rig.api.everything() if kind == "Job"]
    assert len(jobs) == 1
    assert jobs[0]["metadata"]["ownerReferences"][0]["uid"] == body(rig, "one")["metadata"]["uid"]
    assert rig.condition("Model", "one", "WeightsAvailable").reason == "Resolving"
    answer = {
        "path": "/var/lib/tidegate/weights/x",
        "weights_bytes": 1000,
        "quantization": "none",
        "precision": "float16",
        "shape": {"layers": 2, "kv_heads": 1, "head_dim": 8, "hidden": 16, "vocab": 9, "positions": 64},
    }
    name = jobs[0]["metadata"]["name"]
    ended = {"name": "resolve", "state": {"terminated": {"exitCode": 0, "message": json.dumps(answer)}}}
    pod = {
        "apiVersion": "v1",
        "metadata": {"name": f"{name}-x", "namespace": "default", "labels": {"job-name": name}},
        "status": {"phase": "Succeeded", "containerStatuses": [ended]},
    }
    rig.api.put("Pod", pod)
    await rounds(rig, SETTLED)
    assert entry(rig, "one").ready
    # The Job goes by itself, its pod first: the answer is in the records.
    rig.api.remove("Pod", f"{name}-x")
    rig.api.remove("Job", name)
    rig.journal.clear()
    await rounds(rig, 3)
    assert rig.journal == []


async def test_a_wrong_action_is_told_once_and_taken_off(rig: OperatorRig) -> None:
    await serving(rig)
    await rig.api.annotate("Model", body(rig, "one"), {"tidegate.dev/rollout": "stop"}, "kubectl-annotate")
    await rounds(rig, 3)
    (event,) = (
        item for kind, item in rig.api.everything() if kind == "Event" and item["reason"] == "InvalidAction"
    )
    assert event["type"] == "Warning"
    assert "use pause, resume, promote, abort" in event["note"]
    assert body(rig, "one")["metadata"]["annotations"] == {}


async def test_an_action_stays_until_the_record_is_written(rig: OperatorRig) -> None:
    """A status that the API server refuses leaves it where it is."""
    await serving(rig)
    await rig.api.annotate("Model", body(rig, "one"), {"tidegate.dev/rollout": "restart"}, "kubectl-annotate")
    rig.store.is_away = True
    await rounds(rig, 2)
    assert body(rig, "one")["metadata"]["annotations"] == {"tidegate.dev/rollout": "restart"}
    rig.store.is_away = False
    await rounds(rig, 2)
    assert body(rig, "one")["metadata"]["annotations"] == {}
