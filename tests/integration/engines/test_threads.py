"""How many threads a step takes is tried while requests run, and nobody's tokens depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.engine_requests import a_request, run
from tidegate.engines.base import Engine
from tidegate.engines.transformers import engine as engine_module
from tidegate.engines.transformers.engine import TransformersEngine


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_tokens_stay_the_same_while_numbers_of_threads_are_tried(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [a_request(str(row), [5 + row] * (4 + row), max_tokens=40) for row in range(6)]
    expected = run(load("llama"), requests)
    monkeypatch.setattr(engine_module, "usable_cores", lambda: 2)
    engine = load("llama", args={"threads": 0})
    assert isinstance(engine, TransformersEngine)
    taken: set[int] = set()
    decode = engine._batch.decode

    def noting(tokens: torch.Tensor) -> torch.Tensor:
        taken.add(torch.get_num_threads())
        return decode(tokens)

    monkeypatch.setattr(engine._batch, "decode", noting)
    found = run(engine, requests)
    assert taken == {1, 2}
    assert {name: one.tokens for name, one in found.items()} == {
        name: one.tokens for name, one in expected.items()
    }
