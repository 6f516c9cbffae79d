"""What Kubernetes reports of pods that do not run, as one sentence with its remedy each."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.control.observed import PodProblem
from tidegate.control.reasons import Reason
from tidegate_operator.pod_problems import Ended, cluster_problems, ended_badly, pod_problems, reported


def pod(
    *containers: dict[str, Any],
    phase: str = "Pending",
    conditions: list[dict[str, Any]] | None = None,
    group: str = "a100",
    requests: dict[str, str] | None = None,
    **status: Any,
) -> dict[str, Any]:
    labels = {"ray.io/node-type": "worker", "ray.io/group": group}
    if group == "head":
        labels = {"ray.io/node-type": "head", "ray.io/group": "headgroup"}
    resources = {"requests": requests or {}, "limits": {"memory": "4Gi"}}
    return {
        "metadata": {"name": "main-x-worker-1", "uid": "u1", "labels": labels},
        "spec": {"containers": [{"name": "ray-worker", "resources": resources}]},
        "status": {
            "phase": phase,
            "conditions": conditions or [],
            "containerStatuses": list(containers),
            **status,
        },
    }


def container(**state: Any) -> dict[str, Any]:
    return {"name": "ray-worker", "image": "ray:1", "restartCount": 0, **state}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return container(state={"waiting": {"reason": reason, "message": message}})


def only(problems: tuple[PodProblem, ...]) -> PodProblem:
    assert len(problems) == 1
    assert problems[0].reason in {*Reason}
    assert "main-x-worker-1" in problems[0].message
    return problems[0]


@pytest.mark.parametrize(
    "reason", ["ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName"]
)
def test_an_image_that_cannot_be_pulled(reason: str) -> None:
    found = only(pod_problems([pod(waiting(reason, 'Back-off pulling image "ray:1"'))]))
    assert (found.reason, found.group, found.container) == ("ImagePullFailed", "a100", "ray-worker")
    assert "the image ray:1 cannot be pulled" in found.message
    assert "imagePullSecrets" in found.message


def unscheduled(message: str, **fields: Any) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(conditions=[condition], **fields)


def test_an_unschedulable_pod_says_which_resource_and_how_much_is_missing() -> None:
    asks = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}
    text = (
        "0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient memory, 1 Insufficient nvidia.com/gpu."
    )
    lone = unscheduled(text, requests=asks)
    plain = only(pod_problems([lone]))
    assert plain.reason == "Unschedulable"
    assert "it asks for 8 cpu; it asks for 64.00 GiB memory; it asks for 2 nvidia.com/gpu" in plain.message
    nodes = [
        {"status": {"allocatable": {"cpu": "7500m", "memory": "65536Mi", "nvidia.com/gpu": "1"}}},
        {"status": {"allocatable": {"cpu": "4", "memory": "8Gi"}}},
    ]
    message = only(pod_problems([lone], nodes=nodes)).message
    assert "it asks for 8 cpu, 0.5 more than the largest node has (7.5)" in message
    assert "it asks for 2 nvidia.com/gpu, 1 more than the largest node has (1)" in message
    assert "it asks for 64.00 GiB memory, which a node has (64.00 GiB), but it is taken" in message


def test_a_node_selector_that_nothing_meets() -> None:
    text = "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
    assert "nodeSelector" in only(pod_problems([unscheduled(text)])).message


@pytest.mark.parametrize(
    "text",
    [
        'persistentvolumeclaim "weights" not found. not found',
        "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims.",
    ],
)
def test_a_claim_that_is_not_there(text: str) -> None:
    assert only(pod_problems([unscheduled(text)])).reason == "VolumeMissing"


def test_memory_beyond_the_limit() -> None:
    killed = container(
        restartCount=1,
        state={"waiting": {"reason": "CrashLoopBackOff"}},
        lastState={"terminated": {"reason": "OOMKilled", "exitCode": 137}},
    )
    found = only(pod_problems([pod(killed, phase="Running")]))
    assert found.reason == "OutOfMemory"
    assert "its limit of 4Gi" in found.message
    ended = container(state={"terminated": {"reason": "OOMKilled", "exitCode": 137}})
    assert only(pod_problems([pod(ended, phase="Failed")])).reason == "OutOfMemory"


def test_a_crash_loop_says_how_it_ends() -> None:
    crashed = container(
        restartCount=4,
        state={"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
        lastState={"terminated": {"exitCode": 1, "message": "No module named 'ray'"}},
    )
    found = only(pod_problems([pod(crashed, phase="Running")]))
    assert found.reason == "CrashLoop"
    assert "ended with exit code 1 (restarted 4 times): No module named 'ray'" in found.message


def test_a_long_log_is_told_by_its_end_without_colours() -> None:
    log = "\n".join([f"\x1b[36mline {number}\x1b[0m" for number in range(200)]) + "\nno such disk\n"
    ended = container(state={"terminated": {"exitCode": 1, "message": log}})
    told = only(pod_problems([pod(ended, phase="Failed")])).message
    assert "line 199 no such disk; its log says more." in told
    assert "line 0 " not in told
    assert "\x1b" not in told


@pytest.mark.parametrize(("group", "field"), [("head", "spec.head.cpus"), ("a100", "the group's cpus")])
def test_a_ray_that_did_not_come_up_in_time_says_what_to_raise(group: str, field: str) -> None:
    log = (
        "Exception: The current node timed out during startup. This could happen because some of the raylet "
        "failed to startup or the GCS has become overloaded.\nrpc_client.h:153: Failed to connect to GCS"
    )
    ended = container(state={"terminated": {"exitCode": 1, "message": log}})
    found = only(pod_problems([pod(ended, phase="Failed", group=group)]))
    assert found.reason == "CrashLoop"
    assert f"raise {field} in the Pool" in found.message
    # One that runs again says nothing of the time before.
    running = container(state={"running": {}}, lastState={"terminated": {"exitCode": 1, "message": log}})
    assert not pod_problems([pod(running, phase="Running", group=group)])


def test_a_secret_that_is_not_there() -> None:
    found = only(pod_problems([pod(waiting("CreateContainerConfigError", 'secret "hf" not found'))]))
    assert found.reason == "SecretMissing"
    assert found.message.endswith("Create the Secret hf.")
    key = waiting("CreateContainerConfigError", "couldn't find key token in Secret apps/hf")
    assert only(pod_problems([pod(key)])).reason == "SecretMissing"


def event(message: str, name: str = "main-x-worker-1", stamp: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    return {
        "reason": "FailedMount",
        "message": message,
        "involvedObject": {"name": name, "uid": "u1"},
        "lastTimestamp": stamp,
    }


def test_a_volume_that_cannot_be_mounted_is_certain_by_events_only() -> None:
    creating = pod(waiting("ContainerCreating"))
    assert pod_problems([creating]) == ()
    assert pod_problems([creating], [event("x", name="another")]) == ()
    found = only(
        pod_problems(
            [creating],
            [
                event("older"),
                event("hostPath type check failed: /srv is not a directory", stamp="2026-01-01T00:00:09Z"),
            ],
        )
    )
    assert found.reason == "VolumeMissing"
    assert "/srv is not a directory" in found.message
    secret = event('MountVolume.SetUp failed for volume "s" : secret "tls" not found')
    assert only(pod_problems([creating], [secret])).reason == "SecretMissing"


def test_an_init_container_counts_and_the_head_concerns_all() -> None:
    broken = {**waiting("ErrImagePull"), "name": "wait-gcs-ready"}
    head = pod(group="head", initContainerStatuses=[broken])
    found = only(pod_problems([head]))
    assert (found.container, found.group) == ("wait-gcs-ready", "")


def test_an_evicted_pod() -> None:
    gone = pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory.")
    assert only(pod_problems([gone])).reason == "Evicted"


@pytest.mark.parametrize(
    "sound",
    [
        pod(container(state={"running": {"startedAt": "x"}}), phase="Running"),
        pod(waiting("ContainerCreating")),
        pod(waiting("PodInitializing")),
        pod(container(state={"terminated": {"exitCode": 0, "reason": "Completed"}}), phase="Succeeded"),
        # It was killed once and runs again: that is over.
        pod(
            container(
                state={"running": {}}, lastState={"terminated": {"reason": "OOMKilled", "exitCode": 137}}
            ),
            phase="Running",
        ),
        {"metadata": {"name": "new"}},
    ],
)
def test_a_sound_pod_has_no_problem(sound: dict[str, Any]) -> None:
    assert pod_problems([sound]) == ()


def test_a_pod_that_goes_is_left_alone() -> None:
    going = pod(waiting("ErrImagePull"))
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert pod_problems([going]) == ()


@pytest.mark.parametrize(
    ("reason", "exit_code", "finished", "told"),
    [
        ("Error", 3, "2026-01-01T00:00:09Z", ["CrashLoop"]),
        ("Error", 143, "2026-01-01T00:00:10Z", []),
        ("Error", 143, "2026-01-01T00:00:11Z", []),
        ("OOMKilled", 137, "2026-01-01T00:00:10Z", ["OutOfMemory"]),
        ("Completed", 0, "2026-01-01T00:00:09Z", []),
    ],
)
def test_a_pod_deleted_because_it_had_ended_says_why(
    reason: str, exit_code: int, finished: str, told: list[str]
) -> None:
    state = {"reason": reason, "exitCode": exit_code, "finishedAt": finished}
    going = pod(container(state={"terminated": state}), phase="Running")
    # Asked for at 00:00:10.
    going["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:40Z", "deletionGracePeriodSeconds": 30}
    assert [problem.reason for problem in pod_problems([going])] == told


READY = [{"type": "Ready", "status": "True"}]


def test_a_pod_that_ended_badly_is_certain_until_another_is_ready() -> None:
    killed = pod(container(state={"terminated": {"reason": "OOMKilled"}}), phase="Failed")
    problem = only(pod_problems([killed]))
    ended = ended_badly([problem], {}, [killed], now=100.0)
    assert ended == {"a100": Ended(problem, 100.0, 100.0, is_certain=True)}
    assert reported([problem], ended) == (problem,)
    assert reported([], ended) == (problem,)
    starting = pod(waiting("ContainerCreating"))
    assert ended_badly([], ended, [starting], now=159.0) == ended
    assert ended_badly([], ended, [], now=160.0) == {}
    assert ended_badly([], ended, [pod(conditions=READY, phase="Running")], now=101.0) == {}
    elsewhere = pod(conditions=READY, phase="Running", group="head")
    assert ended_badly([], ended, [elsewhere], now=101.0) == ended


def test_what_a_pod_waits_for_comes_before_how_the_one_before_it_ended() -> None:
    """A worker that was killed on a node that is cordoned: its successor finds no other."""
    killed = ended_worker("killed", "2026-01-01T00:00:00Z")
    successor = unscheduled("0/2 nodes are available: 1 Insufficient cpu, 1 node(s) were unschedulable.")
    head = pod(waiting("ErrImagePull"), group="head")
    found = pod_problems([killed, successor])
    ended = {"a100": Ended(found[0], 1.0, 1.0, is_certain=True)}
    assert [problem.reason for problem in reported(found, ended)] == ["Unschedulable", "CrashLoop"]
    assert "kubectl uncordon" in found[1].message
    assert [problem.reason for problem in reported(found[1:], ended)] == ["Unschedulable"]
    both = reported(pod_problems([head, killed, successor]), ended)
    assert [problem.reason for problem in both] == ["ImagePullFailed", "Unschedulable", "CrashLoop"]


def test_a_pod_that_only_waits_is_not_remembered() -> None:
    unplaced = only(pod_problems([unscheduled("Insufficient cpu.")]))
    assert ended_badly([unplaced], {}, [], now=1.0) == {}
    assert reported([unplaced], {}) == (unplaced,)


def ended_worker(name: str, created: str) -> dict[str, Any]:
    """As Ray's autoscaler leaves one that was idle, and as a crash leaves one."""
    body = pod(container(state={"terminated": {"reason": "Error", "exitCode": 1}}), phase="Failed")
    body["metadata"] |= {"name": name, "creationTimestamp": created}
    return body


