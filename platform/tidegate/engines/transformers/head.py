"""Runs a model so that its output head sees no more columns than somebody asked for.

Logits are as wide as the vocabulary: those of 128k tokens would take 78 GB. What a causal language model runs
before its head, its body, gives one hidden state for each token, and the head, with whatever scales or caps
its logits, looks at each of them alone. So the body runs once, and the model's own forward pass once for each
part, over a body that answers with what it has computed. No family's head is written again here, and the
self-check compares what comes of it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, slots=True)
class InParts:
    """Asks for the logits after every token: `take` gets them [tokens, vocabulary] in the tokens' order, at
    most `size` tokens at a time."""

    size: int
    take: Callable[[Tensor], None]


class Head:
    """The output head of `model`. Like its forward pass it is used by one thread."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        # Most families call their base model, whatever its name, and some the decoder in it.
        inner = [module for module in model.children() if isinstance(module, PreTrainedModel)]
        inner += [getattr(module, "decoder", None) for module in inner]
        self._bodies = [module for module in inner if isinstance(module, PreTrainedModel)]
        self._computed: dict[Module, Any] = {}
        self._is_computing = False
        self._part = slice(None)
        self._columns = 0  # that a body has computed; 0: the model has no such body

    def run(self, inputs: Mapping[str, Any], *, last: int = 1, every: InParts | None = None) -> Any:
        """Run the forward pass; return its output with the logits [rows, columns, vocabulary] of the `last`
        columns, or of the last part where `every` gets those of all columns of one row."""
        if every is None and self._takes_keep:
            return self._model(**{**inputs, "logits_to_keep": last})
        whole = {**inputs, "logits_to_keep": 0} if self._takes_keep else inputs
        with self._shown():
            self._part = slice(-last, None) if every is None else slice(0, every.size)
            output = first = self._model(**whole)
            while every is not None:
                every.take(output.logits[0])
                if self._part.stop >= self._columns:
                    break
                self._part = slice(self._part.stop, self._part.stop + every.size)
                output = self._model(**whole)
        first.logits = output.logits
        return first

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Let the bodies compute once, and answer with a part of that."""
        before = [(module, vars(module).get("forward")) for module in self._bodies]
        try:
            for module in self._bodies:
                module.forward = self._showing(module, module.forward)
            yield
        finally:
            self._computed, self._columns = {}, 0
            for module, own in before:
                if own is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = own

    def _showing(self, module: Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def shown(*args: Any, **kwargs: Any) -> Any:
            if self._is_computing:  # a decoder, within the base model around it
                return forward(*args, **kwargs)
            if module not in self._computed:
                self._is_computing = True
                try:
                    self._computed[module] = forward(*args, **kwargs)
                finally:
                    self._is_computing = False
                self._columns = self._computed[module][0].shape[1]
            return with_columns(self._computed[module], self._part)

        return shown


def with_columns(output: Any, part: slice) -> Any:
    """Return a body's output with a part of its hidden states [rows, columns, size]."""
    if isinstance(output, tuple):
        return (output[0][:, part], *output[1:])
    name = next(iter(output))
    return dataclasses.replace(output, **{name: output[name][:, part]})
