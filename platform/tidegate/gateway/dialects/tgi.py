"""text-generation-inference's `POST /generate`, `POST /generate_stream` and `POST /`.

TGI serves one model, so its bodies name none. Here it is the only model that there is, or the one that the
path (`/models/{name}`, before any of these) or the body's `model` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from tidegate.errors import RequestError
from tidegate.gateway.bodies import (
    BodyReader,
    RequestBody,
    Rule,
    not_honoured,
    not_honoured_fields,
    refusal,
    refuse_not_honoured,
    says,
)
from tidegate.gateway.constraints import Constraint
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.generate import MOST_STOPS, OneAnswer
from tidegate.gateway.dialects.openai import (
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    Flag,
    Limit,
    Penalty,
    Seed,
    StopString,
    Temperature,
    all_logprobs,
    finite,
    whole_text,
)
from tidegate.gateway.dialects.tokenize import ModelOrNone
from tidegate.gateway.dialects.wire import Wire, encode, shown_message
from tidegate.gateway.sse import on_one_line
from tidegate.messages.work import Finish, Sampling, Segment, TextPrompt, TokenLogprob

DEFAULT_NEW_TOKENS = 100  # TGI's
JsonSchemaObject = Annotated[dict[str, Any], says("a JSON schema")]


class TgiError(msgspec.Struct):
    error: str
    error_type: str


_ERROR_TYPES = {401: "authentication", 403: "authentication", 429: "overloaded", 503: "overloaded"}


class TgiWire(Wire):
    error_body = TgiError

    def error(self, error: RequestError) -> bytes:
        kind = _ERROR_TYPES.get(error.status, "generation" if error.status >= 500 else "validation")
        return on_one_line(encode(TgiError(shown_message(error), kind)))


TGI: Wire = TgiWire()


class JsonGrammar(msgspec.Struct, tag="json", tag_field="type", forbid_unknown_fields=True):
    value: JsonSchemaObject


class NamedSchema(msgspec.Struct):
    """As TGI, what stands beside these two is not read (`strict`, `description`)."""

    schema: JsonSchemaObject
    name: str | None = None


class JsonSchemaGrammar(msgspec.Struct, tag="json_schema", tag_field="type", forbid_unknown_fields=True):
    value: NamedSchema


class RegexGrammar(msgspec.Struct, tag="regex", tag_field="type", forbid_unknown_fields=True):
    value: Annotated[str, Meta(min_length=1)]


def _constraint(asked: TgiParameters) -> Constraint | None:
    match asked.grammar:
        case None:
            return None
        case RegexGrammar(value=pattern):
            return Constraint("regex", pattern, "parameters.grammar.value")
        case JsonSchemaGrammar(value=named):
            return Constraint("json", named.schema, "parameters.grammar.value.schema")
        case JsonGrammar(value=schema):
            return Constraint("json", schema, "parameters.grammar.value")


class TgiParameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    do_sample: Flag = None
    max_new_tokens: Annotated[
        Limit | None,
        says(f"tokens to generate at most; left out: {DEFAULT_NEW_TOKENS}, or what the context has room for"),
    ] = None
    temperature: Annotated[Temperature | None, says("a number from 0 (greedy) to 2")] = None
    top_k: Annotated[Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None, says("0 or left out: all")] = None
    top_p: Annotated[Annotated[float, Meta(gt=0, le=1)] | None, says("a number above 0, up to 1")] = None
    repetition_penalty: Annotated[
        Annotated[float, Meta(gt=0, le=100)] | None, says("a number above 0; left out: 1")
    ] = None
    frequency_penalty: Penalty = None
    seed: Annotated[Seed | None, says("a 64-bit whole number; left out: drawn at random")] = None
    stop: Annotated[
        Annotated[list[StopString], Meta(max_length=MOST_STOPS)] | None,
        says(f"at most {MOST_STOPS} non-empty texts that end the answer"),
    ] = None
    truncate: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None,
        says("how many of the prompt's last tokens are kept"),
    ] = None
    return_full_text: Flag = None
    details: Flag = None
    decoder_input_details: Flag = None
    top_n_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None,
        says(f"alternatives of each token in the details, 0 to {MAX_TOP_LOGPROBS}"),
    ] = None
    best_of: Annotated[Any, not_honoured("one answer is made; use 1 or leave it out", 1)] = None
    typical_p: Annotated[Any, not_honoured("use top_p, or leave it out", 1, 1.0)] = None
    watermark: Annotated[Any, not_honoured("answers have none; leave it out", False)] = None
    grammar: Annotated[
        JsonGrammar | JsonSchemaGrammar | RegexGrammar | None,
        says('{"type": "json", "value": a JSON schema}, or {"type": "regex", "value": a regular expression}'),
    ] = None
    adapter_id: Annotated[Any, not_honoured("a model serves without adapters; leave it out")] = None


_NOT_HONOURED = not_honoured_fields(TgiParameters)


def _check_parameters(body: TgiBody) -> None:
    if body.parameters is not None:
        refuse_not_honoured(body.parameters, _NOT_HONOURED, "parameters.")


class TgiBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /generate`."""

    RULES: ClassVar[tuple[Rule, ...]] = (Rule(_check_parameters, {}),)

    inputs: Annotated[str, says("a text")]
    parameters: Annotated[TgiParameters | None, says("an object of parameters")] = None
    model: ModelOrNone = None


