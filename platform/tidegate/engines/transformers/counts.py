"""What the transformers engine counts of its work, under names of its own (`GET /metrics/engines`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

PREFIX = "tidegate_engine_"
KV_CACHE_USAGE = f"{PREFIX}kv_cache_usage_ratio"


def _counted(meaning: str) -> int:
    return field(default=0, metadata={"meaning": meaning})


@dataclass(slots=True)
class Counts:
    """Since the model was loaded. The engine's thread writes, any may read."""

    steps: int = _counted("steps that computed something")
    step_seconds: float = _counted("time in these steps, by the clock")
    prefilled_tokens: int = _counted("tokens of prompts (and of answers that go on) that were computed")
    cached_tokens: int = _counted("tokens of prompts that the prefix cache held, so were not computed")
    given_back_requests: int = _counted(
        "requests that went back to the queue because others' tokens took the KV cache; they go on later"
    )
    proposed_tokens: int = _counted("tokens that prompt lookup proposed")
    accepted_tokens: int = _counted("proposed tokens that were the request's own")

    def metrics(self, kv_cache_usage: float) -> Iterator[Metric]:
        for each in fields(self):
            meaning = each.metadata["meaning"]
            yield CounterMetricFamily(PREFIX + each.name, meaning, value=getattr(self, each.name))
        meaning = "what running requests take of the KV cache, 0 to 1"
        yield GaugeMetricFamily(KV_CACHE_USAGE, meaning, value=kv_cache_usage)
