"""The schema: what it takes, what it refuses, and that each refusal names the field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.unit.control.builders import document, model
from tidegate.control.resources import Model, Pool, Strict
from tidegate.control.schema_types import size_bytes


def test_defaults_are_a_model_that_keeps_one_replica() -> None:
    spec = model().spec
    assert (spec.scaling.min_replicas, spec.scaling.max_replicas, spec.pool) == (1, 1, "default")
    assert spec.queue.max_requests == 1000


VLLM: dict[str, Any] = {"engine": {"name": "vllm"}, "source": {"uri": "/weights"}}


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"scaling": {"minReplicas": 3, "maxReplicas": 2}}, "minReplicas (3) is above maxReplicas (2)"),
        ({"scaling": {"minReplicas": -1}}, "minReplicas"),
        ({"scaling": {"zero": "Parked"}}, "the engine simulated has none"),
        ({"scaling": {"zero": "parked"}}, "zero"),
        ({"scaling": {"min_replicas": 1}}, "min_replicas"),
        ({"precision": "fp16"}, "precision"),
        ({"quantization": "awq"}, "quantization"),
        ({"licence": "mit"}, "licence"),
        ({"source": {"uri": "az://bucket/x"}}, "source.uri"),
        ({"source": {"uri": "hf://only-a-name"}}, "hf://owner/name"),
        ({"source": {"uri": "file://relative"}}, "file:///"),
        ({"source": {"uri": "x" * 3000}}, "source.uri"),
        ({"engine": {"name": "transformers"}}, "source.uri is missing"),
        ({"engine": {"name": "simulated", "args": {"Bad Name": 1}}}, "args"),
        ({"engine": {"name": "simulated", "args": {f"a{i}": i for i in range(33)}}}, "args"),
        ({"device": "cuda"}, "resources.gpus"),
        ({"device": "cpu", "resources": {"gpus": 1}}, "resources.gpus"),
        ({"resources": {"gpus": 1.5}}, "resources.gpus"),
        ({"resources": {"cpus": float("inf")}}, "resources.cpus"),
        ({"queue": {"maxWaitSeconds": 0}}, "queue.maxWaitSeconds"),
        ({"pool": "Default"}, "pool"),
        ({"quantization": "gptq"}, "quantization gptq"),
        (
            {"chatTemplate": "vicunja"},
            "spec.chatTemplate\n  Value error, there is no chat format 'vicunja'",
        ),
        ({"chatTemplate": "{{" + "x" * (1 << 16)}, "spec.chatTemplate"),
        ({"chatTemplate": "vicuna"}, "chatTemplate needs the engine transformers"),
        ({**VLLM, "task": "embed"}, "only the engine transformers does other tasks"),
        (
            {**VLLM, "engine": {"name": "vllm", "args": {"tensor_parallel_size": 2}}},
            "spec.engine.args\n  Value error, engine args have no tensor_parallel_size; known: threads,",
        ),
        (
            {**VLLM, "engine": {"name": "vllm", "args": {"enforce_eager": "yes"}}},
            "engine args: enforce_eager is 'yes': it must be `bool`, not `str`.",
        ),
        (
            {**VLLM, "engine": {"name": "vllm", "args": {"max_num_seqs": 9, "dtype": "half"}}},
            "no dtype (set spec.precision), max_num_seqs (set spec.engine.maxSlots); known: threads,",
        ),
        ({"engine": {"name": "transformers", "args": {"kv_page": True}}}, "no kv_page; known: threads,"),
        (
            {"engine": {"args": {"prompt_lookup_num_tokens": 64}}},
            "engine args: prompt_lookup_num_tokens is 64: it must be `int` <= 32.",
        ),
    ],
)
def test_a_wrong_field_is_refused_by_name(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        model(**spec)
    assert field in str(refused.value)


@pytest.mark.parametrize("name", ["", "Upper", "dot.ted", "-dash", "x" * 53, "a/b"])
def test_names_are_dns_labels(name: str) -> None:
    with pytest.raises(ValidationError, match=r"metadata\.name"):
        Model.model_validate(document(name))


def test_every_field_has_a_description_or_fields_of_its_own() -> None:
    missing = [
        f"{kind.__name__}.{name}"
        for kind in Strict.__subclasses__()
        for name, info in kind.model_fields.items()
        if not info.description
        and not (isinstance(info.annotation, type) and issubclass(info.annotation, Strict))
        and name not in ("api_version", "kind")
    ]
    assert missing == []


def test_vllm_takes_packed_weights_a_chat_format_and_its_own_arguments() -> None:
    args = {"enforce_eager": True, "threads": 2}
    spec = model(
        source={"uri": "/weights"},
        engine={"name": "vllm", "args": args},
        quantization="gptq",
        chatTemplate="vicuna",
    ).spec
    assert (spec.engine.name, spec.engine.args) == ("vllm", args)


def test_a_pool_bounds_revisions_and_builds() -> None:
    pool = Pool.model_validate(
        {"apiVersion": "tidegate.dev/v1alpha1", "kind": "Pool", "metadata": {"name": "default"}}
    )
    assert (pool.spec.max_live_revisions, pool.spec.max_unbuilt) == (60, 4)


def pool(**spec: Any) -> Pool:
    return Pool.model_validate(
        {"apiVersion": "tidegate.dev/v1alpha1", "kind": "Pool", "metadata": {"name": "p"}, "spec": spec}
    )


def test_a_pool_without_groups_has_one_of_cpus() -> None:
    (group,) = pool().spec.groups
    assert (group.name, group.gpus, group.gpu_memory_bytes, group.min_workers) == ("cpu", 0, 0, 0)
    assert (group.cpu_cores, group.memory_bytes) == (1.0, 4 << 30)
    assert pool().spec.fault_tolerance.enabled


@pytest.mark.parametrize(
    "uri",
    [
        "weights/mine",
        "/weights/mine",
        "file:///weights",
        "hf://owner/name",
        "hf://owner/name@main",
        "s3://bucket/a/prefix",
        "s3://bucket",
        "gs://my_bucket/a/prefix",
        "pvc://claim/a/path",
    ],
)
def test_sources_of_every_sort(uri: str) -> None:
    source = model(source={"uri": uri, "secretRef": {"name": "hub"}}).spec.source
    assert source is not None
    assert source.uri == uri


@pytest.mark.parametrize(
    ("quantity", "size"),
    [
        ("1", 1),
        ("500k", 500_000),
        ("3Ki", 3072),
        ("1.5Mi", 1_572_864),
        ("20G", 20_000_000_000),
        ("80Gi", 80 << 30),
        ("2T", 2_000_000_000_000),
        (1024, 1024),
        (2.0, 2),
    ],
)
def test_quantities_of_memory(quantity: str | float, size: int) -> None:
    assert pool(head={"memory": quantity}).spec.head.memory_bytes == size
    assert size_bytes(pool(head={"memory": quantity}).spec.head_memory) == size
    assert model(resources={"gpuMemory": quantity}).spec.resources.gpu_memory_bytes == size


@pytest.mark.parametrize(
    ("revisions", "unbuilt", "memory"),
    [(8, 4, "3Gi"), (60, 4, "4Gi"), (100, 4, "5Gi"), (100, 1, "5Gi"), (200, 4, "8Gi")],
)
def test_a_heads_memory_follows_from_what_may_stand(revisions: int, unbuilt: int, memory: str) -> None:
    assert pool(maxLiveRevisions=revisions, maxUnbuilt=unbuilt).spec.head_memory == memory


@pytest.mark.parametrize(
    ("quantity", "cores"), [("2", 2.0), (3, 3.0), ("500m", 0.5), ("1.25", 1.25), ("0.05", 0.05)]
)
def test_quantities_of_cpus(quantity: str | int, cores: float) -> None:
    assert pool(head={"cpus": quantity}).spec.head.cpu_cores == cores


@pytest.mark.parametrize("quantity", ["", "0", "0.5Gi", "-1", "1 Gi", "4GB", "1e9", "Gi", 1.5, True, 0, None])
def test_what_is_no_quantity_is_refused(quantity: object) -> None:
    with pytest.raises(ValidationError, match=r"spec\.sharedMemory"):
        pool(sharedMemory=quantity)


def test_an_empty_quantity_is_unset_where_that_means_something() -> None:
    assert model(resources={"gpuMemory": "", "memory": ""}).spec.resources.memory_bytes == 0
    assert pool(head={"memory": ""}).spec.head.memory_bytes == 0


def test_volumes_pass_with_fields_that_only_kubernetes_knows() -> None:
    claim = {"name": "w", "persistentVolumeClaim": {"claimName": "weights", "readOnly": True}}
    spec = pool(volumes=[claim], volumeMounts=[{"name": "w", "mountPath": "/w", "subPath": "a"}]).spec
    assert spec.volumes[0].model_dump(by_alias=True) == claim
    assert spec.volume_mounts[0].model_dump(by_alias=True)["subPath"] == "a"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"groups": [{"name": "a"}, {"name": "a"}]}, "'a' is given twice"),
        ({"groups": [{"name": "a", "gpus": 1}]}, "gpuMemory is missing"),
        ({"groups": [{"name": "a", "minWorkers": 3}]}, "minWorkers (3) is above maxWorkers (1)"),
        ({"weightCache": {"claim": "a", "hostPath": "/b"}}, "one of claim and hostPath"),
        ({"volumeMounts": [{"name": "a", "mountPath": "/a"}]}, "volumeMounts names ['a']"),
        ({"env": [{"name": "A"}, {"name": "A"}]}, "env name 'A' is given twice"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        pool(**spec)
    assert field in str(refused.value)


@pytest.mark.parametrize("resources", [{"gpus": 0.5}, {"gpuMemory": "1Gi"}, {"accelerator": "l4"}])
def test_cuda_is_asked_for_in_one_of_three_ways(resources: dict[str, Any]) -> None:
    assert model(device="cuda", resources=resources).spec.device == "cuda"
