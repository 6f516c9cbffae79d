"""What the transformers engine counts, as who scrapes the gateway reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine_requests import a_request, add, run, run_one
from tidegate.engines.base import Engine, HasMetrics
from tidegate.engines.transformers.counts import KV_CACHE_USAGE, PREFIX
from tidegate.messages.engine_metrics import exposition, pack

Load = Callable[..., Engine]
LABELS = {"model_name": "m", "revision": "r", "replica": "a"}
PAGE = Path(__file__).parents[3] / "platform" / "docs" / "reference" / "metrics.md"


def told(engine: Engine) -> dict[str, float]:
    """The value of each sample, by its name without the common beginning."""
    assert isinstance(engine, HasMetrics)
    text = exposition([pack(engine.own_metrics(LABELS))])
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels == LABELS for sample in samples)
    return {sample.name.removeprefix(PREFIX): sample.value for sample in samples}


def test_steps_and_tokens_are_counted(load: Load) -> None:
    engine = load("llama")
    assert set(told(engine).values()) == {0.0}, "what the self-check did is nobody's work"
    run(engine, [a_request(str(row), [3 + row] * 40, max_tokens=5) for row in range(2)])
    found = told(engine)
    assert found["prefilled_tokens_total"] == 80
    assert found["steps_total"] == 5
    assert found["step_seconds_total"] > 0
    again = run_one(engine, a_request("again", [3] * 40, max_tokens=5))
    assert again.finish is not None
    assert told(engine)["cached_tokens_total"] == again.finish.cached_tokens > 0
    assert told(engine)["prefilled_tokens_total"] == 80 + 40 - again.finish.cached_tokens


def test_the_kv_cache_is_as_full_as_its_requests_make_it(load: Load) -> None:
    engine = load("llama")
    add(engine, a_request("r", [5] * 30, max_tokens=50))
    engine.step()
    one = told(engine)[KV_CACHE_USAGE.removeprefix(PREFIX)]
    add(engine, a_request("s", [6] * 30, max_tokens=50))
    engine.step()
    assert 0 < one < told(engine)[KV_CACHE_USAGE.removeprefix(PREFIX)] <= 1
    engine.abort("r")
    engine.abort("s")
    assert told(engine)[KV_CACHE_USAGE.removeprefix(PREFIX)] == 0


def test_what_was_given_back_and_what_was_proposed(load: Load) -> None:
    engine = load(
        "llama", context_length=192, kv_cache_bytes=300 * 1024, args={"prompt_lookup_num_tokens": 6}
    )
    for row in range(6):
        add(engine, a_request(str(row), [7, 8, 9] * 6, max_tokens=150, allowed_token_ids=(20, 21)))
    back = 0
    while engine.has_work():
        back += sum(output.is_given_back for output in engine.step())
    found = told(engine)
    assert found["given_back_requests_total"] == back > 0
    assert 0 < found["accepted_tokens_total"] <= found["proposed_tokens_total"]


def test_the_reference_lists_them(load: Load) -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [name for name in told(load("llama")) if f"`{PREFIX}{name}`" not in page]
    assert not missing


@pytest.mark.parametrize("value", ['a"b', "line\nend", "back\\slash"])
def test_labels_are_escaped(load: Load, value: str) -> None:
    engine = load("llama")
    assert isinstance(engine, HasMetrics)
    text = exposition([pack(engine.own_metrics({"replica": value}))])
    (family,) = [one for one in text_string_to_metric_families(text) if one.name == KV_CACHE_USAGE]
    assert family.samples[0].labels == {"replica": value}
