"""What the engine has under way: proposed tokens, tokens that the host has not seen, a part of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tidegate.engines.base import StepOutput, is_out_of_memory
from tidegate.engines.transformers.batch import Staged
from tidegate.engines.transformers.language import failed_alone
from tidegate.engines.transformers.logprobs import PrefillLogprobs
from tidegate.engines.transformers.sampling import Choice, Chosen
from tidegate.engines.transformers.sequence import RunningSequence


class Ahead(NamedTuple):
    """What a step has computed of tokens that were proposed to its rows."""

    proposed: list[list[int]]  # of each row
    logits: Tensor  # [rows, columns, vocabulary], after the last token of each and what is proposed behind it

    def first(self) -> Tensor:
        """Return logits [rows, vocabulary] after the last token of each row."""
        return self.after(range(len(self.proposed)), 0)

    def after(self, rows: Sequence[int], count: int) -> Tensor:
        """Return logits [rows, vocabulary] after `count` of what is proposed to each of these rows."""
        columns = [self.logits.shape[1] - 1 - len(self.proposed[row]) + count for row in rows]
        return self.logits[list(rows), columns]


class Flight(NamedTuple):
    """A step whose tokens the host has not seen."""

    running: list[RunningSequence]  # the rows as they were
    choice: Choice


class Part(NamedTuple):
    """The prompt that is prefilled over several steps, and the log probabilities that come of it."""

    staged: Staged
    asked: PrefillLogprobs | None


def accept(sequence: RunningSequence, chosen: Chosen, place: int) -> StepOutput:
    """Give a request the token that was chosen for it at this place."""
    try:
        if not chosen.finite[place]:
            return sequence.fail("NumericalError", "The model's logits were not finite.")
        if sequence.generates_nothing:
            return sequence.end_without_token()
        if not chosen.open[place]:
            return sequence.end_closed()
        return sequence.accept(chosen.ids[place], chosen.logprobs.get(place))
    except Exception as error:
        return failed_alone(sequence, error)


def prompt_failed(sequence: RunningSequence, error: Exception) -> StepOutput:
    if is_out_of_memory(error):
        raise error
    return sequence.fail("GenerationFailed", f"Its prompt failed in the model: {error}")
