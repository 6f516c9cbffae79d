"""Obeys a checkpoint's generation config.

Its sampling fields are the defaults of what a request leaves out, as in vLLM. Its rules hold for every
answer, through transformers' own processors. What else would change what `generate` answers is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig

from tidegate.engines.base import is_out_of_memory
from tidegate.messages.work import MODEL_DEFAULTS, Generate, Request

Rules = Callable[[Tensor, Tensor], Tensor]  # (ids [1, tokens], logits [1, vocabulary]) -> logits
MOST = {"temperature": 2.0, "top_p": 1.0, "top_k": math.inf, "min_p": 1.0, "repetition_penalty": math.inf}
ABOVE_ZERO = ("repetition_penalty",)
RULES = (
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
    "sequence_bias",
    "exponential_decay_length_penalty",
)
FORCED_END = "forced_eos_token_id"
TOKENS = ("forced_bos_token_id", FORCED_END)  # 0 is one of them; of the others it turns the rule off
NOT_OBEYED = (
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_h",
    "guidance_scale",
    "penalty_alpha",
    "num_beams",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "stop_strings",
    "watermarking_config",
)


class GenerationRules:
    """What the generation config of `model` asks for; `notes` say what of it is not obeyed."""

    def __init__(
        self, model: Any, end_ids: Collection[int], *, start_id: int | None = None, longest: int = 0
    ) -> None:
        """`start_id`: what the decoder of an encoder-decoder starts from; its answers have at most `longest`
        tokens."""
        self._model = model
        self._start_id = start_id
        self._end_ids = sorted(end_ids)
        asked = model.generation_config
        self.notes = [
            ignored(name, getattr(asked, name))
            for name in NOT_OBEYED
            if getattr(asked, name, None) not in (None, 0, 1)
        ]
        self._defaults: dict[str, float] = {}
        for name in MODEL_DEFAULTS:
            if (value := getattr(asked, name, None)) is None:
                continue
            if is_usable(name, value):
                self._defaults[name] = value
            else:
                self.notes.append(ignored(name, value))
        self._most = getattr(asked, "max_new_tokens", None)
        most = getattr(asked, "max_length", None)
        if self._most is None and most and start_id is not None:
            # A decoder's counts the prompt, so it says little of the answer.
            self._most = max(1, min(most - 1, longest))
        self._fields: dict[str, Any] = {}
        for name in RULES:
            value = getattr(asked, name, None)
            if value not in (None, []) and (value != 0 or name in TOKENS):
                self._take_rule(name, value)

    def applied(self, request: Request) -> Request:
        """Fill in what the request leaves to the model."""
        work = request.work
        if not isinstance(work, Generate):
            return request
        sampling = work.sampling
        changes: dict[str, Any] = {
            name: self._defaults[name] for name in sampling.left_out if name in self._defaults
        }
        if sampling.max_tokens is None and self._most:
            changes |= {"max_tokens": self._most, "clips_limit": True}  # nobody has asked for so many
        if not changes:
            return request
        return replace(request, work=replace(work, sampling=replace(sampling, **changes)))

    @property
    def forces_end(self) -> bool:
        """True where the last token that an answer may have is an end token, whatever the model says."""
        return FORCED_END in self._fields

    def of_prompt(self, tokens: int, limit: int) -> Rules | None:
        """Return what rules an answer of at most `limit` tokens that the decoder gives after so many; None:
        nothing."""
        return self._made(self._fields, tokens, limit) if self._fields else None

    def _take_rule(self, name: str, value: Any) -> None:
        """Obey a field, unless its processor refuses it or what it names is not in the vocabulary."""
        try:
            vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
            logits = torch.zeros(1, vocabulary, device=self._model.device)
            ids = torch.zeros(1, 2, dtype=torch.long, device=self._model.device)
            self._made({name: value}, 2, 1)(ids, logits)
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            self.notes.append(f"{ignored(name, value)} {error}")
            return
        self._fields[name] = value

    def _made(self, fields: Mapping[str, Any], prompt_tokens: int, limit: int) -> Rules:
        bound = {"max_length": prompt_tokens + limit} if FORCED_END in fields else {}
        config = GenerationConfig(
            **fields,
            **bound,
            eos_token_id=self._end_ids or None,
            decoder_start_token_id=self._start_id,
        )
        self._model._prepare_special_tokens(config, device=self._model.device)
        rules: Rules = self._model._get_logits_processor(
            config, input_ids_seq_length=prompt_tokens, device=self._model.device, model_kwargs={}
        )
        return rules


def is_usable(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else (int, float)):
        return False
    return 0 <= value <= MOST[name] and not (name in ABOVE_ZERO and value == 0)


def ignored(name: str, value: Any) -> str:
    shown = str(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]} ..."
    return f"generation_config.json asks for {name} = {shown}, which is not obeyed."
