"""Chooses tokens inside vLLM as the platform's own engine does: by the same steps and the same noise.

vLLM's own choice for a request with a temperature draws from a generator with state (its V1 runner), which no
other process can go on with. So every row is greedy to vLLM, and a row that is not greedy to us has but one
token left when vLLM looks. What vLLM knows of a row's parameters is its number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from tidegate.engines.transformers.generation_rules import Rules
from tidegate.engines.transformers.logit_steps import LogitStep, needed_steps
from tidegate.engines.transformers.sampling import choose
from tidegate.engines.vllm.messages import Added, Logprob
from tidegate.messages.work import Sampling

ROW = "tidegate_row"  # the extra argument that names it


class SentMask:
    """Stands for the matcher of a row whose grammar the replica follows: what may come next was sent."""

    forced: Sequence[int] = ()

    def __init__(self) -> None:
        self.masks = self
        self.allowed = np.zeros(0, dtype=np.int32)

    def words(self, matchers: Sequence[SentMask]) -> Any:
        return np.stack([matcher.allowed for matcher in matchers])


class Row:
    """Implements `sampling.Row`. `generated` begins with what earlier attempts emitted."""

    def __init__(self, added: Added, rules: Rules | None) -> None:
        self.sampling: Sampling = added.sampling
        self.prompt: Sequence[int] = added.prompt
        self.end_ids: Collection[int] = added.end_ids
        self.bad_words: Sequence[Sequence[int]] = added.bad_words
        self.rules = rules
        self.matcher: Any = SentMask() if added.has_grammar else None
        self.generated = list(added.generated)
        self._logged = len(added.generated)
        self.steps: Mapping[type[LogitStep], LogitStep] = needed_steps(self)

    def follow(self, output: Sequence[int]) -> None:
        """Take up what vLLM has made the row's own since the last step."""
        self.generated += output[len(self.generated) - self._logged :]


@dataclass
class Told:
    """What a step said of rows beside their tokens."""

    not_finite: list[int] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    logprobs: dict[int, Logprob] = field(default_factory=dict)


class Choices:
    """The rows that run, by number. `told` is of the step that is in progress, or was the last."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.told = Told()

    def processor(self) -> type[LogitsProcessor]:
        """Make the class that vLLM makes its processor of."""
        choices = self

        class Processor(LogitsProcessor):  # type: ignore[misc]
            def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002
                self._places: dict[int, tuple[int, Sequence[int]]] = {}  # (number, vLLM's own output)

            def is_argmax_invariant(self) -> bool:
                return False

            def update_state(self, batch_update: BatchUpdate | None) -> None:
                process_dict_updates(
                    self._places, batch_update, lambda params, _, output: (params.extra_args[ROW], output)
                )

            def apply(self, logits: Tensor) -> Tensor:
                # Without rows vLLM measures what a step takes.
                return choices.choose(logits, self._places) if self._places else logits

        return Processor

    def choose(self, logits: Tensor, places: Mapping[int, tuple[int, Sequence[int]]]) -> Tensor:
        """Choose for rows at `places` of `logits` [rows, vocabulary], fp32. Returns what vLLM chooses of."""
        numbers = [places[place][0] for place in range(len(logits))]
        rows = [self.rows[number] for number in numbers]
        for place, row in enumerate(rows):
            if row.steps:
                row.follow(places[place][1])
        chosen = choose(logits, rows)
        told = Told(logprobs={numbers[place]: found for place, found in chosen.logprobs.items()})
        if not all(chosen.finite):
            told.not_finite = [number for number, ok in zip(numbers, chosen.finite, strict=True) if not ok]
        if not all(chosen.open):
            told.closed = [number for number, ok in zip(numbers, chosen.open, strict=True) if not ok]
        self.told = told
        decided = [place for place, row in enumerate(rows) if row.steps or not chosen.finite[place]]
        if decided:
            logits[decided] = -torch.inf
            logits[decided, chosen.tokens[decided]] = 0.0
        return logits
