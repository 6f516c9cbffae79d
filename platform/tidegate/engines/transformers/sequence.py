"""A running request knows what it has said so far and when it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

from msgspec.structs import replace
from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from tidegate.engines.base import Prepared, StepOutput
from tidegate.engines.output_buffer import OutputBuffer
from tidegate.engines.transformers.generation_rules import Rules
from tidegate.engines.transformers.grammars import Matcher
from tidegate.engines.transformers.logit_steps import FREE, RULING_OUT, needed_steps
from tidegate.engines.transformers.logprobs import LogprobOf, PrefillLogprobs
from tidegate.engines.transformers.lookup import Lookup
from tidegate.engines.transformers.responses import (
    AnswerFormats,
    ResponseReader,
    delimiters,
    reading_template,
)
from tidegate.engines.transformers.vocabulary import Vocabulary
from tidegate.messages.prefixes import prefix_salt
from tidegate.messages.work import (
    NO_TOKENS,
    ChatPrompt,
    Finish,
    Segment,
    TextPrompt,
    TokenLogprob,
    Tokens,
)


class Found(Protocol):
    """Log probabilities of all tokens but the first, as `PrefillLogprobs` has them."""

    values: list[LogprobOf]
    ranks: list[int]


class RunningSequence:
    """Holds the state of one request beside its KV cache; all of it can be rebuilt from the log."""

    def __init__(
        self,
        prepared: Prepared,
        log: Sequence[Segment],
        *,
        end_ids: Collection[int],
        vocabulary: Vocabulary,
        rules: Rules | None = None,
        response: AnswerFormats | None = None,
        matcher: Matcher | None = None,
        forces_end: bool = False,
        start: Sequence[int] | None = None,
    ) -> None:
        """`response`: how the model's answers are read. `forces_end`: the rules make the last token that the
        limit allows an end token. `start`: the tokens that the decoder starts every answer from, where an
        encoder reads the prompt."""
        request = prepared.request
        self.id = request.id
        self.age = (request.created, request.id)
        self.salt = prefix_salt(request.tenant)
        # Of the prompt, that were not computed. What a request's own earlier attempt has left does not count.
        self._goes_on = bool(log)
        self._cached_tokens = sum(segment.output.cached_tokens for segment in log)
        self._tells_cached = False
        self.source = [] if start is None else list(prepared.prompt)  # what an encoder reads
        self.prompt = list(prepared.prompt if start is None else start)  # what the decoder goes on from
        self._prompt_tokens = len(prepared.prompt)
        self._forces_end = forces_end
        self.generated = [token for segment in log for token in segment.output.token_ids]
        self.sampling = prepared.work.sampling
        self.bad_words = prepared.bad_words
        self._from = prepared.work.prompt
        self._begun = prepared.begun
        self._template = self._reading_template(response)
        self._limit = prepared.limit
        self._end_ids = {*(() if self.sampling.ignore_eos else end_ids), *self.sampling.stop_token_ids}
        self.rules = rules
        self.matcher = matcher
        self._vocabulary = vocabulary
        self._lead_text = self._echoed() if self.sampling.echo and not log else ""
        self._lead_logprobs: list[TokenLogprob] = []
        self._shows_prompt = self.sampling.returns_prompt_ids and not log
        self._prompt_logprobs: list[TokenLogprob] = []
        self._begin_answer()
        for place, token in enumerate(self.generated):
            self._replay(token, place)
        self.steps = needed_steps(self)
        if matcher is not None:
            matcher.begin(self.generated, may_force=not self.steps.keys() & RULING_OUT)
        self.unfed = 0  # tokens that the KV cache has not seen; none before the prefill, which takes all
        self.lookup: Lookup | None = None  # None: nothing is proposed

    @property
    def tokens(self) -> list[int]:
        """Return the tokens that have to be in the KV cache before the next one."""
        return self.prompt + self.generated

    @property
    def end_ids(self) -> Collection[int]:
        """Return the tokens that end this request."""
        return self._end_ids

    @property
    def length(self) -> int:
        return len(self.source) + len(self.prompt) + len(self.generated)

    @property
    def width(self) -> int:
        """Count the tokens for which it takes room in the KV cache before the next one."""
        return max(len(self.source), len(self.prompt) + len(self.generated))

    @property
    def widest(self) -> int:
        return max(len(self.source), len(self.prompt) + self._limit)

    @property
    def needs_all_logits(self) -> bool:
        """True where log probabilities of prompt tokens, or of logged tokens held back, are due."""
        return self._tells_prompt or self._tells_answer

    @property
    def _tells_prompt(self) -> bool:
        return self.sampling.prompt_logprobs is not None and not self.generated

    @property
    def _tells_answer(self) -> bool:
        return self.sampling.top_logprobs is not None and (bool(self.generated) or self.sampling.echo)

    @property
    def generates_nothing(self) -> bool:
        """True for max_tokens 0: only the prompt's echo was asked for."""
        return self._limit == 0

    def ended_in_log(self) -> StepOutput | None:
        """Return the finished output where the log already completes the request."""
        finish = self._finish_after(self.generated[-1]) if self.generated else None
        if finish is None and self.generates_nothing and not self.needs_all_logits:
            finish = self._finish("length")
        return self._output([], "", [], finish) if finish is not None else None

    def prefill_logprobs(self) -> PrefillLogprobs:
        """Return what collects the log probabilities that are due after the prefill."""
        sampling = self.sampling
        return PrefillLogprobs(self.tokens, max(sampling.top_logprobs or 0, sampling.prompt_logprobs or 0))

    def take_prefill(self, found: Found) -> None:
        """Fill in the log probabilities that were collected."""
        if self._tells_prompt:
            entries = self._entries(found, self.sampling.prompt_logprobs)
            ranked = [replace(entry, rank=rank) for entry, rank in zip(entries, found.ranks, strict=True)]
            self._prompt_logprobs = [self._first_entry(), *ranked]
        if not self._tells_answer:
            return
        entries = self._entries(found, self.sampling.top_logprobs)
        prompt_length = len(self.prompt)
        if self._lead_text or (self.sampling.echo and not self.generated):
            lead = [self._first_entry(), *entries[: prompt_length - 1]]
            if b"".join([entry.raw for entry in lead]).decode(errors="replace") == " " + self._lead_text:
                first = next(place for place, entry in enumerate(lead) if entry.raw)
                lead[first] = without_first_space(lead[first])
            self._lead_logprobs = lead
        self._begin_answer()
        for place, entry in enumerate(entries[prompt_length - 1 :]):
            self._replay(self.generated[place], place, entry)

    def accept(self, token: int, logprob: LogprobOf | None) -> StepOutput:
        """Add a chosen token; return what that lets out, and the finish if it is the last."""
        entry = None if logprob is None else self._entry(token, *logprob)
        text, entries = self._push(token, len(self.generated), entry)
        self.generated.append(token)
        self.unfed = 1
        if self.lookup is not None:
            self.lookup.add(token)
        if self.matcher is not None and not self.matcher.consume(token):
            return self.fail("GrammarFailed", f"The grammar cannot go on: {self.matcher.error}")
        return self._output([token], text, entries, self._finish_after(token))

    def note_cached(self, tokens: int) -> None:
        """Take up how many of its first tokens the engine holds."""
        if not self._goes_on:
            self._cached_tokens = min(tokens, len(self.prompt))
            self._tells_cached = self._cached_tokens > 0

    @property
    def forced(self) -> Sequence[int]:
        """Return the tokens that may be added without the model's logits before them."""
        return () if self.matcher is None or self.sampling.top_logprobs is not None else self.matcher.forced

    def accept_forced(self, most: int, output: StepOutput) -> StepOutput:
        """Add up to `most` of the forced tokens to what a step put out."""
        for count, token in enumerate(self.forced[:most], 2):
            output = followed(output, self.accept(token, None))
            self.unfed = count
            if output.finish is not None:
                break
        return output

    @property
    def is_free(self) -> bool:
        """True where the token after next can be chosen before the next one is known, and will be wanted
        unless that one ends it."""
        is_plain = self.matcher is None and self.lookup is None and self.steps.keys() <= FREE
        return is_plain and self.unfed == 1 and len(self.generated) + 1 < self._limit

    def proposed(self, most: int) -> list[int]:
        """Return what it may say next beyond the next token, as far as its limit lets it."""
        if self.lookup is None or self.unfed != 1:
            return []
        most = min(most, self._limit - len(self.generated) - 1)
        return self.lookup.propose(most) if most > 0 else []

    def tail(self, length: int) -> list[int]:
        """Return the row's last tokens."""
        own = self.generated[-length:]
        return own if len(own) == length else self.prompt[len(own) - length :] + own

    def given_back(self) -> StepOutput:
        """Let it go on elsewhere, or here later, from what it has said."""
        return StepOutput(self.id, NO_TOKENS, self._prompt_tokens, None, is_given_back=True)

    def end_without_token(self) -> StepOutput:
        """Finish a request that generates nothing."""
        return self._output([], "", [], self._finish("length"))

    def end_closed(self) -> StepOutput:
        """Finish a request whose parameters leave no token."""
        if self.matcher is not None and self.matcher.error:  # it met a limit over its mask
            return self.fail("GrammarFailed", f"The grammar cannot go on: {self.matcher.fail()}")
        if self.matcher is None:
            return self.fail(
                "NoTokenAllowed",
                f"After {len(self.generated)} tokens none of allowed_token_ids is left: bad_words, the "
                "model's own rules or min_tokens (which rules out tokens that end an answer) leave none.",
            )
        return self.fail(
            "GrammarFailed",
            f"After {len(self.generated)} tokens there is none that the grammar allows and that the other "
            "fields (allowed_token_ids, bad_words, logit_bias, min_tokens) do not rule out.",
        )

    def fail(self, code: str, message: str) -> StepOutput:
        finish = Finish(
            "error",
            code=code,
            message=message,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(self.generated),
            cached_tokens=self._cached_tokens,
        )
        return StepOutput(self.id, NO_TOKENS, self._prompt_tokens, finish)

    def _begin_answer(self) -> None:
        is_chat = isinstance(self._from, ChatPrompt) and not self._from.continue_final_message
        is_new = is_chat or bool(self.source)
        is_first_text = is_new or self._vocabulary.is_silent(self.prompt)
        self._detokenizer = self._vocabulary.detokenizer(
            strip_first_space=is_first_text,
            after=() if is_new else self.prompt,
            skips_special=self.sampling.skips_special,
            keeps=self._named_tokens(),
        )
        self._reader = self._new_reader()
        self._has_silent_space = is_first_text and self._vocabulary.has_silent_space
        self._answer = OutputBuffer(self.sampling.stop, keeps_stop=self.sampling.includes_stop)

    def _reading_template(self, response: AnswerFormats | None) -> ResponseTemplate | None:
        if not isinstance(self._from, ChatPrompt):
            return None
        form = response.of(self._from) if response is not None else None
        return form and reading_template(form.response_template, has_tools=bool(self._from.tools))

    def _named_tokens(self) -> Collection[int]:
        """Return the special tokens by which the parts of an answer are told apart."""
        return () if self._template is None else self._vocabulary.named_in(delimiters(self._template))

    def _new_reader(self) -> ResponseReader | None:
        if self._template is None or not isinstance(self._from, ChatPrompt):
            return None
        return ResponseReader(self._template, self._begun, self._from.tools, self.id)

    def _replay(self, token: int, place: int, entry: TokenLogprob | None = None) -> None:
        """Take up a token whose text is out already."""
        text, _ = self._push(token, place, entry)
        if self._reader is not None:
            self._reader.push(text)

    def _push(
        self, token: int, place: int, entry: TokenLogprob | None = None
    ) -> tuple[str, list[TokenLogprob]]:
        """Add the token at `place` to the answer. One that ends it has no text where that was not asked for,
        but counts and has its entry."""
        is_hidden = token in self._end_ids and not self.sampling.includes_stop
        piece = "" if is_hidden else self._detokenizer.push(token)
        if entry is not None and entry.raw and self._has_silent_space:
            self._has_silent_space = False
            entry = without_first_space(entry)
        return self._answer.push(piece, entry, may_stop=place >= self.sampling.min_tokens)

    def _finish_after(self, token: int) -> Finish | None:
        is_full = len(self.generated) >= self._limit
        is_end = token in self._end_ids and not (is_full and self._forces_end)
        is_complete = self.matcher is not None and self.matcher.is_complete
        if self._answer.stopped or is_end or is_complete:
            return self._finish("stop")
        return self._finish("length") if is_full else None

    def _finish(self, reason: Literal["stop", "length"]) -> Finish:
        return Finish(
            reason,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(self.generated),
            stopped_by=self._answer.stopped_by,
            cached_tokens=self._cached_tokens,
        )

    def _output(
        self, tokens: list[int], text: str, entries: list[TokenLogprob], finish: Finish | None
    ) -> StepOutput:
        if finish is not None and not self._answer.stopped:
            rest, held = self._answer.flush()
            text, entries = text + rest, [*entries, *held]
        if self._lead_text or self._lead_logprobs:
            text, self._lead_text = self._lead_text + text, ""
            entries, self._lead_logprobs = [*self._lead_logprobs, *entries], []
        output = Tokens(tokens, text, entries)
        if self._shows_prompt or self._prompt_logprobs:
            ids = (self.source or self.prompt) if self._shows_prompt else []
            output = Tokens(tokens, text, entries, ids, self._prompt_logprobs)
            self._shows_prompt, self._prompt_logprobs = False, []
        if self._tells_cached:
            output, self._tells_cached = replace(output, cached_tokens=self._cached_tokens), False
        if self._reader is not None:
            output = self._split(self._reader, output, is_last=finish is not None)
        return StepOutput(self.id, output, self._prompt_tokens, finish)

    def _split(self, reader: ResponseReader, output: Tokens, *, is_last: bool) -> Tokens:
        parts = [reader.push(output.text), *([reader.finish()] if is_last else [])]
        return replace(
            output,
            text="".join([part.text for part in parts]),
            reasoning="".join([part.reasoning for part in parts]),
            calls=[call for part in parts for call in part.calls],
        )

    def _first_entry(self) -> TokenLogprob:
        """Return the entry of the prompt's first token, which follows nothing."""
        text, raw = self._shown(self.prompt[0])
        return TokenLogprob(self.prompt[0], text, None, raw)

    def _entries(self, found: Found, top: int | None) -> list[TokenLogprob]:
        return [
            self._entry(token, logprob, likeliest[:top], theirs[:top])
            for token, (logprob, likeliest, theirs) in zip(self.tokens[1:], found.values, strict=True)
        ]

    def _shown(self, token: int) -> tuple[str, bytes]:
        return self._vocabulary.shown(token, skips_special=self.sampling.skips_special)

    def _entry(self, token: int, logprob: float, likeliest: list[int], theirs: list[float]) -> TokenLogprob:
        (text, *texts), (raw, *raws) = self._vocabulary.shown_columns(
            [token, *likeliest], skips_special=self.sampling.skips_special
        )
        return TokenLogprob(token, text, logprob, raw, list(zip(likeliest, texts, theirs, raws, strict=True)))

    def _echoed(self) -> str:
        if isinstance(self._from, TextPrompt) and self.sampling.truncate_prompt is None:
            return self._from.text
        detokenizer = self._vocabulary.detokenizer(
            strip_first_space=True, skips_special=self.sampling.skips_special
        )
        return "".join(map(detokenizer.push, self.prompt))


def without_first_space(entry: TokenLogprob) -> TokenLogprob:
    """Leave out the space that the text does not show, so that the bytes of all tokens are the text's."""
    return replace(entry, raw=entry.raw.removeprefix(b" "))


def followed(first: StepOutput, more: StepOutput) -> StepOutput:
    """Return both tokens' outputs as one."""
    return StepOutput(first.request_id, joined(first.output, more.output), more.prompt_tokens, more.finish)


def joined(first: Tokens, more: Tokens) -> Tokens:
    """Put what the same step's next token lets out behind what came before it."""
    return replace(
        first,
        token_ids=[*first.token_ids, *more.token_ids],
        text=first.text + more.text,
        logprobs=[*first.logprobs, *more.logprobs],
        reasoning=first.reasoning + more.reasoning,
        calls=[*first.calls, *more.calls],
    )
