from typing import Any

from tests.unit.operator.bodies import NOW, cluster_body, pod_body, stamp
from tidegate.control.observed import Worker
from tidegate_operator import ray_state

HEAD = {"ray.io/cluster": "default-a", "ray.io/node-type": "head"}
READY = {"conditions": [{"type": "Ready", "status": "True"}]}


def test_the_head_service_is_kuberays_own_word_for_it() -> None:
    told = cluster_body("a", status={"head": {"serviceName": "short-head-svc"}})
    assert ray_state.head_service(told) == "short-head-svc"
    assert ray_state.head_service(cluster_body("a")) == "default-a-head-svc"


def test_only_a_ready_head_that_stays_counts() -> None:
    assert ray_state.head_is_ready([pod_body("h", HEAD, status=READY)])
    assert not ray_state.head_is_ready([pod_body("h", HEAD)])
    assert not ray_state.head_is_ready([pod_body("h", HEAD, status=READY, deletionTimestamp=stamp(NOW))])
    assert not ray_state.head_is_ready([pod_body("w", {"ray.io/cluster": "default-a"}, status=READY)])


def test_workers_are_known_by_address_and_group() -> None:
    labels = {"ray.io/cluster": "default-a", "ray.io/node-type": "worker", "ray.io/group": "cpu"}
    pods = [pod_body("h", HEAD), pod_body("w", labels, status={"podIP": "10.0.0.7"}), pod_body("new", labels)]
    assert ray_state.worker_pods(pods) == (Worker("w", "10.0.0.7", "cpu"), Worker("new", "", "cpu"))


def test_kuberays_version_is_read_from_the_pods_that_it_made() -> None:
    tags = {"name": "RAY_USAGE_STATS_EXTRA_TAGS", "value": "kuberay_version=v1.6.1;kuberay_crd=RayCluster"}
    pod = pod_body("h", HEAD, spec={"containers": [{"name": "ray", "env": [{"name": "A"}, tags]}]})
    assert ray_state.kuberay_version([pod_body("x", {}), pod]) == "1.6.1"
    assert ray_state.kuberay_version([]) == ""


def stuck(cluster: dict[str, Any], now: float) -> list[str] | None:
    return ray_state.stuck_finalizers(cluster, ray_state.STUCK_SECONDS, now)


def test_kuberays_finalizer_is_taken_away_only_when_it_holds_for_too_long() -> None:
    finalizers = ["ray.io/gcs-ft-redis-cleanup-finalizer", "other/one"]
    deleted = cluster_body("a", deletionTimestamp=stamp(NOW), finalizers=finalizers)
    assert stuck(deleted, NOW + ray_state.STUCK_SECONDS - 1) is None
    assert stuck(deleted, NOW + ray_state.STUCK_SECONDS) == ["other/one"]
    assert stuck(cluster_body("a", finalizers=finalizers), NOW + 1e6) is None
    held = cluster_body("a", deletionTimestamp=stamp(NOW), finalizers=["other/one"])
    assert stuck(held, NOW + 1e6) is None


def test_a_cluster_of_which_kuberay_says_nothing_is_noticed() -> None:
    assert not ray_state.is_ignored(cluster_body("a"), 60, NOW - 50)
    assert ray_state.is_ignored(cluster_body("a"), 60, NOW)
    assert not ray_state.is_ignored(cluster_body("a", status={"state": "ready"}), 60, NOW)


def test_pending_pods_are_asked_about_only_when_they_are_slow() -> None:
    fresh = pod_body("a", {}, "Pending", creationTimestamp=stamp(NOW - 3))
    slow = pod_body("b", {}, "Pending", creationTimestamp=stamp(NOW - 30))
    assert ray_state.slow_pods([fresh, slow, pod_body("c", {})], NOW) == [slow]
    assert ray_state.next_slow_at([fresh, slow], NOW) == NOW - 3 + ray_state.SLOW_SECONDS


def test_what_is_made_for_an_object_goes_with_it() -> None:
    made = ray_state.owned({"metadata": {"name": "x"}}, cluster_body("a"))
    (reference,) = made["metadata"]["ownerReferences"]
    assert (reference["kind"], reference["name"], reference["controller"]) == (
        "RayCluster",
        "default-a",
        True,
    )
    assert reference["uid"] == "uid-default-a"
