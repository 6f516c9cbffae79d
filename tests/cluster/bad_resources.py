"""Resources that must be refused, each with the field that the refusal has to name.

The cluster's tests send each to the API server as a dry run; `tests/unit/operator/test_crd.py` shows the same
of pydantic and of the schema alone, as far as they can know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

API_VERSION = "tidegate.dev/v1alpha1"


@dataclass(frozen=True, slots=True)
class Bad:
    """`says` is what the API server's refusal contains: the field's path.

    `by` is which part of the CRD refuses it: the schema, a rule in CEL, the decoder (an unknown field, with
    strict field validation), the keys of a list. With `before` that resource is made first and `document`
    changes it. `is_local` tells whether pydantic refuses it too.
    """

    name: str
    document: dict[str, Any]
    says: str
    by: Literal["schema", "rule", "decoder", "keys"] = "schema"
    before: dict[str, Any] | None = None
    is_local: bool = field(default=True, kw_only=True)


def model(spec: dict[str, Any] | None = None, name: str = "bad", **more: Any) -> dict[str, Any]:
    """A simulated Model, so that the one thing wrong with it is what `spec` says."""
    whole = {"engine": {"name": "simulated"}, **(spec or {})}
    return {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": name}, "spec": whole, **more}


def pool(spec: dict[str, Any] | None = None, name: str = "bad") -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": "Pool", "metadata": {"name": name}, "spec": spec or {}}


def group(**fields: Any) -> dict[str, Any]:
    """A Pool with one group."""
    return pool({"groups": [{"name": "cpu", **fields}]})


def rolling(**fields: Any) -> dict[str, Any]:
    return model({"rollout": fields})


def probed(**fields: Any) -> dict[str, Any]:
    return rolling(probes=[fields])


def source(uri: str, **fields: Any) -> dict[str, Any]:
    return model({"engine": {"name": "transformers"}, "source": {"uri": uri, **fields}})


LONG = "x" * 3000

BAD_MODELS = (
    Bad("no spec", {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": "bad"}}, "spec"),
    Bad("name too long", model(name="x" * 53), "metadata.name"),
    Bad("name with a dot", model(name="a.b"), "metadata.name"),
    Bad("unknown field", model({"licence": "mit"}), "spec.licence", "decoder"),
    Bad("unknown nested field", model({"scaling": {"minReplica": 1}}), "spec.scaling.minReplica", "decoder"),
    Bad("snake case", model({"context_length": 1}), "spec.context_length", "decoder"),
    Bad("a step of 0 %", rolling(steps=[{"weight": 0}, {"weight": 100}]), "spec.rollout.steps[0].weight"),
    Bad("another strategy", rolling(strategy="Linear"), "spec.rollout.strategy"),
    Bad("steps without an end", rolling(steps=[{"weight": 50}]), "spec.rollout.steps", "rule"),
    Bad(
        "steps that shrink",
        rolling(steps=[{"weight": 50}, {"weight": 20}, {"weight": 100}]),
        "spec.rollout.steps",
        "rule",
    ),
    Bad(
        "a step twice",
        rolling(steps=[{"weight": 50}, {"weight": 50}, {"weight": 100}]),
        "spec.rollout.steps",
        "rule",
    ),
    Bad(
        "steps of BlueGreen",
        rolling(strategy="BlueGreen", steps=[{"weight": 50}, {"weight": 100}]),
        "spec.rollout.steps",
        "rule",
    ),
    Bad(
        "Recreate keeps some",
        rolling(strategy="Recreate", minAvailable=1),
        "spec.rollout.minAvailable",
        "rule",
    ),
    Bad("a shadow of Recreate", rolling(strategy="Recreate", shadow={}), "spec.rollout.shadow", "rule"),
    Bad("more available than there are", rolling(minAvailable=2), "spec.rollout", "rule"),
    Bad(
        "two bounds of a surge",
        model({"rollout": {"maxSurge": 1, "maxSurgeAccelerators": 0.5}, "resources": {"gpus": 1}}),
        "spec.rollout.maxSurgeAccelerators",
        "rule",
    ),
    Bad(
        "two bounds of what is kept",
        model({"rollout": {"minAvailable": 1, "minAvailableAccelerators": 0.5}, "resources": {"gpus": 1}}),
        "spec.rollout.minAvailableAccelerators",
        "rule",
    ),
    Bad("accelerators of a CPU", rolling(maxSurgeAccelerators=1), "spec.rollout", "rule"),
    Bad("a probe without a question", probed(expect="a"), "spec.rollout.probes[0]", "rule"),
    Bad("a probe without an answer", probed(prompt="a"), "spec.rollout.probes[0]", "rule"),
    Bad(
        "a probe with two answers",
        probed(prompt="a", expect="b", pattern="c"),
        "spec.rollout.probes[0]",
        "rule",
    ),
    Bad(
        "probes of what generates nothing",
        model(
            {
                "engine": {"name": "transformers"},
                "source": {"uri": "/w"},
                "task": "embed",
                "rollout": {"probes": [{"prompt": "a", "expect": "b"}]},
            }
        ),
        "spec.rollout",
        "rule",
    ),
    Bad("a margin of everything", rolling(margin=1), "spec.rollout.margin"),
    Bad("no source", model({"engine": {"name": "transformers"}}), "spec.source", "rule"),
    Bad("source without uri", model({"source": {}}), "spec.source.uri"),
    Bad("empty uri", source(""), "spec.source.uri"),
    Bad("uri too long", source("/" + LONG), "spec.source.uri"),
    Bad("uri with an unknown scheme", source("az://bucket/x"), "spec.source.uri", "rule"),
    Bad("hub uri without an owner", source("hf://only-a-name"), "spec.source.uri", "rule"),
    Bad("hub uri with a space", source("hf://owner/a name"), "spec.source.uri", "rule"),
    Bad("bucket with capitals", source("s3://Bucket/x"), "spec.source.uri", "rule"),
    Bad("Google bucket with capitals", source("gs://Bucket/x"), "spec.source.uri", "rule"),
    Bad("claim with capitals", source("pvc://Claim/x"), "spec.source.uri", "rule"),
    Bad("file uri without a root", source("file://relative"), "spec.source.uri", "rule"),
    Bad("relative path", source("./weights"), "spec.source.uri", "rule", is_local=False),
    Bad("Secret without a name", source("/w", secretRef={}), "spec.source.secretRef.name"),
    Bad("Secret with capitals", source("/w", secretRef={"name": "Hub"}), "spec.source.secretRef.name"),
    Bad("unknown task", model({"task": "chat"}), "spec.task"),
    Bad("unknown engine", model({"engine": {"name": "warp"}}), "spec.engine.name"),
    Bad("slots below zero", model({"engine": {"name": "simulated", "maxSlots": -1}}), "spec.engine.maxSlots"),
    Bad(
        "KV cache as text",
        model({"engine": {"name": "simulated", "kvCacheBytes": "1Gi"}}),
        "spec.engine.kvCacheBytes",
    ),
    Bad(
        "engine argument that is a list",
        model({"engine": {"name": "simulated", "args": {"a": [1]}}}),
        "spec.engine.args.a",
    ),
    Bad(
        "engine argument that is too long",
        model({"engine": {"name": "simulated", "args": {"a": LONG}}}),
        "spec.engine.args.a",
    ),
    Bad(
        "too many engine arguments",
        model({"engine": {"name": "simulated", "args": {f"a{i}": i for i in range(33)}}}),
        "spec.engine.args",
    ),
    Bad("unknown precision", model({"precision": "fp16"}), "spec.precision"),
    Bad("unknown quantization", model({"quantization": "awq"}), "spec.quantization"),
    Bad("gptq without transformers", model({"quantization": "gptq"}), "spec.quantization", "rule"),
    Bad("context as text", model({"contextLength": "8k"}), "spec.contextLength"),
    Bad("context too long", model({"contextLength": 1 << 25}), "spec.contextLength"),
    Bad("unknown device", model({"device": "tpu"}), "spec.device"),
    Bad("cuda without GPUs", model({"device": "cuda"}), "spec.device", "rule"),
    Bad("cpu with GPUs", model({"device": "cpu", "resources": {"gpus": 1}}), "spec.device", "rule"),
    Bad(
        "cpu with GPU memory",
        model({"device": "cpu", "resources": {"gpuMemory": "1Gi"}}),
        "spec.device",
        "rule",
    ),
    Bad("CPUs below zero", model({"resources": {"cpus": -1}}), "spec.resources.cpus"),
    Bad("one and a half GPUs", model({"resources": {"gpus": 1.5}}), "spec.resources.gpus", "rule"),
    Bad("group with capitals", model({"resources": {"accelerator": "A100"}}), "spec.resources.accelerator"),
    Bad("memory without a number", model({"resources": {"memory": "lots"}}), "spec.resources.memory"),
    Bad("no GPU memory at all", model({"resources": {"gpuMemory": 0}}), "spec.resources.gpuMemory"),
    Bad(
        "min above max",
        model({"scaling": {"minReplicas": 3, "maxReplicas": 2}}),
        "spec.scaling.minReplicas",
        "rule",
    ),
    Bad(
        "min above max's default", model({"scaling": {"minReplicas": 2}}), "spec.scaling.minReplicas", "rule"
    ),
    Bad("min below zero", model({"scaling": {"minReplicas": -1}}), "spec.scaling.minReplicas"),
    Bad("no replica at most", model({"scaling": {"minReplicas": 0, "maxReplicas": 0}}), "spec.scaling.max"),
    Bad("too many replicas", model({"scaling": {"maxReplicas": 65}}), "spec.scaling.maxReplicas"),
    Bad(
        "a day and more of idleness", model({"scaling": {"idleSeconds": 90_000}}), "spec.scaling.idleSeconds"
    ),
    Bad("no wait", model({"queue": {"maxWaitSeconds": 0}}), "spec.queue.maxWaitSeconds"),
    Bad("queue of no bytes", model({"queue": {"maxBytes": 1}}), "spec.queue.maxBytes"),
    Bad("queue as a list", model({"queue": [1]}), "spec.queue"),
    Bad("pool with capitals", model({"pool": "Default"}), "spec.pool"),
    Bad("pool with a digit in front", model({"pool": "1st"}), "spec.pool"),
    Bad(
        "another pool", model({"pool": "b"}), "spec.pool", "rule", before=model({"pool": "a"}), is_local=False
    ),
)

BAD_POOLS = (
    Bad("name too long", pool(name="x" * 41), "metadata.name"),
    Bad("name with a digit in front", pool(name="1st"), "metadata.name"),
    Bad("unknown field", pool({"replicas": 1}), "spec.replicas", "decoder"),
    Bad("unknown field of a group", group(gpu=1), "spec.groups[0].gpu", "decoder"),
    Bad("no live revision", pool({"maxLiveRevisions": 0}), "spec.maxLiveRevisions"),
    Bad("five unbuilt", pool({"maxUnbuilt": 5}), "spec.maxUnbuilt"),
    Bad("image with a space", pool({"image": "ray image"}), "spec.image"),
    Bad("unknown pull policy", pool({"imagePullPolicy": "Sometimes"}), "spec.imagePullPolicy"),
    Bad("pull secret without a name", pool({"imagePullSecrets": [{}]}), "spec.imagePullSecrets[0].name"),
    Bad("version without a patch", pool({"rayVersion": "2.60"}), "spec.rayVersion"),
    Bad("head with half a byte", pool({"head": {"memory": "0.5"}}), "spec.head.memory"),
    Bad("head without CPUs", pool({"head": {"cpus": "0"}}), "spec.head.cpus"),
    Bad("no group", pool({"groups": []}), "spec.groups"),
    Bad("too many groups", pool({"groups": [{"name": f"g{i}"} for i in range(17)]}), "spec.groups"),
    Bad("group without a name", pool({"groups": [{"gpus": 0}]}), "spec.groups[0].name"),
    Bad("group twice", pool({"groups": [{"name": "a"}, {"name": "a"}]}), "spec.groups[1]", "keys"),
    Bad("GPUs below zero", group(gpus=-1), "spec.groups[0].gpus"),
    Bad("GPUs without memory", group(gpus=1), "spec.groups[0].gpuMemory", "rule"),
    Bad("memory without GPUs", group(gpuMemory="1Gi"), "spec.groups[0].gpuMemory", "rule"),
    Bad("GPU resource without a domain", group(gpuResource="gpu"), "spec.groups[0].gpuResource"),
    Bad("memory with a wrong unit", group(memory="4GB"), "spec.groups[0].memory"),
    Bad("min above max", group(minWorkers=2, maxWorkers=1), "spec.groups[0].minWorkers", "rule"),
    Bad("no worker at most", group(maxWorkers=0), "spec.groups[0].maxWorkers"),
    Bad(
        "node label that is no label", group(nodeSelector={"a b": "c"}), "spec.groups[0].nodeSelector", "rule"
    ),
    Bad("node label with a number", group(nodeSelector={"a": 1}), "spec.groups[0].nodeSelector.a"),
    Bad(
        "toleration of an unknown effect",
        group(tolerations=[{"key": "a", "effect": "Never"}]),
        "spec.groups[0].tolerations[0].effect",
    ),
    Bad(
        "toleration without a key",
        group(tolerations=[{"effect": "NoSchedule"}]),
        "spec.groups[0].tolerations[0].operator",
        "rule",
    ),
    Bad("overrides as a list", group(podOverrides=[1]), "spec.groups[0].podOverrides"),
    Bad("no shared memory", pool({"sharedMemory": ""}), "spec.sharedMemory"),
    Bad("cache of nothing", pool({"weightCache": {}}), "spec.weightCache", "rule"),
    Bad("cache twice", pool({"weightCache": {"claim": "a", "hostPath": "/b"}}), "spec.weightCache", "rule"),
    Bad("relative node path", pool({"weightCache": {"hostPath": "b"}}), "spec.weightCache.hostPath"),
    Bad(
        "node path upwards",
        pool({"weightCache": {"hostPath": "/a/../b"}}),
        "spec.weightCache.hostPath",
        "rule",
    ),
    Bad("volume without a name", pool({"volumes": [{"emptyDir": {}}]}), "spec.volumes[0].name"),
    Bad(
        "mount of no volume",
        pool({"volumeMounts": [{"name": "a", "mountPath": "/a"}]}),
        "spec.volumeMounts",
        "rule",
    ),
    Bad("variable with a dash", pool({"env": [{"name": "A-B"}]}), "spec.env[0].name"),
    Bad("variable twice", pool({"env": [{"name": "A"}, {"name": "A", "value": "b"}]}), "spec.env[1]", "keys"),
    Bad("variable as a number", pool({"env": [{"name": "A", "value": 1}]}), "spec.env[0].value"),
    Bad("idle at once", pool({"workerIdleSeconds": 0}), "spec.workerIdleSeconds"),
    Bad("unknown upgrade", pool({"upgrade": "Rolling"}), "spec.upgrade"),
    Bad(
        "Redis address without a port",
        pool({"faultTolerance": {"redisAddress": "redis"}}),
        "spec.faultTolerance.redisAddress",
    ),
    Bad(
        "fault tolerance as text",
        pool({"faultTolerance": {"enabled": "perhaps"}}),
        "spec.faultTolerance.enabled",
    ),
)

BAD_RESOURCES = BAD_MODELS + BAD_POOLS
