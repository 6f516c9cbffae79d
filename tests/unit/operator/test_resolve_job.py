"""The Job that looks at a source: what it may see, and every way in which it ends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.control.builders import model
from tests.unit.operator.test_ray_cluster import DEFAULTS, pool
from tidegate.control.looks import Question
from tidegate.control.reasons import Reason
from tidegate.control.resources import Model, Pool
from tidegate.control.source_answer import read_answer
from tidegate.sources.facts import DecoderShape, StoredWeights
from tidegate_operator.resolve_job import job_name, no_job_needed, read_job, resolve_job

ANSWER = {
    "path": "/var/lib/tidegate/weights/x",
    "weights_bytes": 10,
    "quantization": "gptq",
    "precision": "float16",
    "commit": "abc",
    "digest": "d",
    "shape": {"layers": 2, "kv_heads": 1, "head_dim": 8, "hidden": 16, "vocab": 9, "positions": 64},
}


def named(uri: str = "hf://owner/name@main", secret: str = "", **fields: Any) -> Model:
    source: dict[str, Any] = {"uri": uri}
    if secret:
        source["secretRef"] = {"name": secret}
    return model("one", engine={"name": "transformers"}, source=source, **fields)


def job(wanted: Model, machines: Pool) -> dict[str, Any]:
    made = resolve_job(Question(wanted), "0123456789", machines, "apps", DEFAULTS)
    found: dict[str, Any] = json.loads(json.dumps(made))
    return found


def test_it_sees_the_models_secret_and_the_pools_cache() -> None:
    made = job(named(secret="hf"), pool(weightCache={"claim": "weights"}))
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][-2:] == ["resolve", "hf://owner/name@main"]
    assert container["args"] == ["--cache", "/var/lib/tidegate/weights", "--answer", "/dev/termination-log"]
    assert container["envFrom"] == [{"secretRef": {"name": "hf"}}]
    assert container["volumeMounts"] == [
        {"name": "tidegate-weights", "mountPath": "/var/lib/tidegate/weights"}
    ]
    assert {"name": "HF_HOME", "value": "/var/lib/tidegate/weights/huggingface"} in container["env"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert made["metadata"]["labels"]["tidegate.dev/model"] == "one"
    assert made["metadata"]["name"] == job_name("one", "0123456789") == "one-0123456789"


def test_a_model_without_a_secret_sees_none() -> None:
    assert "envFrom" not in job(named(), pool())["spec"]["template"]["spec"]["containers"][0]


def test_it_runs_where_the_replicas_will() -> None:
    groups = [{"name": "a", "nodeSelector": {"n": "a"}}, {"name": "b", "nodeSelector": {"n": "b"}}]
    chosen = job(named(resources={"accelerator": "b"}), pool(groups=groups))
    assert chosen["spec"]["template"]["spec"]["nodeSelector"] == {"n": "b"}
    assert "nodeSelector" not in job(named(), pool(groups=groups))["spec"]["template"]["spec"]
    assert job(named(), pool(groups=groups[:1]))["spec"]["template"]["spec"]["nodeSelector"] == {"n": "a"}


def test_a_claim_is_given_with_its_folder() -> None:
    machines = pool(
        volumes=[{"name": "m", "persistentVolumeClaim": {"claimName": "models"}}],
        volumeMounts=[{"name": "m", "mountPath": "/models"}],
    )
    wanted = named("pvc://models/llama")
    assert no_job_needed(Question(wanted), machines) is None
    container = job(wanted, machines)["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][:2] == ["--claim", "models=/models"]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("hf://a/b", "NoWeightCache"),
        ("s3://bucket/p", "NoWeightCache"),
        ("gs://bucket/p", "NoWeightCache"),
        ("pvc://other/p", "VolumeMissing"),
    ],
)
def test_what_can_never_work_needs_no_job(uri: str, reason: str) -> None:
    found = no_job_needed(Question(named(uri)), pool())
    assert found is not None
    assert (found.state, found.reason) == ("failed", reason)
    assert found.reason in {*Reason}


@pytest.mark.parametrize("uri", ["/models/x", "file:///models/x"])
def test_a_path_is_looked_at(uri: str) -> None:
    assert no_job_needed(Question(named(uri)), pool()) is None


def of_pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "one-0123456789-x"}, "spec": {"containers": []}, "status": status}


def ended(message: str, code: int = 0) -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "message": message}}
    return of_pod(phase="Succeeded", containerStatuses=[{"name": "resolve", "state": state}])


def a_job(*conditions: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "one-0123456789"}, "status": {"conditions": list(conditions)}}


COMPLETE = {"type": "Complete", "status": "True"}
FAILED = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "It took too long"}


def test_an_answer() -> None:
    found = read_job(a_job(COMPLETE), [ended(json.dumps(ANSWER))])
    assert (found.state, found.checkpoint, found.weights_bytes) == ("resolved", ANSWER["path"], 10)
    assert found.shape == DecoderShape(2, 1, 8, 16, 9, 64)
    assert (found.commit, found.quantization, found.precision) == ("abc", "gptq", "float16")
    assert found.digest == "d"
    assert not found.weights.is_known  # an image of the version before does not say it
    newer = ANSWER | {"weights": {"float_values": 3, "fixed_bytes": 4}, "something": "else"}
    assert read_job(a_job(COMPLETE), [ended(json.dumps(newer))]).weights == StoredWeights(3, 4)


@pytest.mark.parametrize("lacking", ["path", "weights_bytes", "quantization", "precision"])
def test_half_an_answer_is_none(lacking: str) -> None:
    assert read_answer(json.dumps({name: ANSWER[name] for name in ANSWER if name != lacking})) is None
    assert read_answer(json.dumps(ANSWER | {lacking: None})) is None


def test_a_failure_has_the_words_of_the_look() -> None:
    text = json.dumps({"error": {"reason": "Unauthorized", "message": "Set HF_TOKEN."}})
    found = read_job(a_job(FAILED), [ended(text, 1)])
    assert (found.state, found.reason, found.message) == ("failed", "Unauthorized", "Set HF_TOKEN.")


def test_while_it_runs() -> None:
    running = of_pod(phase="Running", containerStatuses=[{"name": "resolve", "state": {"running": {}}}])
    for pods in ([], [running]):
        assert read_job(a_job(), pods).state == "resolving"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hf" not found'}},
            "SecretMissing",
        ),
        ({"waiting": {"reason": "ErrImagePull", "message": "no"}}, "ImagePullFailed"),
        ({"terminated": {"reason": "OOMKilled", "exitCode": 137}}, "OutOfMemory"),
        ({"terminated": {"reason": "Error", "exitCode": 1, "message": "Traceback"}}, "CrashLoop"),
    ],
)
def test_a_pod_that_cannot_look(state: dict[str, Any], reason: str) -> None:
    pods = [of_pod(phase="Pending", containerStatuses=[{"name": "resolve", "state": state}])]
    found = read_job(a_job(), pods)
    assert (found.state, found.reason) == ("failed", reason)


def test_a_pod_that_a_quota_refuses_is_told_with_the_quotas_sentence() -> None:
    quota = 'pods "one-0123456789-x" is forbidden: exceeded quota: small, requested: limits.memory=2Gi'
    event = {
        "reason": "FailedCreate",
        "message": f"Error creating: {quota}",
        "involvedObject": {"kind": "Job", "name": "one-0123456789"},
    }
    other = {**event, "message": "another's", "involvedObject": {"kind": "Job", "name": "two-0123456789"}}
    found = read_job(a_job(), [], [other, event])
    assert (found.state, found.reason, found.is_unasked) == ("failed", "PodsRefused", False)
    assert quota in found.message
    assert "another's" not in found.message
    running = of_pod(phase="Running", containerStatuses=[{"name": "resolve", "state": {"running": {}}}])
    assert read_job(a_job(), [running], [event]).state == "resolving", "it passed"
    assert read_job(a_job(FAILED), [], [event]).reason == "JobFailed"


@pytest.mark.parametrize("verdict", [COMPLETE, FAILED])
def test_a_job_without_an_answer_has_failed(verdict: dict[str, Any]) -> None:
    found = read_job(a_job(verdict), [])
    assert (found.state, found.reason) == ("failed", "JobFailed")
