"""The engine of tasks that generate nothing: vectors of texts, scores of pairs, shares of labels.

Called by one thread (see `tidegate.engines.base`). A request carries a few inputs. A step is one forward pass
over inputs of about one length, whichever requests they are of, the oldest first: so little is padding,
nobody starves, and a request ends with the step that has its last input. There is no KV cache, and a slot is
no more than a place in the line.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from tidegate.engines.base import EngineLoadError, LoadReport, Prepared, StepOutput, is_out_of_memory
from tidegate.engines.engine_args import parse_args
from tidegate.engines.limits import refusal
from tidegate.engines.transformers.loading import BARE, Loaded, closed_on_failure, load, open_checkpoint
from tidegate.engines.transformers.memory import usable_cores
from tidegate.engines.transformers.pooling import Pooler, judge_of, label_names, normalised
from tidegate.engines.transformers.probe import TOLERANCE, pad_id, probe_rows, relative_error
from tidegate.engines.transformers.prompt_pool import PromptPool
from tidegate.engines.transformers.prompt_process import Task
from tidegate.engines.transformers.prompts import PromptError, check_token_ids
from tidegate.engines.transformers.tokenizer import check_against_model
from tidegate.errors import SourceError
from tidegate.messages.work import (
    NO_TOKENS,
    Embed,
    Finish,
    Inputs,
    Request,
    Score,
    Scores,
    Segment,
    TextPrompt,
    Tokens,
    Vectors,
)
from tidegate.replica_args import EngineSpec, TransformersArgs
from tidegate.sources.checkpoint import Checkpoint
from tidegate.sources.sentence import Sentence, read_sentence

DEFAULT_SLOTS = 64
MOST_TOKENS = 1 << 24  # that a spec may ask for
UNBOUNDED_TOKENS = 2048  # of an input, where neither model nor tokenizer names a length
# How many times as long as the shortest input of a pass the longest may be, and by how many tokens more.
LIKE_LENGTHS, LIKE_TOKENS = 1.5, 16
FAILURE = Finish("error", "NumericalError", "The model's output was not finite.")


@dataclass(slots=True)
class Row:
    """One input that waits."""

    request: Running
    place: int
    ids: Sequence[int]
    types: Sequence[int]


@dataclass(slots=True, eq=False)
class Running:
    prepared: Prepared
    results: list[Tensor | None] = field(default_factory=list)
    left: int = 0

    @property
    def id(self) -> str:
        return self.prepared.request.id

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prepared.inputs))


class EncoderEngine:
    """Implements `tidegate.engines.base.Engine` for `task`: embed, score or classify."""

    gives_back = False

    def __init__(self, spec: EngineSpec, task: str) -> None:
        self._spec = spec
        self._task = task
        self._args = parse_args(spec.args, TransformersArgs)
        self._slots = spec.max_slots or DEFAULT_SLOTS
        self._running: dict[str, Running] = {}
        self._waiting: list[Row] = []
        self._broken: str | None = None

    def load(self) -> LoadReport:
        with closed_on_failure(self.close):
            return self._load()

    def _load(self) -> LoadReport:
        spec = self._spec
        torch.set_num_threads(self._args.threads or usable_cores())
        checkpoint = open_checkpoint(spec)
        if checkpoint.quantization != "none":
            raise EngineLoadError(
                "UnsupportedModel",
                f"The checkpoint is quantized with {checkpoint.quantization}; the task {self._task} serves "
                "plain weights only.",
            )
        is_judge = self._task != "embed"
        loaded = load(checkpoint, spec, auto="AutoModelForSequenceClassification" if is_judge else BARE)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._accepts = frozenset(inspect.signature(self._model.forward).parameters)
        if not {"input_ids", "attention_mask"} <= self._accepts:
            raise EngineLoadError(
                "UnsupportedModel", f"{type(self._model).__name__} does not read text; only that is served."
            )
        self._vocabulary_size = int(self._model.get_input_embeddings().weight.shape[0])
        tokenizer_notes = check_against_model(self._tokenizer, self._vocabulary_size, ())
        self._sentence = sentence_of(checkpoint)
        self._context_length = context_length(spec, loaded, 0 if is_judge else self._sentence.max_tokens)
        self._prompts = PromptPool(checkpoint.path, self._context_length, spec.chat_template)
        self._pad_id = padding(self._model, self._tokenizer, self._vocabulary_size)
        self._labels = label_names(self._model.config) if is_judge else []
        if is_judge:
            self._judge = judge_of(self._model.config, self._task)
        else:
            self._pooler = Pooler(self._sentence, checkpoint.path, loaded.device)
        self._dimensions, notes = self._prove(loaded)
        self._prompts.wait_ready(self._vocabulary_size)
        return LoadReport(
            weights_bytes=loaded.weights_bytes,
            kv_bytes_per_token=0,
            slots=self._slots,
            context_length=self._context_length,
            precision=loaded.precision,
            device=loaded.device,
            notes=(*loaded.notes, *tokenizer_notes, *notes),
        )

    def free_slots(self) -> int:
        return self._slots - len(self._running)

    async def prepare(self, request: Request) -> Prepared | Tokens | Finish:
        work = request.work
        if isinstance(work, Embed | Score) and isinstance(work, Embed) != (self._task == "embed"):
            return refusal("WrongTask", f"The model {request.model!r} is served to {self._task}.")
        try:
            if isinstance(work, Embed):
                if work.dimensions is not None and work.dimensions > self._dimensions:
                    return refusal(
                        "TooManyDimensions",
                        f"dimensions: {work.dimensions}: the model {request.model!r} makes vectors of "
                        f"{self._dimensions} numbers; send at most that.",
                    )
                work = self._with_prompt(work)
            elif not isinstance(work, Score):
                check_token_ids(request, self._tokenizer, self._vocabulary_size)
            reply = await self._prompts.prepare(Task(request.model, work, self._vocabulary_size))
        except PromptError as error:
            return refusal(error.code, str(error))
        if (ended := reply.finish or reply.answer) is not None:
            return ended
        if not isinstance(work, Embed | Score):
            return refusal("WrongTask", f"The model {request.model!r} is served to {self._task}.")
        return Prepared(request, (), 0, inputs=reply.inputs, types=reply.types)

    def add(self, prepared: Prepared, log: list[Segment]) -> StepOutput | None:  # noqa: ARG002 - it has none
        running = Running(prepared, [None] * len(prepared.inputs), len(prepared.inputs))
        self._running[running.id] = running
        types = prepared.types or [()] * len(prepared.inputs)
        self._waiting += [
            Row(running, place, ids, kinds)
            for place, (ids, kinds) in enumerate(zip(prepared.inputs, types, strict=True))
        ]
        return None

    def abort(self, request_id: str) -> None:
        if (gone := self._running.pop(request_id, None)) is not None:
            self._waiting = [row for row in self._waiting if row.request is not gone]

    def has_work(self) -> bool:
        return bool(self._waiting)

    def step(self) -> list[StepOutput]:
        try:
            return self._step()
        except Exception as error:
            self._broken = f"A step failed: {type(error).__name__}: {error}"
            raise

    def health(self) -> str | None:
        return self._broken

    def close(self) -> None:
        self._running, self._waiting = {}, []
        if hasattr(self, "_prompts"):
            self._prompts.close()
        for name in ("_model", "_pooler", "_judge"):
            if hasattr(self, name):
                delattr(self, name)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _step(self) -> list[StepOutput]:
        rows = next_rows(self._waiting, self._args.prefill_tokens_per_step, is_alone=self._runs_alone)
        taken = {id(row) for row in rows}
        self._waiting = [row for row in self._waiting if id(row) not in taken]
        results = self._forward([row.ids for row in rows], [row.types for row in rows]).cpu()
        outputs: list[StepOutput] = []
        for row, result in zip(rows, results, strict=True):
            request = row.request
            request.results[row.place] = result
            request.left -= 1
            if not request.left:
                del self._running[request.id]
                outputs.append(self._finished(request))
        return outputs

    def _finished(self, running: Running) -> StepOutput:
        rows = torch.stack([result for result in running.results if result is not None])
        tokens = running.prompt_tokens
        if not bool(torch.isfinite(rows).all()):
            return StepOutput(running.id, NO_TOKENS, tokens, replace(FAILURE, prompt_tokens=tokens))
        work = running.prepared.request.work
        result: Vectors | Scores
        if isinstance(work, Embed):
            if work.dimensions is not None:
                rows = normalised(rows[:, : work.dimensions])
            numbers = rows.flatten().tolist()
            result = Vectors(rows.shape[1], struct.pack(f"<{len(numbers)}f", *numbers))
        else:
            result = Scores(rows.tolist(), list(self._labels))
        return StepOutput(running.id, NO_TOKENS, tokens, Finish("stop", prompt_tokens=tokens), result)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> Tensor:
        """Return vectors [rows, dimensions] or what the head says [rows, labels], float32. Rows are filled up
        on their right, where nothing that counts attends to."""
        device = self._model.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        width = int(lengths.max())
        asked: dict[str, Any] = {
            "input_ids": filled(rows, width, self._pad_id, device),
            "attention_mask": (torch.arange(width, device=device) < lengths[:, None]).long(),
        }
        if "token_type_ids" in self._accepts and any(types):
            asked["token_type_ids"] = filled(types, width, 0, device)
        if "use_cache" in self._accepts:
            asked["use_cache"] = False
        output = self._model(**asked)
        if self._task == "embed":
            return self._pooler(output.last_hidden_state, lengths)
        judged: Tensor = self._judge(output.logits.float())
        return judged

    def _with_prompt(self, work: Embed) -> Embed:
        """Put the checkpoint's prompt before each text, and lower both where it says so. Raises
        `PromptError`."""
        sentence = self._sentence
        name = work.prompt_name or sentence.default_prompt
        if work.prompt_name and name not in sentence.prompts:
            known = ", ".join(sorted(sentence.prompts)) or "none"
            raise PromptError(
                f"prompt_name: {name!r}: the checkpoint has no such prompt; it has {known}.",
                "UnknownPromptName",
            )
        prefix = sentence.prompts.get(name, "")
        if not (prefix or sentence.lowers):
            return work
        cased = str.lower if sentence.lowers else str
        items = [
            replace(item, text=cased(prefix + item.text)) if isinstance(item, TextPrompt) else item
            for item in work.prompt.items
        ]
        return replace(work, prompt=Inputs(items, work.prompt.first))

    def _prove(self, loaded: Loaded) -> tuple[int, list[str]]:
        """Compare inputs of different lengths in one pass with each alone. Returns how many numbers one has,
        and notes. Raises `EngineLoadError` (SelfCheckFailed)."""
        self._runs_alone = True
        rows = probe_rows(loaded.tokenizer, self._context_length, self._vocabulary_size)
        none: list[Sequence[int]] = [()] * len(rows)
        name = type(self._model).__name__
        try:
            alone = torch.cat([self._forward([row], none[:1]) for row in rows])
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise EngineLoadError("SelfCheckFailed", f"{name} fails on plain text: {error}") from error
        if not bool(torch.isfinite(alone).all()):
            raise EngineLoadError("SelfCheckFailed", f"{name} gives no finite numbers for plain text.")
        try:
            together = self._forward(rows, none)
            if self._task == "embed":
                worst = max(map(relative_error, together, alone))
            else:
                worst = float((together - alone).abs().max())
            is_right = worst <= TOLERANCE[loaded.precision]
            reason = "" if is_right else f"batched output differs by {worst:.2g}"
        except (RuntimeError, ValueError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            reason = f"batches raise {type(error).__name__}: {error}"
        self._runs_alone = bool(reason)
        return alone.shape[1], [f"Inputs run one by one, which is slower: {reason}."] if reason else []


def next_rows(waiting: Sequence[Row], most_tokens: int, *, is_alone: bool) -> list[Row]:
    """Choose the inputs of the next pass: the oldest, and of those about as long as many as `most_tokens`
    holds with their padding."""
    first = len(waiting[0].ids)
    shortest = longest = first
    rows: list[Row] = []
    for row in waiting:
        length = len(row.ids)
        low, high = min(shortest, length), max(longest, length)
        is_like = high <= LIKE_LENGTHS * low + LIKE_TOKENS
        if rows and (is_alone or not is_like or high * (len(rows) + 1) > most_tokens):
            continue
        shortest, longest = low, high
        rows.append(row)
    return rows


def filled(rows: Sequence[Sequence[int]], width: int, value: int, device: torch.device) -> Tensor:
    """Return [rows, width]."""
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


def sentence_of(checkpoint: Checkpoint) -> Sentence:
    """Raises `EngineLoadError`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_encoder = checkpoint.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    try:
        return read_sentence(checkpoint, "mean" if is_encoder else "lasttoken")
    except SourceError as error:
        reason = "UnsupportedModel" if error.source_reason == "UnsupportedModel" else "WeightsWrong"
        raise EngineLoadError(reason, error.message) from error


