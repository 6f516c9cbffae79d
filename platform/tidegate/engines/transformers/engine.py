"""The transformers engine batches causal language models continuously, with a step loop of its own.

Called by one thread (see `tidegate.engines.base`). A step is one decode of all running rows, then the prefill
of what has arrived since the last one, then one choice of tokens for all of them together:

    decode(rows) ─┐
                  ├─> choose ──> one transfer to the host ──> text, stop rules, outputs
    prefill(new) ─┘

So a request starts at the step after its `add`, whatever else decodes, and its first token leaves with
that step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate.engines.base import LoadReport, Prepared, StepOutput, is_out_of_memory
from tidegate.engines.engine_args import parse_args
from tidegate.engines.limits import completion_limit, proved_too_long, refusal, truncated
from tidegate.engines.transformers import encoder_decoder
from tidegate.engines.transformers.args import TransformersArgs
from tidegate.engines.transformers.batch import Batch, measure_kv
from tidegate.engines.transformers.formats import format_stops, with_stops
from tidegate.engines.transformers.generation_rules import GenerationRules
from tidegate.engines.transformers.grammars import Grammars
from tidegate.engines.transformers.head import InParts
from tidegate.engines.transformers.loading import (
    CAUSAL,
    TEXT_TO_TEXT,
    free_bytes,
    load,
    open_checkpoint,
    out_of_memory,
)
from tidegate.engines.transformers.memory import kv_budget, usable_cores, within_cap
from tidegate.engines.transformers.prompt_pool import PromptPool
from tidegate.engines.transformers.prompt_process import Reply, Task
from tidegate.engines.transformers.prompts import (
    PromptError,
    check_no_prompt_asked,
    check_token_ids,
    start_ids,
)
from tidegate.engines.transformers.responses import answer_formats
from tidegate.engines.transformers.sampling import Chosen, choose, rows_at_once
from tidegate.engines.transformers.scheduler import Scheduler, run_width
from tidegate.engines.transformers.selfcheck import prove
from tidegate.engines.transformers.sequence import RunningSequence
from tidegate.engines.transformers.threads import MOST_STEPS, choose_threads
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
from tidegate.replica_args import EngineSpec
from tidegate.sources.facts import CONTEXT_SLACK

log = logging.getLogger(__name__)

# What a step costs beside its tokens, in tokens: reading the weights.
WEIGHTS_TOKENS = {"cpu": 16, "cuda": 256}
UNBOUNDED_CONTEXT = 2048  # for configs that name no length (ALiBi)


class TransformersEngine:
    """Implements `tidegate.engines.base.Engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._args = parse_args(spec.args, TransformersArgs)
        self._scheduler = self._empty_scheduler(slots=0)
        self._broken: str | None = None
        self._batch: Batch
        self._tokens: Tensor  # [rows], the last token of each

    def load(self) -> LoadReport:
        try:
            return self._load()
        except BaseException as error:
            self.close()
            if is_out_of_memory(error):
                raise out_of_memory(error) from error
            raise

    def _load(self) -> LoadReport:
        spec, args = self._spec, self._args
        torch.set_num_threads(args.threads or usable_cores())
        checkpoint = open_checkpoint(spec)
        self._context_length = spec.context_length or checkpoint.shape.positions or UNBOUNDED_CONTEXT
        self._has_encoder = checkpoint.has_encoder
        self._prompts = PromptPool(  # loads beside the weights
            checkpoint.path, self._context_length, spec.chat_template, has_encoder=self._has_encoder
        )
        auto = TEXT_TO_TEXT if self._has_encoder else CAUSAL
        loaded = load(checkpoint, spec, auto=auto, unpacks_gptq=args.unpacks_gptq)
        model, tokenizer = loaded.model, loaded.tokenizer
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._response = answer_formats(tokenizer)
        self._vocabulary_size = int(model.get_input_embeddings().weight.shape[0])
        self._stops = format_stops(tokenizer, self._vocabulary_size)
        named_ends = end_ids(model, tokenizer)
        tokenizer_notes = check_against_model(tokenizer, self._vocabulary_size, named_ends)
        self._end_ids = frozenset(token for token in named_ends if token < self._vocabulary_size)
        self._start = encoder_decoder.start_ids(model) if self._has_encoder else None
        self._generation = GenerationRules(
            model,
            self._end_ids,
            start_id=self._start[0] if self._start else None,
            longest=self._context_length,
        )
        self._grammars = Grammars(
            tokenizer,
            self._vocabulary,
            self._end_ids,
            size=self._vocabulary_size,
            threads=args.threads or usable_cores(),
        )
        self._tokens = torch.zeros(0, dtype=torch.long, device=model.device)
        self._weights_tokens = WEIGHTS_TOKENS[model.device.type]
        kv = encoder_decoder.measure_kv(model) if self._has_encoder else measure_kv(model)
        cap = spec.memory_cap_bytes
        slots = kv_budget(
            free_bytes=within_cap(free_bytes(loaded.device), cap, loaded.weights_bytes, loaded.device),
            device=loaded.device,
            kv_cache_bytes=spec.kv_cache_bytes,
            # Under a cap nobody else counts on what the weights leave of it.
            share=args.kv_cache_share or (1.0 if cap else 0.0),
            bytes_per_row=kv.of_row(self._context_length + CONTEXT_SLACK),
            max_slots=spec.max_slots,
        ).slots
        self._scheduler = self._empty_scheduler(slots)
        self._batch, notes = prove(
            loaded, layers=kv.layers, max_rows=slots, context_length=self._context_length
        )
        if not args.threads and loaded.device == "cpu" and self._context_length > 2 * MOST_STEPS:
            choose_threads(self._batch, usable_cores(), slots)
        template_notes = self._prompts.wait_ready(self._vocabulary_size)
        return LoadReport(
            weights_bytes=loaded.weights_bytes,
            kv_bytes_per_token=kv.bytes_per_token,
            slots=slots,
            context_length=self._context_length,
            precision=loaded.precision,
            device=loaded.device,
            notes=(*loaded.notes, *tokenizer_notes, *template_notes, *self._generation.notes, *notes),
        )

    def free_slots(self) -> int:
        return self._scheduler.free_slots()

    async def prepare(self, request: Request) -> Prepared | Tokens | Finish:
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

    def add(self, prepared: Prepared, log: list[Segment]) -> StepOutput | None:
        before = prepared.prompt if self._start is None else self._start
        sequence = RunningSequence(
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
        if (ended := sequence.ended_in_log()) is not None:
            return ended
        self._scheduler.add(sequence)
        return None

    def abort(self, request_id: str) -> None:
        if (row := self._scheduler.abort(request_id)) is not None:
            self._leave({row: False})

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    def step(self) -> list[StepOutput]:
        try:
            with torch.inference_mode():
                return self._step()
        except Exception as error:
            self._broken = f"A step failed: {type(error).__name__}: {error}"
            raise

    def health(self) -> str | None:
        return self._broken

    def close(self) -> None:
        self._scheduler = self._empty_scheduler(slots=0)
        if hasattr(self, "_prompts"):
            self._prompts.close()
        if hasattr(self, "_grammars"):
            self._grammars.close()
        for name in ("_batch", "_tokens", "_generation"):
            if hasattr(self, name):
                delattr(self, name)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _empty_scheduler(self, slots: int) -> Scheduler[RunningSequence]:
        return Scheduler(slots, self._args.prefill_tokens_per_step)

    def _step(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        logits = [self._decode()] if self._scheduler.running else []
        for group in self._scheduler.schedule():
            logits += self._prefill(group, outputs)
        if logits:
            together = torch.cat(logits) if len(logits) > 1 else logits[0]
            self._accept(choose(together, self._scheduler.running), outputs)
        return outputs

    def _decode(self) -> Tensor:
        counts = [sequence.unfed for sequence in self._scheduler.running]
        if (width := max(counts)) == 1:
            return self._batch.decode(self._tokens)
        return self._batch.run([sequence.tail(width) for sequence in self._scheduler.running], counts)

    def _prefill(self, group: Sequence[RunningSequence], outputs: list[StepOutput]) -> list[Tensor]:
        """Let a group join the batch. Returns its logits; a request whose prefill fails only fails itself."""
        asked = group[0].prefill_logprobs() if group[0].needs_all_logits else None
        every = InParts(rows_at_once(self._vocabulary_size), asked.take) if asked is not None else None
        try:
            logits = self._batch.join(
                [sequence.tokens for sequence in group],
                sources=[sequence.source for sequence in group],
                every=every,
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if len(group) == 1:
                outputs.append(group[0].fail("GenerationFailed", f"Its prompt failed in the model: {error}"))
                return []
            return [part for sequence in group for part in self._prefill([sequence], outputs)]
        if asked is not None:
            try:
                group[0].take_prefill(asked)
            except Exception as error:
                outputs.append(failed_alone(group[0], error))
                self._batch.leave(len(self._scheduler.running), clear=True)
                return []
        self._scheduler.join(group)
        return [logits]

    def _accept(self, chosen: Chosen, outputs: list[StepOutput]) -> None:
        """Give every row its token; rows that end leave the batch."""
        over: dict[int, bool] = {}
        accepted: list[StepOutput] = []
        for row, sequence in enumerate(self._scheduler.running):
            is_finite = bool(chosen.finite[row])
            try:
                if not is_finite:
                    output = sequence.fail("NumericalError", "The model's logits were not finite.")
                elif sequence.generates_nothing:
                    output = sequence.end_without_token()
                elif not chosen.open[row]:
                    output = sequence.end_closed()
                else:
                    output = sequence.accept(chosen.ids[row], chosen.logprobs.get(row))
            except Exception as error:
                output = failed_alone(sequence, error)
            if output.finish is not None:
                over[row] = not is_finite
            accepted.append(output)
        self._force(accepted, over)
        outputs += accepted
        self._tokens = chosen.tokens
        if over:
            self._leave(over)

    def _force(self, accepted: list[StepOutput], over: dict[int, bool]) -> None:
        """Add tokens that are forced, as many as the next step does better to take at once."""
        running = self._scheduler.running
        if all(sequence.matcher is None for sequence in running):
            return
        ready = {row: 1 + len(sequence.forced) for row, sequence in enumerate(running) if row not in over}
        if max(ready.values(), default=1) == 1:
            return
        longest = min(self._batch.longest_run(), max(1, self._args.prefill_tokens_per_step // len(running)))
        width = run_width(list(ready.values()), longest, self._weights_tokens)
        for row, count in ready.items():
            if min(count, width) > 1:
                try:
                    accepted[row] = running[row].accept_forced(min(count, width) - 1, accepted[row])
                except Exception as error:
                    accepted[row] = failed_alone(running[row], error)
                if accepted[row].finish is not None:
                    over[row] = False

    def _leave(self, rows: dict[int, bool]) -> None:
        """Take rows out of the batch; True: what it leaves in the cache must be cleared."""
        for row in sorted(rows, reverse=True):
            self._batch.leave(row, clear=rows[row])
        self._tokens = self._tokens[self._scheduler.leave(rows)]


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
