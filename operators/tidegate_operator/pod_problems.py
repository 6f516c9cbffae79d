"""Reasons why pods do not run, read from what Kubernetes and KubeRay report. Pure.

Takes objects as the API gives them (camelCase mappings) and says at most one thing per container: what it
is, in which pod, and what a person can do about it.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidegate.control.observed import PodProblem
from tidegate.control.schema_types import cpu_cores, size_bytes

GROUP_LABEL = "ray.io/group"
NODE_TYPE_LABEL = "ray.io/node-type"
WORKER = "ray-worker"  # the container, in KubeRay's and our words
IMAGE_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
    }
)
VOLUME_EVENTS = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})
# KubeRay puts another pod in the place of one that ended badly, and that one looks well until it ends too.
ENDED = frozenset({"OutOfMemory", "CrashLoop", "Evicted"})
ENDED_SECONDS = 60.0
CLOCK_SECONDS = 2.0  # creation times have whole seconds, of another clock
MAX_CAUSE_CHARACTERS = 600
# What `ray start` says when it has waited 30 seconds for its raylet. The raylet ends where its agent, a
# Python process, has not written its ports within 15 (`WaitForDashboardAgentPorts` in Ray's
# node_manager.cc). RAY_agent_register_timeout_ms does not lengthen that, and RAY_raylet_start_wait_time_s
# only the 30. A head computes 9 seconds until then on a slow core, most of them imports.
RAY_TIMED_OUT = "The current node timed out during startup"
REFUSED_REMEDY = "Change the Pool, its namespace's quota or limits, or its Pod Security level."
_INSUFFICIENT = re.compile(r"Insufficient ([A-Za-z0-9./-]+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NAMED = re.compile(r"""(secret|configmap|persistentvolumeclaim) "?([a-z0-9][a-z0-9./-]*[a-z0-9])"?""", re.I)


def pod_problems(
    pods: Iterable[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]] = (),
    nodes: Sequence[Mapping[str, Any]] = (),
) -> tuple[PodProblem, ...]:
    """Problems of these pods. `events` are core/v1 Events (only those of the pods count), the only place
    where a volume that cannot be mounted is reported; `nodes` let a message say how much is missing."""
    found: list[PodProblem] = []
    for pod in pods:
        if (pod.get("metadata") or {}).get("deletionTimestamp"):
            found += _of_going_pod(pod)
        else:
            found += _of_pod(pod, events, nodes)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Ended:
    """The last pod of a group that ended badly, first and last seen so. `is_certain`: it was no idle worker,
    but one that could not run, or the second in a row."""

    problem: PodProblem
    since: float
    seen: float
    is_certain: bool


def ended_badly(
    found: Iterable[PodProblem],
    before: Mapping[str, Ended],
    pods: Sequence[Mapping[str, Any]],
    now: float,
) -> dict[str, Ended]:
    """By group, the pod to go on telling of, until another of its group is ready or `ENDED_SECONDS` are over.
    `before` is what this said the last time."""
    ready = {_group(pod) for pod in pods if _is_ready(pod)}
    created = {pod["metadata"]["name"]: pod["metadata"].get("creationTimestamp") or "" for pod in pods}
    ended = {
        group: past
        for group, past in before.items()
        if group not in ready and now - past.seen < ENDED_SECONDS
    }
    for problem in found:
        if problem.reason not in ENDED:
            continue
        past = ended.get(problem.group)
        is_certain = not problem.may_be_idle or (past is not None and past.is_certain)
        if past is not None and past.problem.pod == problem.pod:
            ended[problem.group] = Ended(problem, past.since, now, is_certain)
            continue
        if past is not None and (made := created.get(problem.pod)):
            is_certain = (
                is_certain or _seconds(made) >= past.since - CLOCK_SECONDS
            )  # it came in the other's place
        ended[problem.group] = Ended(problem, now, now, is_certain)
    return ended


def reported(found: Sequence[PodProblem], ended: Mapping[str, Ended]) -> tuple[PodProblem, ...]:
    """Return what to report: without workers that may only have been idle, and with pods that are gone."""
    now = [
        problem
        for problem in found
        if not problem.may_be_idle or (problem.group in ended and ended[problem.group].is_certain)
    ]
    groups = list(dict.fromkeys(problem.group for problem in now))
    # What a pod waits for that came in another's place is how it is now; how the other ended comes after it.
    now.sort(key=lambda problem: (groups.index(problem.group), problem.reason in ENDED))
    past = [item.problem for group, item in ended.items() if item.is_certain and group not in groups]
    return (*now, *past)


def refused_pod(job: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
    """Return what Kubernetes says of a Job's pod that it does not even make, which only Events tell; empty:
    nothing."""
    name, uid = job["metadata"]["name"], job["metadata"].get("uid")
    refused = _newest(events, name, uid, ("FailedCreate",))
    if refused is None:
        return ""
    cause = as_sentence(str(refused.get("message") or "").removeprefix("Error creating: "))
    return (
        f"Kubernetes refuses the pod of the Job {name}, which looks at the source: {cause} {REFUSED_REMEDY}"
    )


def cluster_problems(ray_cluster: Mapping[str, Any]) -> tuple[PodProblem, ...]:
    """Return what KubeRay says of pods that it could not even make: quota, Pod Security, a bad template."""
    name = str((ray_cluster.get("metadata") or {}).get("name") or "")
    status = ray_cluster.get("status") or {}
    for item in status.get("conditions") or []:
        if item.get("type") == "ReplicaFailure" and item.get("status") == "True":
            cause = as_sentence(item.get("message") or item.get("reason"))
            return (
                PodProblem(
                    "",
                    "",
                    "PodsRefused",
                    f"Kubernetes refuses pods of the Ray cluster {name}: {cause} {REFUSED_REMEDY}",
                ),
            )
    return ()


def _of_pod(
    pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]], nodes: Sequence[Mapping[str, Any]]
) -> list[PodProblem]:
    name, group, status = pod["metadata"]["name"], _group(pod), pod.get("status") or {}
    if status.get("phase") == "Failed" and status.get("reason") == "Evicted":
        cause = as_sentence(status.get("message"))
        return [PodProblem(name, "", "Evicted", f"Pod {name} was taken off its node: {cause}", group)]
    if problem := _unscheduled(pod, nodes):
        return [PodProblem(name, "", *problem, group)]
    found: list[PodProblem] = []
    images: set[str] = set()
    for container in _containers(status):
        if problem := _of_container(pod, container):
            image = str(container.get("image") or "")
            if problem[0] == "ImagePullFailed" and image in images:
                continue  # the same words once more
            images.add(image)
            found.append(_problem(pod, container, *problem))
    if not found and status.get("phase") == "Pending" and (problem := _unmounted(pod, events)):
        found.append(PodProblem(name, "", *problem, group))
    return found


def _of_going_pod(pod: Mapping[str, Any]) -> list[PodProblem]:
    """Return what ended in the pod before somebody, as KubeRay, deleted it for that."""
    meta = pod["metadata"]
    deleted_at = _seconds(meta["deletionTimestamp"]) - float(meta.get("deletionGracePeriodSeconds") or 0)
    found = []
    for container in _containers(pod.get("status") or {}):
        ended = (container.get("state") or {}).get("terminated") or {}
        # Times have whole seconds; of the same second is also what the deletion itself ends.
        is_earlier = ended.get("finishedAt") and _seconds(ended["finishedAt"]) < deleted_at
        if (ended.get("reason") == "OOMKilled" or is_earlier) and (problem := _of_container(pod, container)):
            found.append(_problem(pod, container, *problem))
    return found


def _problem(pod: Mapping[str, Any], container: Mapping[str, Any], reason: str, message: str) -> PodProblem:
    name, group = str(container.get("name") or ""), _group(pod)
    is_first_end = bool((container.get("state") or {}).get("terminated")) and not container.get(
        "restartCount"
    )
    may_be_idle = bool(group) and name == WORKER and reason == "CrashLoop" and is_first_end
    return PodProblem(pod["metadata"]["name"], name, reason, message, group, may_be_idle)


def _is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    is_ready = any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)
    return is_ready and not pod["metadata"].get("deletionTimestamp")


def _seconds(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def _group(pod: Mapping[str, Any]) -> str:
    labels = (pod.get("metadata") or {}).get("labels") or {}
    return "" if labels.get(NODE_TYPE_LABEL) == "head" else str(labels.get(GROUP_LABEL) or "")


def _containers(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _of_container(pod: Mapping[str, Any], container: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reason, sentence) of one container, the most telling first."""
    where = f"Pod {pod['metadata']['name']}, container {container.get('name')}"
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    reason, cause = (
        str(waiting.get("reason") or ""),
        as_sentence(waiting.get("message") or waiting.get("reason")),
    )
    if reason in IMAGE_REASONS:
        return (
            "ImagePullFailed",
            f"{where}: the image {container.get('image')} cannot be pulled: {cause} Check the image's name "
            "and the Pool's imagePullSecrets.",
        )
    if reason in ("CreateContainerConfigError", "CreateContainerError"):
        named = _NAMED.search(cause)
        if named or "key" in cause:
            kind = {"secret": "Secret", "configmap": "ConfigMap"}.get(named[1].lower(), "") if named else ""
            remedy = f"Create the {kind} {named[2]}." if named and kind else "Create what it names."
            return "SecretMissing", f"{where} cannot start: {cause} {remedy}"
        return "CrashLoop", f"{where} cannot be made: {cause}"
    is_running = state.get("running") is not None
    if ended.get("reason") == "OOMKilled" and not is_running:
        limit = _limit(pod, str(container.get("name") or ""))
        return (
            "OutOfMemory",
            f"{where} took more memory than its limit{f' of {limit}' if limit else ''} and was killed; raise "
            "the memory of its group (or of the head) in the Pool, or set spec.resources.memory of the "
            "models so that fewer share a worker.",
        )
    if RAY_TIMED_OUT in str(ended.get("message") or "") and not is_running:
        field = "the group's cpus" if _group(pod) else "spec.head.cpus"
        return (
            "CrashLoop",
            f"{where} ended because Ray did not come up within 30 seconds, of which it computes some 10; "
            f"another one is tried. If it ends too, its node is too busy: raise {field} in the Pool, which "
            "is what the pod gets of a full node.",
        )
    if reason == "CrashLoopBackOff" or (state.get("terminated") or {}).get("exitCode"):
        return "CrashLoop", f"{where} ended {_how(container, ended)}; its log says more."
    if waiting and reason not in ("ContainerCreating", "PodInitializing", ""):
        return "CrashLoop", f"{where} does not start: {cause}"
    return None


