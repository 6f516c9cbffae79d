"""The schema: what it takes, what it refuses, and that each refusal names the field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.unit.control.builders import document, model
from tidegate.control.resources import Model, Pool, Strict


def test_defaults_are_a_model_that_keeps_one_replica() -> None:
    spec = model().spec
    assert (spec.scaling.min_replicas, spec.scaling.max_replicas, spec.pool) == (1, 1, "default")
    assert spec.queue.max_requests == 1000


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"scaling": {"minReplicas": 3, "maxReplicas": 2}}, "minReplicas (3) is above maxReplicas (2)"),
        ({"scaling": {"minReplicas": -1}}, "minReplicas"),
        ({"scaling": {"min_replicas": 1}}, "min_replicas"),
        ({"precision": "fp16"}, "precision"),
        ({"quantization": "awq"}, "quantization"),
        ({"licence": "mit"}, "licence"),
        ({"source": {"uri": "s3://bucket/x"}}, "source.uri"),
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


def test_a_pool_bounds_revisions_and_builds() -> None:
    pool = Pool.model_validate(
        {"apiVersion": "tidegate.dev/v1alpha1", "kind": "Pool", "metadata": {"name": "default"}}
    )
    assert (pool.spec.max_live_revisions, pool.spec.max_unbuilt) == (60, 4)