def context_length(spec: EngineSpec, loaded: Loaded, max_tokens: int) -> int:
    """Return the tokens that an input may have. Raises `EngineLoadError` (InvalidEngineArgs) where the spec
    asks for more than the model has positions for."""
    model, tokenizer = loaded.model, loaded.tokenizer
    named = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    table = next((part for name, part in model.named_modules() if name.endswith("position_embeddings")), None)
    if isinstance(table, torch.nn.Embedding):
        # RoBERTa's count from behind the padding's place.
        named = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    if spec.context_length > (named or spec.context_length):
        raise EngineLoadError(
            "InvalidEngineArgs",
            f"contextLength is {spec.context_length}, but the model has positions for {named} tokens: ask "
            "for at most that.",
        )
    # Where its files name no length a tokenizer has one of 10^30.
    lengths = (named, max_tokens, tokenizer.model_max_length)
    known = [length for length in lengths if 0 < length < MOST_TOKENS]
    return spec.context_length or (min(known) if known else UNBOUNDED_TOKENS)


def padding(model: Any, tokenizer: Any, vocabulary: int) -> int:
    """Return the token that rows are filled up with: the model's own, whose place positions and heads may
    know."""
    found = getattr(model.config, "pad_token_id", None)
    return found if isinstance(found, int) and 0 <= found < vocabulary else pad_id(tokenizer, vocabulary)
