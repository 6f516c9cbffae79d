"""The transformers engine batches causal language models continuously, with a step loop of its own.

Called by one thread (see `tidegate.engines.base`). A step is one decode of all running rows, then the prefill
of what has arrived since the last one, then one choice of tokens for all of them together:

    decode(rows) ─┐
                  ├─> choose ──> one transfer to the host ──> text, stop rules, outputs
    prefill(new) ─┘

So a request starts at the step after its `add`, whatever else decodes, and its first token leaves with
that step. While rows decode, a step prefills as many tokens as they can bear (`pace`); a longer prompt is
prefilled over several steps, and its first token leaves with the last of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tidegate.engines.base import LoadReport, Prepared, StepOutput, is_out_of_memory
from tidegate.engines.engine_args import parse_args
from tidegate.engines.families import families
from tidegate.engines.transformers import encoder_decoder
from tidegate.engines.transformers.batch import Batch, Staged
from tidegate.engines.transformers.cache_plan import plan_cache
from tidegate.engines.transformers.counts import Counts
from tidegate.engines.transformers.graphs import cuda_graph
from tidegate.engines.transformers.head import InParts
from tidegate.engines.transformers.kv_size import measure_kv
from tidegate.engines.transformers.language import Language, failed_alone
from tidegate.engines.transformers.loading import (
    CAUSAL,
    TEXT_TO_TEXT,
    choose_context,
    closed_on_failure,
    load,
    open_checkpoint,
    vocabulary_size,
)
from tidegate.engines.transformers.logprobs import PrefillLogprobs
from tidegate.engines.transformers.lookup import Lookup, lookup_width
from tidegate.engines.transformers.memory import usable_cores
from tidegate.engines.transformers.pace import Pace
from tidegate.engines.transformers.pending import Ahead, Flight, Part, accept, prompt_failed
from tidegate.engines.transformers.prompt_pool import PromptPool
from tidegate.engines.transformers.room import USUAL_TOKENS
from tidegate.engines.transformers.row_values import rows_at_once
from tidegate.engines.transformers.sampling import Choice, Chosen, choose
from tidegate.engines.transformers.scheduler import Scheduler, run_width
from tidegate.engines.transformers.selfcheck import Conditions, prove
from tidegate.engines.transformers.sequence import RunningSequence, followed
from tidegate.engines.transformers.threads import StepThreads, prefill_threads, set_threads
from tidegate.messages.engine_metrics import encode_families
from tidegate.messages.work import (
    Finish,
    Request,
    Segment,
    Tokens,
)
from tidegate.replica_args import EngineSpec, TransformersArgs
from tidegate.telemetry import Laps

log = logging.getLogger(__name__)

# What a step costs beside its tokens, in tokens: reading the weights.
WEIGHTS_TOKENS = {"cpu": 16, "cuda": 256}
# A step with proposed tokens has logits of each: of as many as so many choices work on at once.
LOGITS_OF_A_RUN = 4


class TransformersEngine:
    """Implements `tidegate.engines.base.Engine`."""

    gives_back = True

    def __init__(self, spec: EngineSpec, record: Path | None = None) -> None:
        """`record`: the file in which this machine remembers what the self-check of this model finds."""
        self._spec = spec
        self._record = record
        self._args = parse_args(spec.args, TransformersArgs)
        self._counts = Counts()
        self._scheduler: Scheduler[RunningSequence] = Scheduler(slots=0)
        self._part: Part | None = None
        self._flight: Flight | None = None
        self._flies = False
        self._broken: str | None = None
        self._batch: Batch
        self._tokens: Tensor  # [rows], the last token of each
        self._looks_up = False
        self._prefill_cores = 0
        self._threads: StepThreads | None = None  # None: their number is given

    def load(self) -> LoadReport:
        with closed_on_failure(self.close):
            return self._load()

    def _load(self) -> LoadReport:
        spec, args, laps = self._spec, self._args, Laps()
        torch.set_num_threads(args.threads or usable_cores())
        checkpoint = open_checkpoint(spec)
        self._context_length = choose_context(checkpoint, spec)
        self._has_encoder = checkpoint.has_encoder
        self._prompts = PromptPool(  # loads beside the weights
            checkpoint.path, self._context_length, spec.chat_template, has_encoder=self._has_encoder
        )
        auto = TEXT_TO_TEXT if self._has_encoder else CAUSAL
        loaded = load(checkpoint, spec, auto=auto, unpacks_gptq=args.unpacks_gptq)
        model, tokenizer = loaded.model, loaded.tokenizer
        self._vocabulary_size = vocabulary_size(model)
        self._language = Language(
            model,
            tokenizer,
            self._prompts,
            vocabulary_size=self._vocabulary_size,
            context_length=self._context_length,
            threads=args.threads or usable_cores(),
            start=encoder_decoder.start_ids(model) if self._has_encoder else None,
        )
        laps.end("weights and tokenizer")
        self._tokens = torch.zeros(0, dtype=torch.long, device=model.device)
        self._weights_tokens = WEIGHTS_TOKENS[model.device.type]
        # On CPU what this thread computes, not what others keep it from.
        self._is_waiting = loaded.device == "cpu"  # for each operation
        self._clock = time.thread_time if self._is_waiting else time.perf_counter
        self._pace = Pace(self._weights_tokens, args.prefill_tokens_per_step)
        kv = encoder_decoder.measure_kv(model) if self._has_encoder else measure_kv(model)
        plan = plan_cache(loaded, kv, spec, args, self._context_length)
        if loaded.device == "cpu" and not args.threads:
            self._prefill_cores = usable_cores()
            self._threads = StepThreads(usable_cores(), loaded.weights_bytes)
            set_threads(self._threads.begin(0))
        conditions = Conditions(
            layers=kv.layers,
            max_rows=plan.slots,
            context_length=self._context_length,
            prefixes=plan.prefixes,
            room=plan.room,
            pages=plan.pages,
            pages_anyhow=bool(args.kv_pages),
            capture=cuda_graph if loaded.device == "cuda" and not args.enforce_eager else None,
        )
        self._batch, notes = prove(loaded, conditions, self._record)
        self._flies = loaded.device == "cuda" if args.async_scheduling is None else args.async_scheduling
        usual = min(self._context_length, USUAL_TOKENS)
        self._scheduler = Scheduler(plan.slots, plan.room_of(self._batch), usual, self._context_length)
        laps.end("self-check")
        if args.prompt_lookup_num_tokens:
            self._looks_up = self._batch.has_runs
            if not self._looks_up:
                notes.append("prompt_lookup_num_tokens does nothing: this model takes one token a step.")
        template_notes = self._prompts.wait_ready(self._vocabulary_size)
        laps.end("waiting for the prompts' process")
        return LoadReport(
            weights_bytes=loaded.weights_bytes,
            kv_bytes_per_token=kv.bytes_per_token,
            slots=plan.slots,
            context_length=self._context_length,
            precision=loaded.precision,
            device=loaded.device,
            notes=(*loaded.notes, *self._language.notes, *template_notes, *notes),
            seconds=laps.seconds,
        )

    def free_slots(self) -> int:
        return self._scheduler.free_slots()

    async def prepare(self, request: Request) -> Prepared | Tokens | Finish:
        return await self._language.prepare(request)

    def add(self, prepared: Prepared, log: list[Segment]) -> StepOutput | None:
        sequence = self._language.sequence(prepared, log)
        if (ended := sequence.ended_in_log()) is not None:
            return ended
        if self._looks_up:
            sequence.lookup = Lookup(sequence.tokens)
        self._scheduler.add(sequence)
        return None

    def abort(self, request_id: str) -> None:
        if (row := self._scheduler.abort(request_id)) is not None:
            self._leave({row: self._flight is not None})  # what that found of its numbers is not known yet
        elif self._scheduler.staged is None:
            self._drop()

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

    def own_metrics(self, labels: Mapping[str, str]) -> bytes:
        return encode_families(list(families(self._counts.metrics(self._scheduler.usage()), labels)))

    def close(self) -> None:
        self._scheduler, self._part, self._flight = Scheduler(slots=0), None, None
        if hasattr(self, "_prompts"):
            self._prompts.close()
        if hasattr(self, "_language"):
            self._language.close()
        for name in ("_batch", "_tokens", "_language"):
            if hasattr(self, name):
                delattr(self, name)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _step(self) -> list[StepOutput]:
        begin, clock = self._clock(), time.perf_counter()
        outputs: list[StepOutput] = []
        if self._flight is not None:
            if self._may_fly():
                return self._fly(self._flight)
            self._land(self._flight, outputs)
        while (sequence := self._scheduler.beyond_room()) is not None:
            self._give_back(sequence, outputs)
        rows = len(self._scheduler.running)
        is_waited_for = bool(rows)
        if self._threads is not None:
            set_threads(self._threads.begin(rows))
        budget = self._pace.budget(self._scheduler.joining(), rows)
        if self._scheduler.staged is None:  # with none before them so many cost hardly more than one
            budget = max(budget, min(self._weights_tokens, self._args.prefill_tokens_per_step))
        plan = self._scheduler.schedule(budget, can_stage=self._batch.can_stage, held=self._held)
        surplus = [sequence.given_back() for sequence in self._scheduler.surplus()]
        self._counts.given_back_requests += len(surplus)
        outputs += surplus
        ahead = self._run_ahead() if self._looks_up and is_waited_for else None
        beside = None
        if self._part is not None and ahead is None and self._pace.knows(rows):
            beside = (self._part.staged, plan.parts[0][1])
        with prefill_threads(beside[1] if beside is not None else 0, self._prefill_cores):
            logits = [ahead.first() if ahead is not None else self._decode(beside)] if is_waited_for else []
        is_beside = self._part is not None and self._part.staged.ahead is not None
        prompts = self._clock()
        with prefill_threads(plan.tokens, self._prefill_cores):
            for sequence, count in plan.parts:
                logits += self._prefill_part(sequence, count, outputs)
            for group in plan.groups:
                logits += self._prefill(group, outputs)
        prompts = self._clock() - prompts
        self._pace.joined(len(self._scheduler.running) - rows)
        if logits:
            together = torch.cat(logits) if len(logits) > 1 else logits[0]
            choice = Choice(together, self._scheduler.running)
            self._tokens = choice.tokens
            if ahead is None and len(logits) == is_waited_for and self._may_fly():
                self._flight = Flight([*self._scheduler.running], choice)
            else:
                self._accept(choice.read(), outputs, ahead)
            joined = {*(sequence.id for sequence, _ in plan.parts)}
            joined.update(sequence.id for group in plan.groups for sequence in group)
            for row, sequence in enumerate(self._scheduler.running):
                if sequence.id in joined:
                    self._keep(row, sequence)
            self._counts.steps += 1
            self._counts.step_seconds += time.perf_counter() - clock
        self._counts.prefilled_tokens += plan.tokens
        if is_waited_for:
            is_told = self._is_waiting and not is_beside
            self._pace.note(rows, self._clock() - begin, plan.tokens, prompts if is_told else None)
            if self._threads is not None and not plan.tokens and ahead is None:
                self._threads.note(rows, time.perf_counter() - clock)
        return outputs

    def _may_fly(self) -> bool:
        """Tell whether the next step may begin before the tokens of the last one are known here."""
        return (
            self._flies
            and self._scheduler.may_run_ahead()
            and all(sequence.is_free for sequence in self._scheduler.running)
        )

    def _fly(self, before: Flight) -> list[StepOutput]:
        """Begin a step, and then read the one before."""
        begin, clock, outputs = self._clock(), time.perf_counter(), list[StepOutput]()
        running = [*self._scheduler.running]
        if self._threads is not None:
            set_threads(self._threads.begin(len(running)))
        choice = Choice(self._batch.decode(self._tokens), running, unseen=1)
        self._tokens = choice.tokens
        self._land(before, outputs)
        if self._scheduler.running:  # else nobody is left whose tokens they are
            self._flight = Flight(running, choice)
        seconds = time.perf_counter() - clock
        self._counts.steps += 1
        self._counts.step_seconds += seconds
        self._pace.joined(0)
        self._pace.note(len(running), self._clock() - begin, 0)
        if self._threads is not None:
            self._threads.note(len(running), seconds)
        return outputs

    def _land(self, flight: Flight, outputs: list[StepOutput]) -> None:
        """Read what a step has chosen, for those who still run."""
        self._flight = None
        chosen = flight.choice.read()
        rows = {id(sequence): row for row, sequence in enumerate(self._scheduler.running)}
        over: dict[int, bool] = {}
        for place, sequence in enumerate(flight.running):
            if (row := rows.get(id(sequence))) is not None:
                output = accept(sequence, chosen, place)
                if output.finish is not None:
                    over[row] = not chosen.finite[place]
                outputs.append(output)
        if over:
            self._leave(over)

    def _give_back(self, sequence: RunningSequence, outputs: list[StepOutput]) -> None:
        log.info("request %s makes room with %d tokens", sequence.id, sequence.width)
        self.abort(sequence.id)
        self._counts.given_back_requests += 1
        outputs.append(sequence.given_back())

    def _run_ahead(self) -> Ahead | None:
        """Run the step with what is proposed behind each row's last token, if that is worth it."""
        running = self._scheduler.running
        if any(sequence.unfed > 1 for sequence in running):  # forced tokens take the step
            return None
        most = self._args.prompt_lookup_num_tokens
        proposed = [sequence.proposed(most) for sequence in running]
        longest = min(self._batch.longest_run(), max(1, self._args.prefill_tokens_per_step // len(running)))
        longest = min(longest, max(1, LOGITS_OF_A_RUN * rows_at_once(self._vocabulary_size) // len(running)))
        rates = [sequence.lookup.rate if sequence.lookup else 0.0 for sequence in running]
        width = lookup_width([len(tokens) for tokens in proposed], rates, longest, self._weights_tokens)
        if width == 1:
            for sequence in running:
                if sequence.lookup is not None:
                    sequence.lookup.note(0, 0)
            return None
        proposed = [tokens[: width - 1] for tokens in proposed]
        width = 1 + max(map(len, proposed))
        tails = [
            [*sequence.tail(width - len(tokens)), *tokens]
            for sequence, tokens in zip(running, proposed, strict=True)
        ]
        return Ahead(proposed, self._batch.run(tails, [1 + len(tokens) for tokens in proposed], width))

    def _decode(self, beside: tuple[Staged, int] | None) -> Tensor:
        """Let all rows take a step, and so many tokens of what is staged with them, where they can."""
        counts = [sequence.unfed for sequence in self._scheduler.running]
        if (width := max(counts)) == 1:
            if beside is not None:
                return self._batch.decode_beside(self._tokens, *beside)
            return self._batch.decode(self._tokens)
        return self._batch.run([sequence.tail(width) for sequence in self._scheduler.running], counts)[:, -1]

    def _prefill(self, group: Sequence[RunningSequence], outputs: list[StepOutput]) -> list[Tensor]:
        """Let a group join the batch. Returns its logits; a request whose prefill fails only fails itself."""
        asked, every = self._asked(group[0])
        try:
            logits = self._batch.join(
                [sequence.tokens for sequence in group],
                sources=[sequence.source for sequence in group],
                every=every,
            )
        except Exception as error:
            if len(group) == 1:
                outputs.append(prompt_failed(group[0], error))
                return []
            if is_out_of_memory(error):
                raise
            return [part for sequence in group for part in self._prefill([sequence], outputs)]
        return self._joined(group, asked, logits, outputs)

    def _prefill_part(self, sequence: RunningSequence, count: int, outputs: list[StepOutput]) -> list[Tensor]:
        """Prefill `count` more tokens of a prompt, with the last of which it joins. Returns what `_prefill`
        does."""
        try:
            if self._part is None:
                asked, every = self._asked(sequence)
                salt = sequence.salt if self._held(sequence) else None
                staged = self._batch.begin(sequence.tokens, every=every, salt=salt)
                sequence.note_cached(staged.held)
                self._counts.cached_tokens += staged.held
                self._part = Part(staged, asked)
            logits = self._batch.advance(self._part.staged, count)
        except Exception as error:
            outputs.append(prompt_failed(sequence, error))
            self._drop()
            return []
        if logits is None:
            return []
        asked, self._part = self._part.asked, None
        return self._joined([sequence], asked, logits, outputs)

    def _held(self, sequence: RunningSequence) -> int:
        """Return how many tokens of a prompt need no prefill. For few ones going alone costs more."""
        if sequence.needs_all_logits:
            return 0
        held = self._batch.cached(sequence.tokens, sequence.salt)
        return held if held >= self._weights_tokens else 0

    def _keep(self, row: int, sequence: RunningSequence) -> None:
        if sequence.length >= self._weights_tokens:
            self._batch.keep(row, sequence.tokens, sequence.salt)

    def _drop(self) -> None:
        self._scheduler.forget()
        if self._part is not None:
            self._batch.drop(self._part.staged)
            self._part = None

    def _asked(self, sequence: RunningSequence) -> tuple[PrefillLogprobs | None, InParts | None]:
        """Return what collects the log probabilities of a prefill, and how."""
        if not sequence.needs_all_logits:
            return None, None
        asked = sequence.prefill_logprobs()
        return asked, InParts(rows_at_once(self._vocabulary_size), asked.take)

    def _joined(
        self,
        group: Sequence[RunningSequence],
        asked: PrefillLogprobs | None,
        logits: Tensor,
        outputs: list[StepOutput],
    ) -> list[Tensor]:
        """Let those run whose rows have joined; `asked` is of one alone."""
        if asked is not None:
            try:
                group[0].take_prefill(asked)
            except Exception as error:
                outputs.append(failed_alone(group[0], error))
                self._batch.leave(len(self._scheduler.running), clear=True)
                self._scheduler.forget()
                return []
        self._scheduler.join(group)
        return [logits]

    def _accept(self, chosen: Chosen, outputs: list[StepOutput], ahead: Ahead | None) -> None:
        """Give every row its token, and those ahead of it that were rightly proposed; rows that end leave the
        batch."""
        over: dict[int, bool] = {}
        accepted: list[StepOutput] = []
        for row, sequence in enumerate(self._scheduler.running):
            output = accept(sequence, chosen, row)
            if output.finish is not None:
                over[row] = not chosen.finite[row]
            accepted.append(output)
        if ahead is not None:
            self._accept_ahead(chosen, ahead, accepted, over)
        self._force(accepted, over)
        outputs += accepted
        if over:
            self._leave(over)

    def _accept_ahead(
        self, chosen: Chosen, ahead: Ahead, accepted: list[StepOutput], over: dict[int, bool]
    ) -> None:
        """Go on with each row as long as it chooses what was proposed to it: the logits after that are those
        of its next step. What it has not said the batch forgets."""
        running, said = self._scheduler.running, [0] * len(ahead.proposed)  # of what was proposed
        going = {row: chosen.ids[row] for row, tokens in enumerate(ahead.proposed) if tokens}
        while going := {
            row: token
            for row, token in going.items()
            if row not in over
            and said[row] < len(ahead.proposed[row])
            and token == ahead.proposed[row][said[row]]
        }:
            rows = list(going)
            count = said[rows[0]] + 1
            found = choose(ahead.after(rows, count), [running[row] for row in rows])
            self._tokens[rows] = found.tokens
            for place, row in enumerate(rows):
                said[row], going[row] = count, found.ids[place]
                accepted[row] = followed(accepted[row], accept(running[row], found, place))
                if accepted[row].finish is not None:
                    over[row] = not found.finite[place]
        self._batch.take_back(
            [len(tokens) - count for tokens, count in zip(ahead.proposed, said, strict=True)]
            + [0] * (len(running) - len(said))  # they have joined since
        )
        for sequence, tokens, count in zip(running, ahead.proposed, said, strict=False):
            if sequence.lookup is not None and tokens:
                sequence.lookup.note(len(tokens), count)
                self._counts.proposed_tokens += len(tokens)
                self._counts.accepted_tokens += count

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
            if not rows[row]:
                self._keep(row, self._scheduler.running[row])
            self._batch.leave(row, clear=rows[row])
        self._tokens = self._tokens[self._scheduler.leave(rows)]
