"""Simulates an engine without a model, for load tests and for tests of everything around an engine.

Tokens are a pure function of (prompt, seed, position), so a request that continues on another replica
gives the very stream that it would have given undisturbed. Time is real: an iteration of the whole batch
lasts `step_ms` from the last one, however much work lies between (deadlines, not naps), and each request
that joins adds its prefill to the step it joins.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import zlib
from typing import Annotated, Any, Literal

import msgspec
from msgspec.structs import replace

from tidegate.engines.base import EngineLoadError, LoadReport, Prepared, StepOutput
from tidegate.engines.engine_args import parse_args
from tidegate.engines.limits import completion_limit, refusal, truncated
from tidegate.engines.stop_buffer import StopBuffer
from tidegate.messages.work import (
    NO_TOKENS,
    ChatPrompt,
    Detokenize,
    Embed,
    Finish,
    Inputs,
    Request,
    Sampling,
    Score,
    Segment,
    TextPrompt,
    Tokenize,
    TokenLogprob,
    TokenPrompt,
    Tokens,
)
from tidegate.replica_args import EngineSpec

DEFAULT_CONTEXT_LENGTH = 8192
DEFAULT_SLOTS = 64
KV_BYTES_PER_TOKEN = 1024
CHARACTERS_PER_TOKEN = 4
BLOCK_TOKENS = 16  # of the prefix cache
STREAM_LENGTH = 1 << 16  # the token table; a stream begins anywhere in it
STREAM_MASK = STREAM_LENGTH - 1
SYLLABLES = ("ba", "de", "ki", "lo", "mu", "ne", "pa", "ri", "so", "tu")

Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=600_000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TEST ONLY: breaks the engine when a request whose prompt contains `marker` reaches token `at_token`.

    crash: `step` raises; hang: `step` does not return until `close`; kill: SIGKILL to the own process;
    error: the request alone ends with reason "error".
    """

    marker: Annotated[str, msgspec.Meta(min_length=1)]
    kind: Literal["crash", "hang", "kill", "error"]
    at_token: Annotated[int, msgspec.Meta(ge=0)] = 0


class SimulatedArgs(msgspec.Struct, frozen=True):
    """`EngineSpec.args` of this engine. `slots` comes from `EngineSpec.max_slots` (0: 64)."""

    prefill_ms: Milliseconds = 0.0  # per request
    prefill_ms_per_1k: Milliseconds = 0.0  # per 1,000 prompt tokens
    step_ms: Milliseconds = 20.0
    prefix_cache_tokens: Annotated[int, msgspec.Meta(ge=0)] = (
        0  # of prompts, kept; they cost no prefill again
    )
    vocab: Annotated[int, msgspec.Meta(ge=2, le=100_000)] = 1000
    words: list[str] = []  # the vocabulary itself, instead of `vocab` made-up words
    answer_tokens: Annotated[int, msgspec.Meta(ge=1)] = 64  # length of an answer without max_tokens
    load_seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    test_fault: Fault | None = None
    # TEST ONLY: as many of the requests, chosen by their ids, fail, or are answered without a token.
    test_error_share: Share = 0.0
    test_empty_share: Share = 0.0
    test_load_failure: str = ""  # TEST ONLY: `load` fails with this reason


class Row(msgspec.Struct):
    """One running request."""

    id: str
    offset: int  # where its tokens begin in the table
    position: int  # tokens generated so far
    limit: int
    limit_reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    lead: Tokens  # of the prompt: goes out with the first token
    stop: StopBuffer | None
    min_tokens: int
    top_logprobs: int | None
    fault: Fault | None
    is_plain: bool  # nothing but tokens, text and a limit