def _check_streamed(body: TgiBody) -> None:
    if body.parameters is not None and body.parameters.decoder_input_details:
        raise refusal(
            "parameters.decoder_input_details", True, "the prompt's tokens are not streamed; leave it out"
        )


def _check_either(body: TgiEitherBody) -> None:
    if body.stream:
        _check_streamed(body)


_NO_PREFILL = {
    "properties": {
        "parameters": {
            "anyOf": [
                {"type": "null"},
                {"properties": {"decoder_input_details": {"enum": [False, None]}}},
            ]
        }
    }
}


class TgiStreamBody(TgiBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /generate_stream`."""

    RULES: ClassVar[tuple[Rule, ...]] = (*TgiBody.RULES, Rule(_check_streamed, _NO_PREFILL))


class TgiEitherBody(TgiBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /`: as `/generate`, or as `/generate_stream` where `stream` is true."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        *TgiBody.RULES,
        Rule(_check_either, {"anyOf": [{"properties": {"stream": {"enum": [False, None]}}}, _NO_PREFILL]}),
    )

    stream: Flag = None


class PromptToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None  # null for the first


class GeneratedToken(msgspec.Struct):
    id: int
    text: str
    logprob: float
    special: bool


EndReason = Literal["length", "eos_token", "stop_sequence"]


class TgiDetails(msgspec.Struct):
    finish_reason: EndReason
    generated_tokens: int
    seed: int | None
    prefill: list[PromptToken]
    tokens: list[GeneratedToken]
    top_tokens: list[list[GeneratedToken]] | msgspec.UnsetType = msgspec.UNSET


class Generation(msgspec.Struct):
    generated_text: str
    details: TgiDetails | None = None


class StreamDetails(msgspec.Struct):
    finish_reason: EndReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamedToken(msgspec.Struct):
    """An event of `/generate_stream`. The last one has the whole text and the details."""

    index: int
    token: GeneratedToken
    generated_text: str | None
    details: StreamDetails | None
    top_tokens: list[GeneratedToken] | msgspec.UnsetType = msgspec.UNSET


class GenerateText:
    path = "/generate"
    task = "generate"
    id_prefix = "tgi-"
    may_stream = False
    wire = TGI
    operation_id, summary = "generate", "Continue a text, as TGI"
    body: type[RequestBody] = TgiBody
    answer: Any = Generation
    answer_description = "The continuation"
    _reader = BodyReader(TgiBody)

    def read(self, raw: bytes) -> TgiCall:
        return TgiCall(self._reader.read(raw), is_streamed=False)


class GenerateStream(GenerateText):
    path = "/generate_stream"
    may_stream = True
    operation_id, summary = "generate_stream", "Continue a text as a stream, as TGI"
    body, answer = TgiStreamBody, StreamedToken
    answer_description = "Events, each with a token"
    _streamed = BodyReader(TgiStreamBody)

    def read(self, raw: bytes) -> TgiCall:
        return TgiCall(self._streamed.read(raw), is_streamed=True)


class GenerateEither(GenerateText):
    path = "/"
    may_stream = True
    operation_id, summary = "generate_compatible", "Continue a text, as TGI and the Hugging Face Hub"
    body, answer = TgiEitherBody, list[Generation]
    answer_description = "A list of one continuation, or events where stream is true"
    _either = BodyReader(TgiEitherBody)

    def read(self, raw: bytes) -> TgiCall:
        body = self._either.read(raw)
        return TgiCall(body, is_streamed=bool(body.stream), is_listed=True)


