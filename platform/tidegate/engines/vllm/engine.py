"""The vLLM engine lets vLLM compute tokens, in a process of vLLM's own environment, and does all else itself.

Called by one thread (see `tidegate.engines.base`). The process knows token ids alone. Prompts, text, stop
strings, calls and grammars are the code of the transformers engine (`language`), tokens are chosen by its
steps and noise (`choice`): so an answer goes on from its log on any replica, whichever process began it.

    step n     turn ──> │ vLLM steps │ ──> tokens ─┬─> turn n + 2
                                                   └─> text, stop rules, outputs    while n + 1 is computed

One turn more than the one that is computed has been asked, so vLLM steps on however late this thread wakes;
who joins or leaves is told at once. A row that only its text ends (a stop string) has by then up to two
tokens more on the way, which nobody is told of. Rows with a grammar cannot be asked ahead: their next mask
depends on the token.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set

from tidegate.engines.base import EngineLoadError, LoadReport, Prepared, StepOutput
from tidegate.engines.engine_args import parse_args
from tidegate.engines.transformers.described import Described
from tidegate.engines.transformers.language import Language, failed_alone
from tidegate.engines.transformers.loading import (
    choose_context,
    choose_precision,
    closed_on_failure,
    open_checkpoint,
)
from tidegate.engines.transformers.memory import usable_cores
from tidegate.engines.transformers.prompt_pool import PromptPool
from tidegate.engines.transformers.room import USUAL_TOKENS
from tidegate.engines.transformers.scheduler import Usual
from tidegate.engines.transformers.sequence import RunningSequence
from tidegate.engines.transformers.tokenizer import load_tokenizer
from tidegate.engines.vllm.messages import Added, Load, Logprob, Stepped, Turn
from tidegate.engines.vllm.process import VllmProcess
from tidegate.messages.work import Finish, Request, Segment, Tokens
from tidegate.replica_args import EngineSpec, VllmArgs
from tidegate.sources.checkpoint import Checkpoint
from tidegate.sources.facts import kv_bytes_per_token
from tidegate.sources.gptq import loaded_weights

AHEAD = 2  # turns that have been asked: the one that vLLM computes, and the next


class Blocks:
    """Counts what rows take of vLLM's KV cache (as `room.Room` does of ours). `groups` of layers share its
    blocks: each takes its own of a row, up to so many (a window's, a state's)."""

    def __init__(self, blocks: int, groups: Sequence[tuple[int, int]]) -> None:
        self._blocks, self._groups = blocks, groups

    def of_row(self, tokens: int) -> int:
        return max(1, sum(min(most, -(-tokens // size)) for size, most in self._groups))

    def more(self, rows: Sequence[int], usual: int, /) -> int:
        return (self._blocks - sum(map(self.of_row, rows))) // self.of_row(usual)


class PrefillFound:
    """What vLLM found of the tokens that were there before the first step. See `sampling.PrefillLogprobs`."""

    def __init__(self, values: list[Logprob], ranks: list[int]) -> None:
        self.values, self.ranks = values, ranks


class VllmEngine:
    """Implements `tidegate.engines.base.Engine`."""

    gives_back = False

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._args = parse_args(spec.args, VllmArgs)
        self._numbers = itertools.count()
        self._rows: dict[int, RunningSequence] = {}
        self._by_id: dict[str, int] = {}
        # What the next turn says.
        self._added: list[Added] = []
        self._left: list[int] = []
        self._asked = 0  # turns whose answers have not been read
        self._slots = 0
        self._room: Blocks | None = None
        self._usual = Usual(USUAL_TOKENS, USUAL_TOKENS)
        self._broken: str | None = None
        self._process: VllmProcess | None = None
        self._prompts: PromptPool | None = None
        self._language: Language | None = None

    def load(self) -> LoadReport:
        with closed_on_failure(self.close):
            return self._load()

    def _load(self) -> LoadReport:
        spec = self._spec
        checkpoint = open_checkpoint(spec)
        check_generates(checkpoint)
        precision = choose_precision(checkpoint, spec)
        context_length = choose_context(checkpoint, spec)
        weights_bytes = loaded_weights(checkpoint).loaded_bytes(precision)
        self._process = VllmProcess(self._args)
        self._prompts = PromptPool(checkpoint.path, context_length, spec.chat_template)
        tokenizer = load_tokenizer(checkpoint.path, spec.chat_template)
        loaded = self._process.load(
            Load(
                path=str(checkpoint.path),
                precision=precision,
                device=spec.device,
                context_length=context_length,
                max_slots=spec.max_slots,
                kv_cache_bytes=spec.kv_cache_bytes,
                memory_cap_bytes=spec.memory_cap_bytes,
                weights_bytes=weights_bytes,
                args=self._args,
            )
        )
        self._slots = loaded.slots
        self._room = Blocks(loaded.blocks, loaded.groups)
        self._usual = Usual(min(context_length, USUAL_TOKENS), context_length)
        self._language = Language(
            Described(checkpoint.path, loaded.vocabulary_size),
            tokenizer,
            self._prompts,
            vocabulary_size=loaded.vocabulary_size,
            context_length=context_length,
            threads=self._args.threads or usable_cores(),
        )
        template_notes = self._prompts.wait_ready(loaded.vocabulary_size)
        return LoadReport(
            weights_bytes=weights_bytes,
            kv_bytes_per_token=kv_bytes_per_token(checkpoint.shape, precision),
            slots=loaded.slots,
            context_length=context_length,
            precision=precision,
            device=loaded.device,
            notes=(
                f"vLLM {loaded.version} computes; its KV cache holds {loaded.kv_tokens} tokens.",
                *self._language.notes,
                *template_notes,
            ),
        )

    def free_slots(self) -> int:
        """As many as the KV cache has room for: what waits inside vLLM, another replica cannot take. One,
        where none is here: vLLM has made sure of that."""
        free = self._slots - len(self._rows)
        if self._room is None:
            return free
        return min(free, max(not self._rows, self._usual.more(self._room, [*self._rows.values()])))

    async def prepare(self, request: Request) -> Prepared | Tokens | Finish:
        assert self._language is not None
        return await self._language.prepare(request)

    def add(self, prepared: Prepared, log: list[Segment]) -> StepOutput | None:
        assert self._language is not None
        sequence = self._language.sequence(prepared, log)
        if (ended := sequence.ended_in_log()) is not None:
            return ended
        number = next(self._numbers)
        self._rows[number] = sequence
        self._by_id[sequence.id] = number
        self._usual.note(sequence.width)
        self._added.append(added(number, sequence, prepared.limit, self._language.model_ends))
        return None

    def abort(self, request_id: str) -> None:
        if (number := self._by_id.get(request_id)) is not None:
            self._forget(number)

    def has_work(self) -> bool:
        return bool(self._rows or self._left or self._asked)

    def step(self) -> list[StepOutput]:
        try:
            return self._step()
        except Exception as error:
            self._broken = f"A step of vLLM failed: {error}."
            raise

    def health(self) -> str | None:
        if self._broken is None and self._process is not None:
            code = self._process.exit_code()
            return None if code is None else f"vLLM's process ended with {code}."
        return self._broken

    def own_metrics(self, labels: Mapping[str, str]) -> bytes:
        """See `engines.base.HasMetrics`."""
        process = self._process
        return b"" if process is None else process.metrics(labels)

    def close(self) -> None:
        self._rows, self._by_id, self._slots, self._room = {}, {}, 0, None
        self._added, self._left, self._asked = [], [], 0
        for part in (self._process, self._prompts, self._language):
            if part is not None:
                part.close()
        self._process = self._prompts = self._language = None

    def _step(self) -> list[StepOutput]:
        assert self._process is not None
        if not self._asked or ((self._added or self._left) and not self._has_grammar()):
            self._ask(self._process)
        self._ask_ahead(self._process, self._rows.keys())
        stepped = self._process.answer()
        self._asked -= 1
        self._ask_ahead(self._process, self._rows.keys() - {*stepped.ended, *stepped.failed})
        return self._accept(stepped)

    def _ask_ahead(self, process: VllmProcess, rows: Set[int]) -> None:
        """Ask for the steps that vLLM makes while the answer of this one is on its way and read, where `rows`
        go on. A grammar says what may come next only when it has the token before."""
        while rows and self._asked < AHEAD and not self._has_grammar():
            self._ask(process)

    def _has_grammar(self) -> bool:
        return any(sequence.matcher is not None for sequence in self._rows.values())

    def _ask(self, process: VllmProcess) -> None:
        bound = {number: row.matcher for number, row in self._rows.items() if row.matcher is not None}
        masks: list[tuple[int, bytes]] = []
        if bound:
            matchers = list(bound.values())
            words = matchers[0].masks.words(matchers)
            masks = [(number, mask.tobytes()) for number, mask in zip(bound, words, strict=True)]
        turn = Turn(self._added, self._left, masks)
        self._added, self._left = [], []
        process.ask(turn)
        self._asked += 1

    def _accept(self, stepped: Stepped) -> list[StepOutput]:
        """Give every row its token. Of rows that have left meanwhile nothing is wanted."""
        outputs = []
        ended = set(stepped.ended) | stepped.failed.keys()
        for number, token in zip(stepped.rows, stepped.tokens, strict=True):
            if (sequence := self._rows.get(number)) is None:
                continue
            try:
                output = accepted(sequence, number, token, stepped)
            except Exception as error:
                output = failed_alone(sequence, error)
            if output.finish is None and number in ended:
                output = sequence.fail("EngineError", "vLLM ended the answer before its end.")
            if output.finish is not None:
                self._forget(number, is_told=number not in ended)
            outputs.append(output)
        for number, message in stepped.failed.items():
            if (sequence := self._rows.get(number)) is not None:
                outputs.append(sequence.fail("GenerationFailed", f"vLLM refused it: {message}"))
                self._forget(number, is_told=False)
        return outputs

    def _forget(self, number: int, *, is_told: bool = True) -> None:
        del self._by_id[self._rows.pop(number).id]
        still_here = [one for one in self._added if one.row != number]
        if len(still_here) == len(self._added) and is_told:
            self._left.append(number)
        self._added = still_here


def added(number: int, sequence: RunningSequence, limit: int, model_ends: list[int]) -> Added:
    """Say what vLLM's process has to know of a request."""
    sampling = sequence.sampling
    most = max(sampling.top_logprobs or 0, sampling.prompt_logprobs or 0)
    return Added(
        row=number,
        salt=sequence.salt.decode(),
        prompt=sequence.prompt,
        generated=sequence.generated,
        limit=limit,
        sampling=sampling,
        end_ids=sorted(sequence.end_ids),
        bad_words=[list(word) for word in sequence.bad_words],
        prefill_logprobs=most if sequence.needs_all_logits else None,
        ruled_ends=model_ends if sequence.rules is not None else None,
        has_grammar=sequence.matcher is not None,
    )


def accepted(sequence: RunningSequence, number: int, token: int, stepped: Stepped) -> StepOutput:
    """Add a row's token; return what that lets out."""
    if (cached := stepped.cached.get(number)) is not None:
        sequence.note_cached(cached)
    if (found := stepped.prefill.get(number)) is not None:
        sequence.take_prefill(PrefillFound(*found))
    if number in stepped.not_finite:
        return sequence.fail("NumericalError", "The model's logits were not finite.")
    if sequence.generates_nothing:
        return sequence.end_without_token()
    if number in stepped.closed:
        return sequence.end_closed()
    return sequence.accept(token, stepped.logprobs.get(number))


def check_generates(checkpoint: Checkpoint) -> None:
    if checkpoint.has_encoder or checkpoint.task != "generate":
        kind = (
            "reads its prompt with an encoder" if checkpoint.has_encoder else f"is made to {checkpoint.task}"
        )
        raise EngineLoadError(
            "UnsupportedModel",
            f"The checkpoint {kind}, which vLLM does not serve: set engine.name to transformers.",
        )
