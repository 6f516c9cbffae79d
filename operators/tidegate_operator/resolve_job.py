"""The Job that answers one question about a Model's source, and its answer. Pure.

It runs the platform's own image with the Model's Secret, downloads into the Pool's weight cache what is not
there yet, and leaves its answer in the container's termination message, which Kubernetes bounds at 4096
bytes. So neither the operator nor a replica ever holds a source's credentials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tidegate.control.looks import Question
from tidegate.control.observed import SourceState
from tidegate.control.reasons import Reason
from tidegate.control.resources import Model, Pool, PoolSpec, WorkerGroup
from tidegate.control.source_answer import read_answer
from tidegate.sources.schemes import SCHEMES, claim_and_path, scheme_of
from tidegate_operator.pod_problems import REFUSED_REMEDY, pod_problems, refused_pod
from tidegate_operator.pod_template import (
    MODEL_LABEL,
    POOL_LABEL,
    REVISION_LABEL,
    WEIGHTS_FOLDER,
    RayDefaults,
    claim_folder,
    common_labels,
    container_security,
    image_of,
    on_wire,
    pod_security,
    pull_secrets,
    volume_mounts,
    volumes,
    weights_environment,
)

CONTAINER = "resolve"
TERMINATION_LOG = "/dev/termination-log"
# A finished Job goes by itself after this; the plan then asks again where the answer was a failure.
RETRY_SECONDS = 120
LONGEST_SECONDS = 6 * 3600  # a download of hundreds of gigabytes may take hours
RESOURCES = {
    "requests": {"cpu": "100m", "memory": "256Mi"},
    "limits": {"memory": "2Gi"},
}


def job_name(model: str, key: str) -> str:
    """`key` is what a question of the model's source goes by."""
    return f"{model}-{key}"


def no_job_needed(question: Question, pool: Pool) -> SourceState | None:
    """Return what is known without a Job: that the pool's pods could never read this source."""
    uri = question.uri
    scheme = scheme_of(uri)
    if SCHEMES[scheme].needs_cache and pool.spec.weight_cache is None:
        return SourceState(
            "failed",
            reason="NoWeightCache",
            message=f"{uri} is downloaded, and the pool {pool.name!r} has no place for it that its pods "
            "share; set spec.weightCache of the Pool.",
        )
    claim, _ = claim_and_path(uri)
    if scheme == "pvc" and not claim_folder(pool.spec, claim):
        return SourceState(
            "failed",
            reason="VolumeMissing",
            message=f"The pods of the pool {pool.name!r} do not mount the claim {claim!r}; add it to "
            "spec.volumes and spec.volumeMounts of the Pool, or make it its weightCache.",
        )
    return None


def resolve_job(
    question: Question, key: str, pool: Pool, namespace: str, defaults: RayDefaults
) -> dict[str, Any]:
    """Return the whole manifest; owner references are the caller's. The question's Model has a source."""
    model = question.model
    assert model.spec.source is not None
    spec = pool.spec
    labels = {
        **common_labels("resolve"),
        MODEL_LABEL: model.name,
        REVISION_LABEL: key,
        POOL_LABEL: pool.name,
    }
    secret = model.spec.source.secret_ref
    mounts, all_volumes = volume_mounts(spec), volumes(spec)
    pod = {
        **pull_secrets(spec),
        **_nodes(model, spec),
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(spec),
        "containers": [
            {
                "name": CONTAINER,
                **image_of(spec, defaults),
                "command": ["python", "-m", "tidegate.sources", "resolve", *question.arguments],
                "args": [*_cache(spec), *_claim(model.spec.source.uri, spec), "--answer", TERMINATION_LOG],
                "env": weights_environment(spec),
                **({"envFrom": [{"secretRef": {"name": secret.name}}]} if secret is not None else {}),
                "resources": RESOURCES,
                "securityContext": container_security(),
                "terminationMessagePolicy": "FallbackToLogsOnError",
                **({"volumeMounts": mounts} if mounts else {}),
            }
        ],
        **({"volumes": all_volumes} if all_volumes else {}),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name(model.name, key), "namespace": namespace, "labels": labels},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": LONGEST_SECONDS,
            "ttlSecondsAfterFinished": RETRY_SECONDS,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def read_job(
    job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]] = ()
) -> SourceState:
    """Return how far the Job is. `pods` are this Job's, `events` those of its pods or, without any, its
    own."""
    for status in _container_statuses(pods):
        ended = (status.get("state") or {}).get("terminated")
        if ended is not None and (answer := read_answer(ended.get("message") or "")) is not None:
            return answer
    problems = pod_problems(pods, events)
    if problems:
        return SourceState("failed", reason=problems[0].reason, message=problems[0].message)
    verdict = _verdict(job)
    if verdict is None and not pods and (refused := refused_pod(job, events)):
        # Kubernetes goes on trying, so it passes with what refuses it.
        return SourceState("failed", reason=Reason.PodsRefused, message=refused)
    if verdict is None:
        return SourceState("resolving", message=f"The Job {job['metadata']['name']} looks at the source.")
    return SourceState(
        "failed",
        reason="JobFailed",
        message=f"The Job {job['metadata']['name']} ended without an answer: {verdict}",
    )


def refused_job(name: str, refusal: str) -> SourceState:
    """Return the state of a source whose Job the API server does not take, in its words."""
    return SourceState(
        "failed",
        reason=Reason.PodsRefused,
        message=f"Kubernetes refuses the Job {name}, which looks at the source: {refusal} {REFUSED_REMEDY}",
        is_unasked=True,
    )


def _nodes(model: Model, spec: PoolSpec) -> dict[str, Any]:
    """A download into a folder of a node belongs on a node where the replicas will run."""
    group = next((group for group in spec.groups if group.name == model.spec.resources.accelerator), None)
    if group is None and len(spec.groups) == 1:
        group = spec.groups[0]
    return _node_fields(group) if group is not None else {}


def _node_fields(group: WorkerGroup) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if group.node_selector:
        fields["nodeSelector"] = dict(group.node_selector)
    if group.tolerations:
        fields["tolerations"] = [on_wire(toleration) for toleration in group.tolerations]
    return fields


def _cache(spec: PoolSpec) -> list[str]:
    return ["--cache", WEIGHTS_FOLDER] if spec.weight_cache is not None else []


def _claim(uri: str, spec: PoolSpec) -> list[str]:
    if scheme_of(uri) != "pvc":
        return []
    claim, _ = claim_and_path(uri)
    return ["--claim", f"{claim}={claim_folder(spec, claim)}"]


def _container_statuses(pods: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    newest = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp") or ""), reverse=True)
    return [
        status
        for pod in newest
        for status in (pod.get("status") or {}).get("containerStatuses") or []
        if status.get("name") == CONTAINER
    ]


def _verdict(job: Mapping[str, Any]) -> str | None:
    """Return how Kubernetes says that a Job has ended; None while it runs."""
    for item in (job.get("status") or {}).get("conditions") or []:
        if item.get("status") == "True" and item.get("type") in ("Complete", "Failed"):
            return str(item.get("message") or item.get("reason") or item["type"])
    return None
