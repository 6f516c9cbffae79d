"""Kubernetes objects for the operator's tests, as the API server gives them."""

from __future__ import annotations

import datetime
from typing import Any

from tidegate_operator.pod_template import GENERATION_LABEL, POOL_LABEL

NOW = 1_800_000_000.0


def stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def model_body(name: str = "one", namespace: str = "models", **changes: Any) -> dict[str, Any]:
    """`changes`: spec, status, and fields of the metadata."""
    spec = changes.pop("spec", {"engine": {"name": "simulated"}})
    status = changes.pop("status", {})
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "Model",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{namespace}-{name}",
            "resourceVersion": "1",
            "generation": 1,
            "creationTimestamp": stamp(NOW - 100),
            **changes,
        },
        "spec": spec,
        "status": status,
    }


def cluster_body(generation: str, pool: str = "default", **changes: Any) -> dict[str, Any]:
    status = changes.pop("status", {})
    spec = changes.pop("spec", {})
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": f"{pool}-{generation}",
            "namespace": "models",
            "uid": f"uid-{pool}-{generation}",
            "resourceVersion": "1",
            "creationTimestamp": stamp(NOW - 100),
            "labels": {POOL_LABEL: pool, GENERATION_LABEL: generation},
            **changes,
        },
        "spec": spec,
        "status": status,
    }


def pod_body(name: str, labels: dict[str, str], phase: str = "Running", **changes: Any) -> dict[str, Any]:
    status = changes.pop("status", {})
    spec = changes.pop("spec", {})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "models",
            "uid": f"uid-{name}",
            "resourceVersion": "1",
            "creationTimestamp": stamp(NOW - 100),
            "labels": labels,
            **changes,
        },
        "spec": spec,
        "status": {"phase": phase, **status},
    }