def test_the_end_of_a_worker_is_certain_once_that_of_its_successor_is_the_same() -> None:
    at = 1_767_225_600.0  # 2026-01-01
    first = ended_worker("first", "2025-12-31T23:59:00Z")
    found = pod_problems([first])
    ended = ended_badly(found, {}, [first], at)
    assert reported(found, ended) == ()
    # Others that go at the same time were there before.
    sibling = ended_worker("sibling", "2025-12-31T23:59:00Z")
    siblings = pod_problems([first, sibling])
    assert reported(siblings, ended_badly(siblings, ended, [first, sibling], at + 1)) == ()
    successor = ended_worker("successor", "2026-01-01T00:00:01Z")
    found = pod_problems([successor])
    ended = ended_badly(found, ended, [successor], at + 9)
    assert [problem.pod for problem in reported(found, ended)] == ["successor"]
    third = ended_worker("third", "2026-01-01T00:00:10Z")
    found = pod_problems([third])
    assert [problem.pod for problem in reported(found, ended_badly(found, ended, [third], at + 19))] == [
        "third"
    ]


def test_a_worker_that_is_ready_in_between_begins_the_count_anew() -> None:
    at = 1_767_225_600.0
    first, second = (ended_worker("a", "2025-12-31T23:59:00Z"), ended_worker("b", "2026-01-01T00:00:01Z"))
    ended = ended_badly(pod_problems([first]), {}, [first], at)
    ended = ended_badly([], ended, [pod(conditions=READY, phase="Running")], at + 5)
    found = pod_problems([second])
    assert reported(found, ended_badly(found, ended, [second], at + 9)) == ()


def test_the_end_of_a_head_and_of_an_init_container_is_certain_at_once() -> None:
    head = pod(container(state={"terminated": {"reason": "Error", "exitCode": 1}}), group="head")
    prepare = {**container(state={"terminated": {"reason": "Error", "exitCode": 3}}), "name": "prepare"}
    worker = pod(initContainerStatuses=[prepare])
    for body in (head, worker):
        found = pod_problems([body])
        assert reported(found, ended_badly(found, {}, [body], 1.0)) == found


def test_pods_that_could_not_be_made() -> None:
    cluster = {
        "metadata": {"name": "main-1"},
        "status": {
            "conditions": [
                {"type": "HeadPodReady", "status": "True"},
                {
                    "type": "ReplicaFailure",
                    "status": "True",
                    "reason": "FailedCreateWorkerPod",
                    "message": 'pods "x" is forbidden: violates PodSecurity "restricted:latest"',
                },
            ]
        },
    }
    (found,) = cluster_problems(cluster)
    assert (found.reason, found.group) == ("PodsRefused", "")
    assert "violates PodSecurity" in found.message
    assert cluster_problems({"metadata": {"name": "m"}, "status": {}}) == ()
