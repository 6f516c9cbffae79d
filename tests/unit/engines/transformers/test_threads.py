from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from tidegate.engines.transformers import threads as threads_module
from tidegate.engines.transformers.batch import OneAtATime
from tidegate.engines.transformers.head import InParts
from tidegate.engines.transformers.threads import MOST_STEPS, choose_threads, step_seconds


class FakeBatch(OneAtATime):
    """Counts rows and steps; its speed is the test's clock."""

    def __init__(self) -> None:
        self.count = 0

    def join(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        sources: Sequence[Sequence[int]] = (),
        every: InParts | None = None,
    ) -> torch.Tensor:
        self.count += len(sequences)
        return torch.zeros(len(sequences), 4)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        assert len(tokens) == self.count
        return torch.zeros(self.count, 4)

    def leave(self, row: int, *, clear: bool = False) -> None:
        assert row < self.count
        self.count -= 1


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("alone", "together", "expected"), [(1.0, 0.6, 2), (1.0, 0.9, 1), (1.0, 1.5, 1)])
def test_more_threads_have_to_be_worth_it(
    monkeypatch: pytest.MonkeyPatch, alone: float, together: float, expected: int
) -> None:
    monkeypatch.setattr(
        threads_module, "step_seconds", lambda _step: alone if torch.get_num_threads() == 1 else together
    )
    batch = FakeBatch()
    assert choose_threads(batch, 2, 16) == expected == torch.get_num_threads()
    assert batch.count == 0


def test_one_core_needs_no_trial() -> None:
    assert choose_threads(FakeBatch(), 1, 16) == 1


def test_a_trial_takes_a_bounded_number_of_steps() -> None:
    steps: list[int] = []
    assert step_seconds(lambda: steps.append(1)) >= 0
    assert len(steps) == MOST_STEPS + 1
