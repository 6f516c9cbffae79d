"""The transformers engine: continuous batching of causal language models with a step loop of its own.

Called by one thread (see `tidegate.engines.base`). A step is one decode of all running rows, then the prefill
of what has arrived since the last one, then one choice of tokens for all of them together:

    decode(rows) ─┐
                  ├─> choose ──> one transfer to the host ──> text, stop rules, outputs
    prefill(new) ─┘

So a request starts at the step after its `add`, whatever else decodes, and its first token leaves with
that step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidegate.engines.base import EngineLoadError, EngineSpec, LoadReport, StepOutput
from tidegate.engines.engine_args import parse_args
from tidegate.engines.limits import completion_limit, refusal
from tidegate.engines.transformers.args import TransformersArgs
from tidegate.engines.transformers.batch import ArenaBatch, Batch, Forward, RowByRow, takes_masks
from tidegate.engines.transformers.loading import Loaded, context_length, free_bytes, load, open_checkpoint
from tidegate.engines.transformers.memory import kv_budget, usable_cores, within_cap
from tidegate.engines.transformers.prompts import PromptError, prompt_ids
from tidegate.engines.transformers.sampling import Chosen, choose
from tidegate.engines.transformers.selfcheck import check, probe_rows
from tidegate.engines.transformers.sequence import RunningSequence
from tidegate.engines.transformers.threads import MOST_STEPS, choose_threads
from tidegate.engines.transformers.vocabulary import Vocabulary
from tidegate.messages.work import NO_TOKENS, Finish, Request, Segment
from tidegate.sources.facts import CONTEXT_SLACK

PADDING_SHARE = 0.25  # of a joint prefill that may be padding
PADDING_TOKENS = 16  # or so many tokens per row, where prompts are short


class TransformersEngine:
    """Implements `tidegate.engines.base.Engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._args = parse_args(spec.args, TransformersArgs)
        self._slots = 0
        self._rows: list[RunningSequence] = []  # in the batch's order
        self._arrived: deque[RunningSequence] = deque()
        self._broken: str | None = None
        self._batch: Batch
        self._tokens: Tensor  # [rows], the last token of each

    def load(self) -> LoadReport:
        torch.set_num_threads(self._args.threads or usable_cores())
        checkpoint = open_checkpoint(Path(self._spec.path), self._spec.quantization)
        self._context_length = context_length(checkpoint.shape, self._spec.context_length)
        loaded = load(checkpoint, self._spec)
        model, tokenizer = loaded.model, loaded.tokenizer
        self._model, self._tokenizer = model, tokenizer
        self._device: torch.device = model.device
        self._vocabulary = Vocabulary(tokenizer)
        self._vocabulary_size = int(model.get_input_embeddings().weight.shape[0])
        self._end_ids = end_ids(model, tokenizer)
        self._tokens = torch.zeros(0, dtype=torch.long, device=self._device)
        layers, token_bytes, can_share = measure_kv(model)
        cap = self._spec.memory_cap_bytes
        budget = kv_budget(
            free_bytes=within_cap(free_bytes(loaded.device), cap, loaded.weights_bytes, loaded.device),
            device=loaded.device,
            kv_cache_bytes=self._spec.kv_cache_bytes,
            # Under a cap nobody else counts on what the weights leave of it.
            share=self._args.kv_cache_share or (1.0 if cap else 0.0),
            bytes_per_row=token_bytes * (self._context_length + CONTEXT_SLACK),
            max_slots=self._spec.max_slots,
        )
        self._slots = budget.slots
        notes = list(loaded.notes)
        self._batch, found = self._prove(loaded, layers if can_share else 0)
        if not self._args.threads and loaded.device == "cpu" and self._context_length > 2 * MOST_STEPS:
            choose_threads(self._batch, usable_cores(), self._slots)
        return LoadReport(
            weights_bytes=loaded.weights_bytes,
            kv_bytes_per_token=token_bytes,
            slots=self._slots,
            context_length=self._context_length,
            precision=loaded.precision,
            device=loaded.device,
            notes=(*notes, *found),
        )

    def free_slots(self) -> int:
        return self._slots - len(self._rows) - len(self._arrived)

    def add(self, request: Request, log: list[Segment]) -> StepOutput | None:
        try:
            prompt = prompt_ids(request, self._tokenizer, self._vocabulary_size)
        except PromptError as error:
            return StepOutput(request.id, NO_TOKENS, 0, refusal("InvalidPrompt", str(error)))
        limit = completion_limit(len(prompt), request.work.sampling.max_tokens, self._context_length)
        if isinstance(limit, Finish):
            return StepOutput(request.id, NO_TOKENS, len(prompt), limit)
        sequence = RunningSequence(
            request,
            prompt,
            log,
            limit=limit,
            end_ids=self._end_ids,
            vocabulary=self._vocabulary,
            vocabulary_size=self._vocabulary_size,
            device=self._device,
        )
        if (ended := sequence.ended_in_log()) is not None:
            return ended
        self._arrived.append(sequence)
        return None

    def abort(self, request_id: str) -> None:
        for sequence in self._arrived:
            if sequence.id == request_id:
                self._arrived.remove(sequence)
                return
        for row, sequence in enumerate(self._rows):
            if sequence.id == request_id:
                order = list(range(len(self._rows)))
                self._leave(row, order)
                self._tokens = self._tokens[order]
                return

    def has_work(self) -> bool:
        return bool(self._rows or self._arrived)

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
        self._rows.clear()
        self._arrived.clear()
        for name in ("_batch", "_model", "_tokens"):
            if hasattr(self, name):
                delattr(self, name)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _prove(self, loaded: Loaded, layers: int) -> tuple[Batch, list[str]]:
        """The fastest batch that passes the self-check, with notes; `layers` 0: the arena cannot hold this
        model's cache. Raises `EngineLoadError` (SelfCheckFailed)."""
        model = loaded.model
        rows = probe_rows(loaded.tokenizer, self._context_length)
        reason = "its cache has layers of another kind than keys and values per token"
        for makes_masks in ((True, False) if takes_masks(model) else (False,)) if layers else ():
            arena = ArenaBatch(
                model,
                layers=layers,
                max_rows=max(self._slots, len(rows)),
                max_length=self._context_length,
                pad_id=loaded.tokenizer.pad_token_id or 0,
                makes_masks=makes_masks,
            )
            try:
                verdict = check(model, arena, rows, loaded.precision)
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
                reason = f"batched decoding raises {type(error).__name__}: {error}"
                continue
            if verdict.is_right:
                return arena, []
            reason = f"batched logits differ by {verdict.error:.2g} (tolerance {verdict.tolerance:.2g})"
        single = RowByRow(model)
        verdict = check(model, single, rows, loaded.precision)
        if not verdict.is_right:
            raise EngineLoadError(
                "SelfCheckFailed",
                f"Decoding does not give the model's own logits: they differ by {verdict.error:.2g} "
                f"(tolerance {verdict.tolerance:.2g} in {loaded.precision}).",
            )
        return single, [f"Requests run one by one, which is slower: {reason}."]

    def _step(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        logits = [self._batch.decode(self._tokens)] if self._rows else []
        for group in self._next_groups():
            logits += self._prefill(group, outputs)
        if not self._rows:
            return outputs
        together = torch.cat(logits) if len(logits) > 1 else logits[0]
        chosen = choose(together, [row.chooser for row in self._rows])
        self._accept(chosen, outputs)
        return outputs

    def _accept(self, chosen: Chosen, outputs: list[StepOutput]) -> None:
        """Give every row its token; rows that end leave the batch."""
        over: list[tuple[int, bool]] = []
        for row, sequence in enumerate(self._rows):
            is_finite = bool(chosen.finite[row])
            if not is_finite:
                output = sequence.fail("NumericalError", "The model's logits were not finite.")
            elif sequence.generates_nothing:
                output = sequence.end_without_token()
            else:
                output = sequence.accept(chosen.ids[row], chosen.logprobs.get(row))
            if output.finish is not None:
                over.append((row, is_finite))
            outputs.append(output)
        self._tokens = chosen.tokens
        if over:
            order = list(range(len(self._rows)))
            for row, is_finite in reversed(over):
                self._leave(row, order, clear=not is_finite)
            self._tokens = chosen.tokens[order]

    def _leave(self, row: int, order: list[int], *, clear: bool = False) -> None:
        self._batch.leave(row, clear=clear)
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        order[row] = order[-1]
        order.pop()

    def _next_groups(self) -> Iterator[list[RunningSequence]]:
        """Arrivals of this step, in groups whose prompts are prefilled together."""
        arrivals: list[RunningSequence] = []
        room = self._args.prefill_tokens_per_step
        while self._arrived and (not arrivals or len(self._arrived[0].tokens) <= room):
            room -= len(self._arrived[0].tokens)
            arrivals.append(self._arrived.popleft())
        return group_by_length(arrivals)

    def _prefill(self, group: Sequence[RunningSequence], outputs: list[StepOutput]) -> list[Tensor]:
        """Let a group join the batch. Returns its logits; a request whose prefill fails only fails itself."""
        all_logits = group[0].needs_all_logits
        try:
            logits = self._batch.join([sequence.tokens for sequence in group], all_logits=all_logits)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if len(group) == 1:
                outputs.append(group[0].fail("GenerationFailed", f"Its prompt failed in the model: {error}"))
                return []
            return [part for sequence in group for part in self._prefill([sequence], outputs)]
        if all_logits:
            group[0].take_prefill_logits(logits[0])
            logits = logits[:, -1]
        self._rows += group
        return [logits]


def group_by_length(arrivals: Sequence[RunningSequence]) -> Iterator[list[RunningSequence]]:
    """Groups of prompts of similar length; one that needs all its logits goes alone."""
    group: list[RunningSequence] = []
    for sequence in sorted(arrivals, key=lambda arrival: len(arrival.tokens)):
        length = len(sequence.tokens)
        if group and (
            sequence.needs_all_logits
            or group[-1].needs_all_logits
            or length - len(group[0].tokens) > max(PADDING_TOKENS, PADDING_SHARE * length)
        ):
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, the config's and the tokenizer's."""
    found: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(found)


def measure_kv(model: Any) -> tuple[int, int, bool]:
    """Layers, bytes per token of the KV cache, and whether each layer is plain keys and values (so that the
    arena can hold it), from a forward pass over two tokens: exact for every architecture."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    try:
        Forward(model)(ids, cache=cache)
    except (ValueError, TypeError, AttributeError, IndexError):
        return 0, 0, False  # a cache of its own kind (linear attention, state space)
    if not all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers):
        return 0, 0, False
    size = sum(
        part.shape[1] * part.shape[3] * part.element_size()
        for layer in cache.layers
        for part in (layer.keys, layer.values)
    )
    return len(cache.layers), size, True


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA raises a type of its own; the CPU allocator a RuntimeError that says so."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
