"""The control API that commands speak to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cli.control_api import ControlApi, ScriptedHost, control_api
from tidegate.control_api.views import ModelView
from tidegate.messages.registry import Condition, ModelEntry, ReplicaStats


@pytest.fixture
def model() -> ModelView:
    """A model that serves."""
    entry = ModelEntry(
        name="bold",
        created=1,
        task="text-generation",
        engine="transformers",
        precision="bfloat16",
        quantization="gptq",
        revisions={"0123456789": 100},
        accepts=True,
        ready=True,
        reason="Serving",
        message="One replica serves.",
        replicas_ready=1,
        replicas_wanted=2,
        weights_bytes=18_000_000,
        conditions=[Condition("Ready", "True", "Serving", "One replica serves.")],
    )
    replica = ReplicaStats("bold#1", "bold", "0123456789", 4711, "node", 0.0, 0.0, 8, 3, 100, 52.5)
    spec = {"source": {"uri": "/models/bold"}, "scaling": {"minReplicas": 1, "maxReplicas": 2}}
    return ModelView(
        "bold",
        "",
        "default",
        "7",
        spec,
        is_observed=True,
        entry=entry,
        tokens_per_second=52.5,
        replicas=[replica],
    )


@pytest.fixture
def api(model: ModelView, redis_url: str, key_prefix: str, tmp_path: Path) -> Iterator[ControlApi]:
    with control_api(ScriptedHost(model), redis_url, key_prefix, tmp_path) as api:
        yield api
