"""The paged pool on real models: what it answers, and when it is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine_requests import a_request, run
from tidegate.engines.base import Engine
from tidegate.engines.transformers import selfcheck
from tidegate.engines.transformers.batch import ArenaBatch
from tidegate.engines.transformers.kv import Arena
from tidegate.engines.transformers.paged import PagedPool

Load = Callable[..., Engine]


def kept_in(engine: Any) -> type:
    return type(engine._batch._arena)


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2", "qwen3_moe", "bloom"])
def test_answers_are_those_of_the_arena(load: Load, arch: str) -> None:
    """Full attention and windows, with a step of our own and through the model's forward pass; prompts that
    join together and in parts, that end and begin as others."""
    found = []
    for pages in (False, True):
        engine: Any = load(arch, args={"kv_pages": pages, "prefill_tokens_per_step": 60})
        assert kept_in(engine) is (PagedPool if pages else Arena)
        batch = engine._batch
        assert (batch.has_runs, batch.can_stage, batch.prefixes is not None) == (True, True, True)
        requests = [
            a_request(str(n), [9, 8, 7, 6] * (4 + n) + [3 + n] * (1 + 11 * n), max_tokens=8 + 5 * n)
            for n in range(8)
        ]
        results = run(engine, requests, apart=2)
        found.append({name: result.tokens for name, result in results.items()})
        again = run(engine, requests)
        assert {name: result.tokens for name, result in again.items()} == found[-1]
        cached = [result.finish.cached_tokens for result in again.values() if result.finish]
        assert max(cached) > 16
    assert found[0] == found[1]


class Misplaced(ArenaBatch):
    """Reads one token from another row's page."""

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        if isinstance(self._arena, PagedPool) and self.count > 1:
            self._arena._table[0, 0] = self._arena._table[1, 0]
        return super().decode(tokens)


def test_a_pool_that_differs_is_not_used(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "ArenaBatch", Misplaced)
    engine = load("llama", args={"kv_pages": True})
    assert kept_in(engine) is Arena


@pytest.mark.parametrize("arch", ["t5", "gpt_neo"])
def test_what_no_pool_can_hold_stays_where_it_was(load: Load, arch: str) -> None:
    """An encoder-decoder; and memory for one request, of which a page that is nobody's takes no place."""
    exactly_one_row = 4 * 1024 * (250 + 64)
    engine: Any = load(arch, context_length=250, kv_cache_bytes=exactly_one_row, args={"kv_pages": True})
    assert kept_in(engine) is (Arena if arch == "t5" else PagedPool)
    assert engine.free_slots() >= 1
    result = run(engine, [a_request("r", [5] * 100, max_tokens=150)])["r"]
    assert len(result.tokens) == 150