class SimulatedEngine:
    """Implements `tidegate.engines.base.Engine`."""

    gives_back = False

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._args = parse_args(spec.args, SimulatedArgs)
        self._slots = spec.max_slots or DEFAULT_SLOTS
        self._context_length = spec.context_length or DEFAULT_CONTEXT_LENGTH
        self._rows: dict[str, Row] = {}
        self._stream: list[int] = []
        self._words: list[str] = []
        self._prefill_seconds = 0.0  # of requests that joined since the last step
        self._step_due = 0.0  # monotonic time at which the last step was due
        self._prefixes = PrefixCache(self._args.prefix_cache_tokens)
        self._closed = threading.Event()
        self._broken: str | None = None

    def load(self) -> LoadReport:
        if self._args.test_load_failure:
            raise EngineLoadError(self._args.test_load_failure, "The simulated engine was told to fail.")
        self._closed.wait(self._args.load_seconds)
        self._words = list(self._args.words) or made_up_words(self._args.vocab)
        draw = random.Random(0)
        self._stream = [draw.randrange(len(self._words)) for _ in range(STREAM_LENGTH)]
        return LoadReport(
            weights_bytes=0,
            kv_bytes_per_token=KV_BYTES_PER_TOKEN,
            slots=self._slots,
            context_length=self._context_length,
            precision="simulated",
            device="cpu",
        )

    def free_slots(self) -> int:
        return self._slots - len(self._rows)

    async def prepare(self, request: Request) -> Prepared | Tokens | Finish:
        if isinstance(request.work, Embed | Score):
            return refusal("WrongTask", f"The model {request.model!r} is served to generate text.")
        work, count = request.work, self._prompt_tokens(request)
        if isinstance(work, Detokenize):
            return Tokens(text=self._prompt_text(request))
        if isinstance(work, Tokenize):
            shown = self._prompt_entries(request, count, None) if work.has_strings else []
            return Tokens(prompt_ids=self._prompt_ids(request, count), prompt_logprobs=shown)
        if isinstance(work.prompt, ChatPrompt) and work.prompt.tool_choice not in ("", "auto"):
            why = "The simulated engine calls no tools: use tool_choice auto or none."
            return refusal("InvalidPrompt", why)
        if work.sampling.grammar:
            return refusal(
                "GrammarFailed", "The simulated engine draws words at random: it follows no grammar."
            )
        kept = truncated(range(count), work.sampling, self._context_length)
        limit = completion_limit(len(kept), work, self._context_length)
        return limit if isinstance(limit, Finish) else Prepared(request, kept, limit)

    def add(self, prepared: Prepared, log: list[Segment]) -> StepOutput | None:
        request, limit = prepared.request, prepared.limit
        sampling = prepared.work.sampling
        prompt = self._prompt_text(request)
        count = len(prepared.prompt)
        limit_reason: Literal["stop", "length"] = "length"
        if sampling.max_tokens is None and not sampling.ignore_eos and self._args.answer_tokens <= limit:
            limit, limit_reason = self._args.answer_tokens, "stop"
        fault = self._args.test_fault
        row = Row(
            id=request.id,
            offset=stream_offset(prompt, sampling.seed if sampling.temperature > 0 else 0),
            position=0,
            limit=limit,
            limit_reason=limit_reason,
            prompt_tokens=count,
            cached_tokens=0,
            lead=NO_TOKENS,
            stop=StopBuffer(sampling.stop, keeps_stop=sampling.includes_stop) if sampling.stop else None,
            min_tokens=sampling.min_tokens,
            top_logprobs=sampling.top_logprobs,
            fault=fault if fault and fault.marker in prompt else None,
            is_plain=False,
        )
        if (spoilt := self._spoilt(row)) is not None:
            return StepOutput(row.id, NO_TOKENS, count, self._finish(row, spoilt))
        if not log:
            row.lead = self._lead(request, sampling, count)
        if (finished := self._continue(row, log)) is not None:
            return finished
        held = self._prefixes.take(request.tenant, prompt, count)
        row.cached_tokens = sum(segment.output.cached_tokens for segment in log) if log else held
        if held and not log:
            row.lead = replace(row.lead, cached_tokens=held)
        row.is_plain = (
            row.stop is None and row.top_logprobs is None and row.fault is None and row.lead is NO_TOKENS
        )
        computed = count - held + row.position
        self._prefill_seconds += (
            self._args.prefill_ms + self._args.prefill_ms_per_1k * computed / 1000
        ) / 1000
        self._rows[request.id] = row
        return None

    def abort(self, request_id: str) -> None:
        self._rows.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._rows)

    def step(self) -> list[StepOutput]:
        self._wait_for_step()
        stream, words = self._stream, self._words
        outputs = []
        ended = []
        for row in self._rows.values():
            if not row.is_plain:
                output = self._advance(row)
                if output.finish is not None:
                    ended.append(row.id)
                outputs.append(output)
                continue
            position = row.position
            token = stream[(row.offset + position) & STREAM_MASK]
            position += 1
            row.position = position
            finish = None
            if position >= row.limit:
                finish = self._finish(row, row.limit_reason)
                ended.append(row.id)
            outputs.append(StepOutput(row.id, Tokens([token], words[token]), row.prompt_tokens, finish))
        for request_id in ended:
            del self._rows[request_id]
        return outputs

    def health(self) -> str | None:
        return self._broken

    def close(self) -> None:
        self._closed.set()
        self._rows.clear()

    def _spoilt(self, row: Row) -> Literal["error", "stop"] | None:
        """Return the end of a request that is chosen to have no answer."""
        args, point = self._args, zlib.crc32(row.id.encode()) / (1 << 32)
        if point < args.test_error_share:
            return "error"
        return "stop" if point < args.test_error_share + args.test_empty_share else None

    def _wait_for_step(self) -> None:
        """Sleep until this step is due. A step that is late is not made up for by more than one step."""
        step_seconds = self._args.step_ms / 1000
        now = time.monotonic()
        prefill, self._prefill_seconds = self._prefill_seconds, 0.0
        # After an idle time the clock starts anew: the batch begins with this very step.
        start = self._step_due if now - self._step_due < step_seconds else now
        self._step_due = start + step_seconds + prefill
        wait = self._step_due - now
        if wait > 0:
            time.sleep(wait)

    def _advance(self, row: Row) -> StepOutput:
        """Give a row that needs more than a plain token its next one."""
        if row.fault is not None and row.position == row.fault.at_token:
            if row.fault.kind == "error":
                return StepOutput(row.id, NO_TOKENS, row.prompt_tokens, self._finish(row, "error"))
            self._break(row.fault)
        token = self._token(row)
        row.position += 1
        text = self._words[token]
        logprobs = [] if row.top_logprobs is None else [self._logprob(token, row.top_logprobs)]
        finish = None
        if row.stop is not None:
            text = row.stop.push(text, may_stop=row.position > row.min_tokens)
            if row.stop.stopped:
                finish = self._finish(row, "stop")
        if finish is None and row.position >= row.limit:
            finish = self._finish(row, row.limit_reason)
            text += row.stop.flush() if row.stop is not None else ""
        return self._behind_lead(row, [token], text, logprobs, finish)

    def _continue(self, row: Row, log: list[Segment]) -> StepOutput | None:
        """Bring `row` to where `log` ends. Returns its finished output where the log completes it."""
        for segment in log:
            for token in segment.output.token_ids:
                row.position += 1
                if row.stop is not None:
                    word = self._words[token % len(self._words)]
                    row.stop.push(word, may_stop=row.position > row.min_tokens)
        if row.stop is not None and row.stop.stopped:
            return StepOutput(row.id, NO_TOKENS, row.prompt_tokens, self._finish(row, "stop"))
        if row.position >= row.limit:
            text = row.stop.flush() if row.stop is not None else ""
            return self._behind_lead(row, [], text, [], self._finish(row, row.limit_reason))
        return None

    def _behind_lead(
        self, row: Row, tokens: list[int], text: str, logprobs: list[TokenLogprob], finish: Finish | None
    ) -> StepOutput:
        lead, row.lead = row.lead, NO_TOKENS
        output = replace(lead, token_ids=tokens, text=lead.text + text, logprobs=lead.logprobs + logprobs)
        return StepOutput(row.id, output, row.prompt_tokens, finish)

    def _finish(self, row: Row, reason: Literal["stop", "length", "error"]) -> Finish:
        is_error = reason == "error"
        return Finish(
            reason,
            code="GenerationFailed" if is_error else "",
            message="The simulated engine was told to fail this request." if is_error else "",
            prompt_tokens=row.prompt_tokens,
            completion_tokens=row.position,
            stopped_by="" if row.stop is None else row.stop.stopped_by,
            cached_tokens=row.cached_tokens,
        )

    def _break(self, fault: Fault) -> None:
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "hang":
            self._closed.wait()
        self._broken = f"The simulated engine was told to {fault.kind}."
        raise RuntimeError(self._broken)

    def _token(self, row: Row) -> int:
        return self._stream[(row.offset + row.position) & STREAM_MASK]

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        """Make up an entry, well-formed and the same each time: the chosen token is always the likeliest."""
        size = len(self._words)
        likeliest = [(token + shift) % size for shift in range(min(top, size))]
        pieces = [(other, self._words[other]) for other in likeliest]
        alternatives = [
            (other, word, -0.25 - 0.5 * rank, word.encode()) for rank, (other, word) in enumerate(pieces)
        ]
        word = self._words[token]
        return TokenLogprob(token, word, -0.25, word.encode(), alternatives)

    def _prompt_text(self, request: Request) -> str:
        match request.work.prompt:
            case ChatPrompt(messages):
                return "\n".join(f"{message.get('role')}: {content_text(message)}" for message in messages)
            case TextPrompt(text):
                return text
            case TokenPrompt(token_ids):
                return "".join(self._words[token % len(self._words)] for token in token_ids)
            case Inputs():
                raise AssertionError("prepare refuses them")

    def _prompt_tokens(self, request: Request) -> int:
        """Count exactly for token prompts; text counts one token per four characters begun."""
        if isinstance(request.work.prompt, TokenPrompt):
            return len(request.work.prompt.token_ids)
        return len(self._prompt_text(request)) // CHARACTERS_PER_TOKEN + 1

    def _lead(self, request: Request, sampling: Sampling, count: int) -> Tokens:
        """Return what the request wants to see of its prompt."""
        asked = sampling.prompt_logprobs
        if not (sampling.echo or sampling.returns_prompt_ids or asked is not None):
            return NO_TOKENS
        has_logprobs = sampling.echo and sampling.top_logprobs is not None
        return Tokens(
            text=self._prompt_text(request) if sampling.echo else "",
            logprobs=self._prompt_entries(request, count, sampling.top_logprobs) if has_logprobs else [],
            prompt_ids=self._prompt_ids(request, count) if sampling.returns_prompt_ids else [],
            prompt_logprobs=[] if asked is None else self._prompt_entries(request, count, asked),
        )

    def _prompt_ids(self, request: Request, count: int) -> list[int]:
        """Return the last `count` tokens of the prompt, made up where it is text."""
        if isinstance(request.work.prompt, TokenPrompt):
            return request.work.prompt.token_ids[-count:]
        end = stream_offset(self._prompt_text(request), 0)
        return [self._stream[(end - back) & STREAM_MASK] for back in range(count, 0, -1)]

    def _prompt_entries(self, request: Request, count: int, top: int | None) -> list[TokenLogprob]:
        """`top` None: the tokens alone."""
        ids = self._prompt_ids(request, count)
        entries = [self._logprob(token % len(self._words), top or 0) for token in ids]
        return [
            replace(entry, token_id=token, rank=1)
            if place and top is not None
            else replace(entry, token_id=token, logprob=None, top=[])
            for place, (token, entry) in enumerate(zip(ids, entries, strict=True))
        ]


