from typing import Any

from tests.unit.operator.bodies import NOW, cluster_body, pod_body
from tidegate.control.observed import ServeState
from tidegate_operator.ray_view import RayView, ServeView, pool_numbers, pool_ready, serve_problem
from tidegate_operator.upgrade import choose

HEAD = pod_body(
    "h",
    {"ray.io/cluster": "default-a", "ray.io/node-type": "head"},
    status={"conditions": [{"type": "Ready", "status": "True"}]},
)
KNOWN = {"state": "ready", "readyWorkerReplicas": 1, "desiredWorkerReplicas": 2}
UP, DOWN = ServeView(ServeState()), ServeView(None, "nobody answers")


def view(*bodies: dict[str, Any], serve: ServeView = DOWN, pods: Any = (), kuberay: bool = True) -> RayView:
    choice = choose("a", bodies, "Surge", "", lambda _: serve.state is not None)
    names = [body["metadata"]["name"] for body in bodies]
    return RayView(choice, dict.fromkeys(names, serve), pods, "a", kuberay)


def reasons(ray: RayView, now: float = NOW) -> tuple[str, str]:
    """Of the Pool's Ready, and of what its Models are told."""
    problem = serve_problem(ray, now)
    return pool_ready(ray, now).reason, problem[0] if problem is not None else ""


def test_a_cluster_on_its_way_up_is_no_problem() -> None:
    assert reasons(view()) == ("ClusterStarting", "")
    assert reasons(view(cluster_body("a", status=KNOWN))) == ("ClusterStarting", "")


def test_a_head_that_runs_and_does_not_answer_is_one() -> None:
    ray = view(cluster_body("a", status=KNOWN), pods=[HEAD])
    assert reasons(ray) == ("ServeUnavailable", "ServeUnavailable")
    assert pool_ready(ray, NOW).message == "nobody answers"


def test_kuberay_is_missed_as_a_definition_and_as_an_operator() -> None:
    assert reasons(view(kuberay=False)) == ("KubeRayMissing", "KubeRayMissing")
    ignored = view(cluster_body("a"))
    assert reasons(ignored, NOW - 90) == ("ClusterStarting", "")
    assert reasons(ignored, NOW) == ("KubeRayMissing", "KubeRayMissing")
    assert "RayCluster default-a" in pool_ready(ignored, NOW).message


def test_what_serve_said_of_the_last_config_is_told_while_it_answers() -> None:
    last = ("ServeRejected", "words")
    refusing = view(cluster_body("a"), serve=ServeView(ServeState(), problem=last))
    assert serve_problem(refusing, NOW) == last
    assert pool_ready(refusing, NOW).status == "True"


def test_a_pool_on_its_way_from_one_cluster_to_the_next_is_ready_and_says_so() -> None:
    moving = pool_ready(view(cluster_body("old"), cluster_body("a"), serve=UP), NOW)
    assert (moving.status, "default-a takes over from default-old" in moving.message) == ("True", True)
    choice = choose("a", [cluster_body("old")], "Surge", "default-old", lambda _: False)
    coming = RayView(choice, {"default-old": UP}, (), "a", has_kuberay=True)
    assert "one of generation a comes up" in pool_ready(coming, NOW).message


def test_with_recreate_the_pool_is_not_ready_until_the_new_cluster_is() -> None:
    choice = choose("a", [cluster_body("old")], "Recreate", "default-old", lambda _: True)
    ray = RayView(choice, {"default-old": UP}, (), "a", has_kuberay=True)
    assert pool_ready(ray, NOW).reason == "ClusterRecreating"


def test_the_numbers_are_the_active_clusters() -> None:
    body = cluster_body("a", status=KNOWN, spec={"rayVersion": "2.60.0"})
    numbers = pool_numbers(view(body, serve=UP), 3)
    assert (numbers["rayCluster"], numbers["generation"], numbers["rayVersion"]) == (
        "default-a",
        "a",
        "2.60.0",
    )
    assert (numbers["workers"], numbers["wantedWorkers"], numbers["revisions"]) == (1, 2, 3)
