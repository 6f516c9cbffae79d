"""What an operator that leads tells of Models, Pools and namespaces."""

from __future__ import annotations

from tests.unit.operator.bodies import model_body
from tidegate_operator.cache import Cache
from tidegate_operator.metrics import Metrics


def shown(metrics: Metrics) -> list[str]:
    lines = metrics.text().decode().splitlines()
    return sorted(line for line in lines if "_ready{" in line)


def test_readiness_is_that_of_the_cache_when_asked() -> None:
    metrics, cache, followed = Metrics(), Cache(), {"models": True, "gone": False}
    metrics.show(cache, followed, followed.__getitem__)
    namespaces = [
        'tidegate_namespace_ready{resource_namespace="gone"} 0.0',
        'tidegate_namespace_ready{resource_namespace="models"} 1.0',
    ]
    assert shown(metrics) == namespaces
    for name, status in (("a", "True"), ("b", "False"), ("c", None)):
        conditions = [{"type": "Degraded", "status": "True"}]
        if status:
            conditions.append({"type": "Ready", "status": status})
        cache.put("Model", {**model_body(name), "status": {"conditions": conditions}})
    going = model_body("d")
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    cache.put("Model", going)
    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    cache.put("Pool", {**model_body("default"), "kind": "Pool", "status": ready})
    where = model_body("a")["metadata"]["namespace"]
    assert shown(metrics) == sorted(
        [
            f'tidegate_model_ready{{model="a",pool="default",resource_namespace="{where}"}} 1.0',
            f'tidegate_model_ready{{model="b",pool="default",resource_namespace="{where}"}} 0.0',
            f'tidegate_model_ready{{model="c",pool="default",resource_namespace="{where}"}} 0.0',
            f'tidegate_pool_ready{{pool="default",resource_namespace="{where}"}} 1.0',
            *namespaces,
        ]
    )