class TgiCall(OneAnswer):
    prompt_field = "inputs"

    def __init__(self, body: TgiBody, *, is_streamed: bool, is_listed: bool = False) -> None:
        asked = body.parameters or TgiParameters()
        is_sampled = asked.do_sample or any(
            value is not None for value in (asked.temperature, asked.top_k, asked.top_p)
        )
        temperature = 1.0 if asked.temperature is None else asked.temperature
        self.top = (asked.top_n_tokens or 0) if asked.details or is_streamed else None
        self.seed = asked.seed
        self.lead = body.inputs if asked.return_full_text else ""
        self._has_details = bool(asked.details)
        self._is_listed = is_listed
        sampling = Sampling(
            seed=0,
            max_tokens=asked.max_new_tokens or DEFAULT_NEW_TOKENS,
            clips_limit=asked.max_new_tokens is None,
            temperature=temperature if is_sampled else 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=asked.top_k or 0,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            frequency_penalty=asked.frequency_penalty or 0.0,
            stop=tuple(asked.stop or ()),
            includes_stop=True,  # as TGI's answers end with what ended them
            top_logprobs=self.top,
            prompt_logprobs=0 if asked.details and asked.decoder_input_details else None,
            truncate_prompt=asked.truncate,
        )
        super().__init__(
            body.model or "",
            TextPrompt(body.inputs),
            sampling,
            seed=asked.seed,
            is_streamed=is_streamed,
            constraint=_constraint(asked),
        )

    def events(self, head: AnswerHead) -> TgiEvents:  # noqa: ARG002 - events name neither call nor model
        return TgiEvents(self)

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:  # noqa: ARG002
        segments = choices[0]
        made = Generation(self.lead + whole_text(segments))
        if self._has_details:
            entries = all_logprobs(segments)
            reason = _end_reason(segments[-1].finish)
            tokens = [_token(entry, entry.token) for entry in entries]
            if tokens and reason == "eos_token":
                tokens[-1].special = True
            made.details = TgiDetails(
                reason,
                usage.completion_tokens,
                self.seed,
                [
                    PromptToken(entry.token_id, entry.token, entry.logprob and finite(entry.logprob))
                    for segment in segments
                    for entry in segment.output.prompt_logprobs
                ],
                tokens,
                [_top(entry) for entry in entries] if self.top else msgspec.UNSET,
            )
        return encode([made] if self._is_listed else made)


class TgiEvents:
    """An event for each token. Where those of a segment do not spell its text each by itself, as parts of a
    character do not, the last of them has all of it."""

    __slots__ = ("_call", "_count", "_text")

    def __init__(self, call: TgiCall) -> None:
        self._call = call
        self._count = 0
        self._text = [call.lead]

    def render(self, index: int, segment: Segment) -> bytes:  # noqa: ARG002 - there is one choice
        output, finish = segment.output, segment.finish
        self._text.append(output.text)
        entries: Sequence[TokenLogprob] = output.logprobs
        if not entries and (output.text or finish is not None):
            entries = [TokenLogprob(output.token_ids[-1] if output.token_ids else 0, "", 0.0, b"")]
        texts = [entry.token for entry in entries]
        if "".join(texts) != output.text:
            texts = ["" for _ in entries[:-1]] + [output.text]
        out = []
        for entry, text in zip(entries, texts, strict=False):
            self._count += 1
            event = StreamedToken(self._count, _token(entry, text), None, None)
            if self._call.top:
                event.top_tokens = _top(entry)
            out.append(event)
        if finish is not None:
            reason = _end_reason(finish)
            last = out[-1]
            last.token.special = reason == "eos_token" and not last.token.text
            last.generated_text = "".join(self._text)
            used = (finish.completion_tokens, self._call.seed, finish.prompt_tokens)
            last.details = StreamDetails(reason, *used)
        return b"".join([b"data:%b\n\n" % on_one_line(encode(event)) for event in out])

    def end(self, usage: Usage) -> bytes:  # noqa: ARG002 - the last token had it
        return b""


def _token(entry: TokenLogprob, text: str) -> GeneratedToken:
    return GeneratedToken(entry.token_id, text, finite(entry.logprob), special=False)


def _top(entry: TokenLogprob) -> list[GeneratedToken]:
    return [GeneratedToken(token, text, finite(value), special=False) for token, text, value, _ in entry.top]


def _end_reason(finish: Finish | None) -> EndReason:
    if finish is not None and finish.reason == "length":
        return "length"
    return "stop_sequence" if finish is not None and finish.stopped_by else "eos_token"