class PrefixCache:
    """Which blocks of prompts an engine would hold: up to `most_tokens`, those used last."""

    def __init__(self, most_tokens: int) -> None:
        self._most_blocks = most_tokens // BLOCK_TOKENS
        self._blocks: dict[int, None] = {}  # by the hash of all up to its end; used last comes last

    def take(self, tenant: str, prompt: str, count: int) -> int:
        """Return how many of a prompt's `count` tokens are held, never all, and hold it from now on."""
        if not self._most_blocks:
            return 0
        size = BLOCK_TOKENS * CHARACTERS_PER_TOKEN
        chain, chains = hash(tenant), []
        for at in range(0, len(prompt) - size + 1, size):
            chains.append(chain := hash((chain, prompt[at : at + size])))
        held = next((n for n, each in enumerate(chains) if each not in self._blocks), len(chains))
        for each in reversed(chains):  # the end of a prompt goes before its beginning
            self._blocks.pop(each, None)
            self._blocks[each] = None
        while len(self._blocks) > self._most_blocks:
            del self._blocks[next(iter(self._blocks))]
        return min(held * BLOCK_TOKENS, count - 1)


def stream_offset(prompt: str, seed: int) -> int:
    """Return where a stream begins in the token table."""
    return zlib.crc32(prompt.encode(errors="surrogatepass"), seed & 0xFFFFFFFF) & STREAM_MASK


def made_up_words(count: int) -> list[str]:
    """Make `count` distinct pronounceable words, each with a space in front."""
    words = []
    for number in range(count):
        digits = str(number)
        words.append(" " + "".join(SYLLABLES[int(digit)] for digit in digits))
    return words


def content_text(message: dict[str, Any]) -> str:
    """Return a chat message's text: its string, or the text parts joined."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)