def _how(container: Mapping[str, Any], ended: Mapping[str, Any]) -> str:
    times = int(container.get("restartCount") or 0)
    code = f"with exit code {ended['exitCode']}" if "exitCode" in ended else "by itself"
    # The end of a log, where it says what was wrong.
    message = _COLOUR.sub("", str(ended.get("message") or "")).strip()
    cause = as_sentence(message[-MAX_CAUSE_CHARACTERS:]) if message else ""
    again = f" (restarted {times} times)" if times else ""
    return f"{code}{again}{f': {cause}' if cause else ''}".rstrip(".")


def _limit(pod: Mapping[str, Any], container: str) -> str:
    for item in (pod.get("spec") or {}).get("containers") or []:
        if item.get("name") == container:
            return str(((item.get("resources") or {}).get("limits") or {}).get("memory") or "")
    return ""


def _unscheduled(pod: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    name = pod["metadata"]["name"]
    for item in (pod.get("status") or {}).get("conditions") or []:
        if item.get("type") != "PodScheduled" or item.get("status") != "False":
            continue
        if item.get("reason") == "SchedulingGated":
            return None
        cause = as_sentence(item.get("message"))
        if "persistentvolumeclaim" in cause.lower():
            named = re.search(r'persistentvolumeclaim "([^"]+)"', cause, re.I)
            remedy = f"Create the claim {named[1]}." if named and "not found" in cause else "Check the claim."
            return "VolumeMissing", f"Pod {name} waits for a volume: {cause} {remedy}"
        cordoned = "were unschedulable" in cause  # the scheduler's word for it
        remedy = "Let pods onto the cordoned node again (kubectl uncordon), add" if cordoned else "Add"
        lacking = list(dict.fromkeys(found.rstrip(".") for found in _INSUFFICIENT.findall(cause)))
        asks = "; ".join(_lack(resource, pod, nodes) for resource in lacking)
        return (
            "Unschedulable",
            f"Pod {name} finds no node: {asks + '; ' if asks else ''}{cause} {remedy} a node, or change the "
            "group's size, nodeSelector or tolerations in the Pool.",
        )
    return None


def _lack(resource: str, pod: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    """Say what is asked of one resource and, where the nodes are known, how much is missing."""
    asked = sum(_amount(resource, given) for given in _requests(resource, pod))
    text = f"it asks for {_shown(resource, asked)} {resource}"
    offered = [
        _amount(resource, ((node.get("status") or {}).get("allocatable") or {}).get(resource, "0"))
        for node in nodes
    ]
    if not offered:
        return text
    largest = max(offered)
    if asked > largest:
        missing = _shown(resource, asked - largest)
        return f"{text}, {missing} more than the largest node has ({_shown(resource, largest)})"
    return f"{text}, which a node has ({_shown(resource, largest)}), but it is taken by other pods"


def _requests(resource: str, pod: Mapping[str, Any]) -> list[str]:
    return [
        str(amounts[resource])
        for container in (pod.get("spec") or {}).get("containers") or []
        if resource in (amounts := (container.get("resources") or {}).get("requests") or {})
    ]


def _amount(resource: str, quantity: str) -> float:
    try:
        return cpu_cores(str(quantity)) if resource == "cpu" else float(size_bytes(str(quantity)))
    except (KeyError, ValueError):
        return 0.0  # a notation that only Kubernetes reads; the amount is an aid in a sentence


def _shown(resource: str, amount: float) -> str:
    if resource in ("memory", "ephemeral-storage"):
        return f"{amount / 2**30:.2f} GiB"
    return f"{amount:g}"


def _unmounted(pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Read the newest event that says that a volume of this pod cannot be mounted."""
    name, uid = pod["metadata"]["name"], pod["metadata"].get("uid")
    failed = _newest(events, name, uid, VOLUME_EVENTS)
    if failed is None:
        return None
    cause = as_sentence(failed.get("message"))
    named = _NAMED.search(cause)
    if named and "not found" in cause and named[1].lower() in ("secret", "configmap"):
        return "SecretMissing", f"Pod {name} cannot start: {cause} Create {named[1].lower()} {named[2]}."
    return "VolumeMissing", f"Pod {name} cannot start: {cause} Check the Pool's volumes and weightCache."


def _newest(
    events: Sequence[Mapping[str, Any]], name: str, uid: str | None, reasons: Collection[str]
) -> Mapping[str, Any] | None:
    found = (
        event
        for event in events
        if event.get("reason") in reasons and _is_about(event.get("involvedObject") or {}, name, uid)
    )
    return max(found, key=lambda event: str(event.get("lastTimestamp") or ""), default=None)


def _is_about(reference: Mapping[str, Any], name: str, uid: str | None) -> bool:
    return reference.get("name") == name and (not uid or not reference.get("uid") or reference["uid"] == uid)


def as_sentence(text: Any) -> str:
    """Return a foreign message as one sentence of bounded length."""
    words = " ".join(str(text or "no reason was given").split())[:MAX_CAUSE_CHARACTERS]
    return words if words.endswith((".", "!", "?")) else f"{words}."
