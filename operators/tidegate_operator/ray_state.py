"""Facts read from a Pool's RayClusters and their pods. Pure."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tidegate.control.observed import Worker
from tidegate_operator.cache import Body, is_deleting, labels
from tidegate_operator.pod_problems import GROUP_LABEL, NODE_TYPE_LABEL
from tidegate_operator.status_patch import deleting_since

CLUSTER_LABEL = "ray.io/cluster"
JOB_LABEL = "job-name"
RAY_FINALIZERS = "ray.io/"
# KubeRay lets a cluster go once a Job has cleaned its Redis, which takes about 36 s. Where that Redis is gone
# the Job tries for minutes, and there is nothing left to clean.
STUCK_SECONDS = 90.0
SLOW_SECONDS = 10.0  # a pod that is pending for longer is worth asking for its events

_KUBERAY = re.compile(r"kuberay_version=v?([0-9][0-9A-Za-z.+-]*)")


def pods_of(pods: Iterable[Body], cluster: str) -> list[Body]:
    return [pod for pod in pods if labels(pod).get(CLUSTER_LABEL) == cluster]


def pods_of_job(pods: Iterable[Body], job: str) -> list[Body]:
    return [pod for pod in pods if labels(pod).get(JOB_LABEL) == job]


def worker_pods(pods: Iterable[Body]) -> tuple[Worker, ...]:
    """Also those that go: a replica may have ended with its pod."""
    return tuple(
        Worker(
            pod=str(pod["metadata"]["name"]),
            address=str((pod.get("status") or {}).get("podIP") or ""),
            group=str(labels(pod).get(GROUP_LABEL) or ""),
        )
        for pod in pods
        if labels(pod).get(NODE_TYPE_LABEL) == "worker"
    )


def head_service(cluster: Body) -> str:
    """Return the head's Service: as KubeRay says, or as it names it before it has said so."""
    named = ((cluster.get("status") or {}).get("head") or {}).get("serviceName")
    return str(named or f"{cluster['metadata']['name']}-head-svc")


def head_is_ready(pods: Iterable[Body]) -> bool:
    return any(
        labels(pod).get(NODE_TYPE_LABEL) == "head" and not is_deleting(pod) and _is_ready(pod) for pod in pods
    )


def is_ignored(cluster: Body, silent_seconds: float, now: float) -> bool:
    """Tell whether KubeRay has had time to say something of the cluster and has not."""
    return not cluster.get("status") and now - created(cluster) >= silent_seconds


def workers(cluster: Body | None) -> tuple[int, int]:
    """(ready, wanted)"""
    status = (cluster or {}).get("status") or {}
    return int(status.get("readyWorkerReplicas") or 0), int(status.get("desiredWorkerReplicas") or 0)


def kuberay_version(pods: Iterable[Body]) -> str:
    """KubeRay tells its version to Ray's own statistics, in each pod that it makes; empty: not found."""
    for pod in pods:
        for container in (pod.get("spec") or {}).get("containers") or ():
            for variable in container.get("env") or ():
                if variable.get("name") == "RAY_USAGE_STATS_EXTRA_TAGS":
                    found = _KUBERAY.search(str(variable.get("value") or ""))
                    if found:
                        return found[1]
    return ""


def token_secret(pods: Iterable[Body]) -> tuple[str, str] | None:
    """Return the (Secret, key) of the token that Ray asks for, as the head is told it; None: it asks for
    none, or there is no head now."""
    for pod in pods:
        if labels(pod).get(NODE_TYPE_LABEL) != "head" or is_deleting(pod):
            continue
        for container in (pod.get("spec") or {}).get("containers") or ():
            for variable in container.get("env") or ():
                reference = (variable.get("valueFrom") or {}).get("secretKeyRef")
                if variable.get("name") == "RAY_AUTH_TOKEN" and reference:
                    return str(reference["name"]), str(reference["key"])
    return None


def has_variable(cluster: Body, *names: str) -> bool:
    """Tell whether the head's container of a cluster is given one of these variables."""
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    return any(item.get("name") in names for item in pod["containers"][0].get("env") or ())


def ray_version(cluster: Body | None) -> str:
    return str(((cluster or {}).get("spec") or {}).get("rayVersion") or "")


def slow_pods(pods: Iterable[Body], now: float) -> list[Body]:
    """Pods that have been on their way up for longer than is usual."""
    return [
        pod
        for pod in pods
        if (pod.get("status") or {}).get("phase") == "Pending" and not is_deleting(pod) and is_slow(pod, now)
    ]


def is_slow(body: Body, now: float) -> bool:
    return now - created(body) >= SLOW_SECONDS


def next_slow_at(pods: Iterable[Body], now: float) -> float | None:
    """Return when the next pod will have been pending for too long."""
    times = [
        created(pod) + SLOW_SECONDS
        for pod in pods
        if (pod.get("status") or {}).get("phase") == "Pending" and not is_deleting(pod)
    ]
    return min((at for at in times if at > now), default=None)


def is_unschedulable(pods: Iterable[Body]) -> bool:
    return any(
        item.get("type") == "PodScheduled" and item.get("status") == "False"
        for pod in pods
        for item in (pod.get("status") or {}).get("conditions") or ()
    )


def stuck_finalizers(cluster: Body, after_seconds: float, now: float) -> list[str] | None:
    """Return the finalizers that a cluster keeps once KubeRay's are taken away; None: nothing is stuck."""
    since = deleting_since(cluster)
    finalizers: Sequence[str] = cluster["metadata"].get("finalizers") or ()
    if since is None or now - since < after_seconds:
        return None
    kept = [name for name in finalizers if not name.startswith(RAY_FINALIZERS)]
    return kept if len(kept) < len(finalizers) else None


def owner(body: Body) -> list[dict[str, Any]]:
    """Owner references to `body`: what is made for it goes with it."""
    meta = body["metadata"]
    return [
        {
            "apiVersion": body["apiVersion"],
            "kind": body["kind"],
            "name": meta["name"],
            "uid": meta["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def owned(manifest: Mapping[str, Any], by: Body) -> dict[str, Any]:
    return {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": owner(by)}}


def _is_ready(pod: Body) -> bool:
    return any(
        item.get("type") == "Ready" and item.get("status") == "True"
        for item in (pod.get("status") or {}).get("conditions") or ()
    )


def created(pod: Body) -> float:
    stamp = str(pod["metadata"].get("creationTimestamp") or "")
    if not stamp:
        return 0.0
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
