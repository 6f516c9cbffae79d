"""The half of an engine that is text: requests become prompts of token ids, and chosen tokens become answers.

It needs a checkpoint's tokenizer and configuration, but no weights: whichever engine computes the tokens, an
answer is read, cut and continued by the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from tidegate.engines.base import Prepared, StepOutput, is_out_of_memory
from tidegate.engines.limits import completion_limit, proved_too_long, refusal, truncated
from tidegate.engines.transformers.formats import format_stops, with_stops
from tidegate.engines.transformers.generation_rules import GenerationRules
from tidegate.engines.transformers.grammars import Grammars
from tidegate.engines.transformers.prompt_pool import PromptPool
from tidegate.engines.transformers.prompt_process import Reply, Task
from tidegate.engines.transformers.prompts import (
    PromptError,
    check_no_prompt_asked,
    check_token_ids,
    start_ids,
)
from tidegate.engines.transformers.responses import answer_formats
from tidegate.engines.transformers.sequence import RunningSequence
from tidegate.engines.transformers.tokenizer import check_against_model
from tidegate.engines.transformers.vocabulary import Vocabulary
from tidegate.messages.work import (
    ChatPrompt,
    Embed,
    Finish,
    Generate,
    Request,
    Score,
    Segment,
    TextPrompt,
    TokenPrompt,
    Tokens,
)

log = logging.getLogger(__name__)


class Language:
    """Serves one loaded model. `notes` say what of its files does not fit together or is not obeyed."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: PromptPool,
        *,
        vocabulary_size: int,
        context_length: int,
        threads: int,
        start: Sequence[int] | None = None,
    ) -> None:
        """`model` is asked for its configurations alone. `vocabulary_size`: the width of its logits.
        `start`: as of `RunningSequence`. Raises `EngineLoadError`."""
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._vocabulary_size, self._context_length = vocabulary_size, context_length
        self._start = start
        self._has_encoder = start is not None
        self._vocabulary = Vocabulary(tokenizer)
        self._response = answer_formats(tokenizer)
        self._stops = format_stops(tokenizer, vocabulary_size)
        named_ends = end_ids(model, tokenizer)
        tokenizer_notes = check_against_model(tokenizer, vocabulary_size, named_ends)
        self._end_ids = frozenset(token for token in named_ends if token < vocabulary_size)
        self._generation = GenerationRules(
            model, self._end_ids, start_id=start[0] if start else None, longest=context_length
        )
        self._grammars = Grammars(
            tokenizer, self._vocabulary, self._end_ids, size=vocabulary_size, threads=threads
        )
        self.notes = (*tokenizer_notes, *self._generation.notes)

    @property
    def model_ends(self) -> list[int]:
        """Return the model's own end tokens."""
        return sorted(self._end_ids)

    async def prepare(self, request: Request) -> Prepared | Tokens | Finish:
        """See `Engine.prepare`."""
        if isinstance(request.work, Embed | Score):
            return refusal("WrongTask", f"The model {request.model!r} is served to generate text.")
        request = self._generation.applied(request)
        try:
            check_token_ids(request, self._tokenizer, self._vocabulary_size)
            if self._has_encoder:
                check_no_prompt_asked(request)
            reply = await self._reply(request)
        except PromptError as error:
            return refusal(error.code, str(error))
        if (ended := reply.finish or reply.answer) is not None:
            return ended
        assert isinstance(request.work, Generate)  # others have their answer
        limit = completion_limit(
            len(reply.ids), request.work, self._context_length, has_encoder=self._has_encoder
        )
        if isinstance(limit, Finish):
            return limit
        grammar = reply.grammar or request.work.sampling.grammar
        if grammar and (why := await self._grammars.refusal(grammar)):
            # What may call and need not is free where the grammar of its calls is too large.
            if not may_be_free(request.work):
                return refusal(
                    "GrammarFailed", f"This model cannot follow the grammar: {why}", len(reply.ids)
                )
            grammar = ""
        request = with_stops(request, self._stops)
        return Prepared(request, reply.ids, limit, reply.bad_words, grammar, reply.begun)

    def sequence(self, prepared: Prepared, log: Sequence[Segment]) -> RunningSequence:
        """Make the state of a request that goes on behind its log."""
        before = prepared.prompt if self._start is None else self._start
        return RunningSequence(
            prepared,
            log,
            end_ids=self._end_ids,
            vocabulary=self._vocabulary,
            rules=self._generation.of_prompt(len(before), prepared.limit),
            response=self._response,
            matcher=self._grammars.matcher(prepared.grammar) if prepared.grammar else None,
            forces_end=self._generation.forces_end,
            start=self._start,
        )

    def close(self) -> None:
        self._grammars.close()

    async def _reply(self, request: Request) -> Reply:
        """Leave out the process beside where nothing has to be tokenized, or the length alone refuses it."""
        work = request.work
        if isinstance(work, Generate):
            prompt, sampling = work.prompt, work.sampling
            if isinstance(prompt, TokenPrompt) and not sampling.bad_words:
                ids = prompt.token_ids or start_ids(self._tokenizer)
                kept = truncated(ids, sampling, self._context_length, has_encoder=self._has_encoder)
                return Reply(list(kept))
            if isinstance(prompt, TextPrompt) and sampling.truncate_prompt is None:
                most = self._prompts.most_characters_per_token
                if finish := proved_too_long(len(prompt.text), most, self._context_length):
                    return Reply(finish=finish)
        return await self._prompts.prepare(Task(request.model, work, self._vocabulary_size))


def failed_alone(sequence: RunningSequence, error: Exception) -> StepOutput:
    """End a row whose answer could not be taken up, which is no reason to end the others."""
    if is_out_of_memory(error):
        raise error
    log.exception("the answer of request %s could not be taken up", sequence.id)
    return sequence.fail("EngineError", f"The answer could not be read on ({type(error).__name__}).")


def may_be_free(work: Generate) -> bool:
    is_free = isinstance(work.prompt, ChatPrompt) and work.prompt.tool_choice == "auto"
    return is_free and not work.sampling.grammar


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the generation config's, the config's and the tokenizer's."""
    found: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        getattr(model.config.get_text_config(decoder=True), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(found)
