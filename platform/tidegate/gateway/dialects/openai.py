"""OpenAI's two text endpoints share this: sampling fields, the parts of a call, chunks, logprobs.

Every field of OpenAI's schema is declared, here or in the endpoint's own module, in one of three groups:

- honoured: acts;
- advisory: taken and not acted on (`metadata`, `store: false`, ...);
- not honoured: refused unless null or a value that means the same as leaving it out.

A field that is in none of them is unknown and refused by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from tidegate.gateway.bodies import RequestBody, Rule, documented, needs, not_honoured, refusal, says
from tidegate.gateway.constraints import Constraint
from tidegate.gateway.dialects.base import AnswerHead, Ask, Usage
from tidegate.gateway.dialects.generate import generate_asks
from tidegate.gateway.dialects.structured import (
    Choices as AnswerChoices,
)
from tidegate.gateway.dialects.structured import (
    ResponseFormat,
    Schema,
    StructuredOutputs,
    Text,
    constraint_of,
)
from tidegate.gateway.sse import DONE, text_json
from tidegate.messages.work import MODEL_DEFAULTS, Finish, Generate, Prompt, Sampling, Segment, TokenLogprob

MAX_CHOICES = 128
MAX_STOP = 4
MAX_NAMED_TOKENS = 1024
MAX_STOP_TOKENS = 256
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 1 << 24
MAX_TOKEN_ID = (1 << 31) - 1
INT64 = 1 << 63
UNLIKELY_LOGPROB = -9999.0  # what OpenAI sends for "very unlikely"; JSON has no infinity

Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seed = Annotated[int, Meta(ge=-INT64, le=INT64 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Meta(max_length=MAX_STOP)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
VocabularyId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
LogitBias = Annotated[dict[VocabularyId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
_LOGIT_BIAS = {
    "type": "object",
    "maxProperties": 1024,
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
BadWord = Annotated[str, Meta(min_length=1, max_length=256)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Limit = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Flag = Annotated[bool | None, says("true or false")]
Penalty = Annotated[Annotated[float, Meta(ge=-2, le=2)] | None, says("a number from -2 to 2; left out: 0")]
Advisory = Annotated[
    Annotated[str, Meta(max_length=1024)] | None,
    says("a text of at most 1024 characters (advisory: not acted on)"),
]
FinishReason = Literal["stop", "length"]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers that nobody reads: none is sent
    continuous_usage_stats: bool | None = None


def _check_streaming(body: TextBody) -> None:
    needs("stream_options", "stream").check(body)
    if body.prompt_logprobs is not None and body.stream:
        raise refusal("prompt_logprobs", body.prompt_logprobs, "they are not streamed; use stream: false")


def _check_truncation(body: TextBody) -> None:
    if body.truncate_prompt_tokens == 0:
        raise refusal("truncate_prompt_tokens", 0, f"send {TRUNCATE}")


TRUNCATE = "how many of the prompt's last tokens are kept, 1 or more; -1: as many as the context holds"
_STREAMED_OR_NOT = Rule(
    _check_streaming,
    {
        "anyOf": [
            {
                "properties": {"stream": {"const": True}, "prompt_logprobs": {"type": "null"}},
                "required": ["stream"],
            },
            {"properties": {"stream": {"enum": [False, None]}, "stream_options": {"type": "null"}}},
        ]
    },
)
_KEEPS_SOMETHING = Rule(_check_truncation, {})


class TextBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """Chat completions and completions share these fields."""

    RULES: ClassVar[tuple[Rule, ...]] = (_STREAMED_OR_NOT, _KEEPS_SOMETHING)

    model: Annotated[
        str, Meta(min_length=1, max_length=256, description="the name of a model that GET /v1/models lists")
    ]
    stream: Flag = None
    stream_options: Annotated[
        StreamOptions | None, says('{"include_usage": true} together with stream: true')
    ] = None
    n: Annotated[Choices | None, says(f"a whole number from 1 to {MAX_CHOICES}")] = None
    temperature: Annotated[Temperature | None, says("a number from 0 (greedy) to 2; left out: 1")] = None
    top_p: Annotated[Share | None, says("a number from 0 to 1; left out: 1")] = None
    seed: Annotated[
        Seed | None,
        says("a 64-bit whole number; choice k of a prompt uses seed + k; left out: drawn at random"),
    ] = None
    stop: Annotated[
        StopString | StopStrings | None, says(f"a non-empty text, or a list of at most {MAX_STOP} of them")
    ] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    user: Annotated[
        Annotated[str, Meta(max_length=1024)] | None,
        says(
            "a text of at most 1024 characters: while a model changes, one user's calls stay on one revision"
        ),
    ] = None
    metadata: Annotated[Metadata | None, says("at most 16 pairs of texts (advisory: not acted on)")] = None
    safety_identifier: Advisory = None
    prompt_cache_key: Advisory = None
    store: Annotated[Any, not_honoured("answers are not stored; use false or leave it out", False)] = None
    service_tier: Annotated[
        Any, not_honoured("there is one tier; use auto or leave it out", "auto", "default")
    ] = None
    logit_bias: Annotated[
        LogitBias | None,
        documented(
            "at most 1024 token ids, each with a number from -100 to 100 that is added to its logit",
            {"anyOf": [{"type": "null"}, _LOGIT_BIAS]},
        ),
    ] = None
    response_format: Annotated[
        ResponseFormat | None,
        says('{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": ...}'),
    ] = None
    # The fields below are vLLM's.
    structured_outputs: Annotated[
        StructuredOutputs | None, says("one of json, regex, choice, grammar and json_object")
    ] = None
    guided_json: Annotated[
        Schema | str | None,
        documented(
            "a JSON schema, as structured_outputs.json", {"type": ["object", "boolean", "string", "null"]}
        ),
    ] = None
    guided_regex: Annotated[Text | None, says("a regular expression, as structured_outputs.regex")] = None
    guided_choice: Annotated[AnswerChoices | None, says("a list of texts, as structured_outputs.choice")] = (
        None
    )
    guided_grammar: Annotated[Text | None, says("a grammar, as structured_outputs.grammar")] = None
    guided_whitespace_pattern: Annotated[
        Text | None, says("a regular expression, as structured_outputs.whitespace_pattern")
    ] = None
    guided_decoding_backend: Advisory = None
    top_k: Annotated[
        Annotated[int, Meta(ge=-1, le=MAX_TOKEN_ID)] | None,
        says("the likeliest tokens to choose among, a whole number; -1, 0 or left out: all"),
    ] = None
    min_p: Annotated[
        Share | None, says("the least probability of a token against the likeliest, from 0 to 1; left out: 0")
    ] = None
    repetition_penalty: Annotated[
        Annotated[float, Meta(gt=0, le=100)] | None,
        says("a number above 0, over prompt and answer; above 1 makes repetition less likely; left out: 1"),
    ] = None
    min_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None,
        says("tokens before an end token, one of stop_token_ids or a stop string may end the answer"),
    ] = None
    ignore_eos: Flag = None
    stop_token_ids: Annotated[
        Annotated[list[VocabularyId], Meta(max_length=MAX_STOP_TOKENS)] | None,
        says(f"at most {MAX_STOP_TOKENS} token ids that end the answer; they are not part of its text"),
    ] = None
    include_stop_str_in_output: Flag = None
    skip_special_tokens: Flag = None
    spaces_between_special_tokens: Flag = None
    add_special_tokens: Flag = None
    prompt_logprobs: Annotated[
        TopLogprobs | None,
        says(f"alternatives for each token of the prompt, a whole number from 0 to {MAX_TOP_LOGPROBS}"),
    ] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | None,
        documented(
            TRUNCATE,
            {
                "anyOf": [
                    {"enum": [-1, None]},
                    {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
                ]
            },
        ),
    ] = None
    return_token_ids: Flag = None
    return_tokens_as_token_ids: Flag = None
    allowed_token_ids: Annotated[
        Annotated[list[VocabularyId], Meta(min_length=1, max_length=MAX_NAMED_TOKENS)] | None,
        says(f"1 to {MAX_NAMED_TOKENS} token ids, the only ones to choose among"),
    ] = None
    bad_words: Annotated[
        Annotated[list[BadWord], Meta(max_length=128)] | None,
        says("at most 128 texts of 1 to 256 characters that the answer must not contain"),
    ] = None
    request_id: Advisory = None
    session_id: Advisory = None
    cache_salt: Advisory = None
    use_beam_search: Annotated[
        Any, not_honoured("beam search is not supported; use n and temperature", False)
    ] = None
    length_penalty: Annotated[Any, not_honoured("beam search is not supported; leave it out", 1, 1.0)] = None
    early_stopping: Annotated[Any, not_honoured("beam search is not supported; leave it out", False)] = None
    truncation_side: Annotated[
        Any, not_honoured("a prompt's last tokens are kept; use left or leave it out", "left")
    ] = None
    detokenize: Annotated[Any, not_honoured("answers are text; see return_token_ids", True)] = None
    priority: Annotated[Any, not_honoured("calls wait in the order they come; use 0 or leave it out", 0)] = (
        None
    )


class TextCall(ABC):
    """A call of either endpoint. `top_logprobs`: alternatives per token; None: no logprobs."""

    __slots__ = (
        "_prompts",
        "_sampling",
        "_seed",
        "constraint",
        "is_streamed",
        "model",
        "n",
        "schemas",
        "shown",
        "top_logprobs",
        "user",
    )
    answer_type: ClassVar[Callable[..., msgspec.Struct]]
    answer_object: ClassVar[str]
    has_one_prompt: ClassVar[bool]  # which the whole answer shows; otherwise each choice its own

    def __init__(
        self,
        body: TextBody,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int | None,
        top_logprobs: int | None,
        echo: bool = False,
        is_ranked: bool = False,
    ) -> None:
        stop, options = body.stop, body.stream_options
        self.model = body.model
        self.n = body.n or 1
        self.constraint = constraint_of(body)
        self.schemas: Sequence[Constraint] = ()
        self.is_streamed = bool(body.stream)
        self.user = body.user or ""
        has_usage = options is not None and bool(options.include_usage)
        self.shown = Shown(
            has_usage,
            has_running_usage=has_usage and options is not None and bool(options.continuous_usage_stats),
            has_token_ids=bool(body.return_token_ids),
            has_id_names=bool(body.return_tokens_as_token_ids),
        )
        self.top_logprobs = top_logprobs
        self._prompts = prompts
        self._seed = body.seed
        self._sampling = Sampling(
            seed=0,  # each sequence gets its own
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            stop=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            top_logprobs=0 if is_ranked and top_logprobs is None else top_logprobs,
            echo=echo,
            ignore_eos=bool(body.ignore_eos),
            top_k=max(body.top_k or 0, 0),
            min_p=body.min_p or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logit_bias=tuple((body.logit_bias or {}).items()),
            includes_stop=bool(body.include_stop_str_in_output),
            skips_special=body.skip_special_tokens is not False,
            prompt_logprobs=body.prompt_logprobs,
            returns_prompt_ids=self.shown.has_token_ids,
            allowed_token_ids=tuple(body.allowed_token_ids or ()),
            bad_words=tuple(body.bad_words or ()),
            truncate_prompt=body.truncate_prompt_tokens,
            left_out=tuple(name for name in MODEL_DEFAULTS if getattr(body, name) is None),
        )

    def follow(self, grammar: str) -> None:
        self._sampling = replace(self._sampling, grammar=grammar)

    def asks(self, random_seed: int) -> list[Ask]:
        # The prompts may be large, and the call lives as long as its answer.
        prompts, self._prompts = self._prompts, ()
        asks = generate_asks(prompts, self.n, self._sampling, self._seed, random_seed)
        return [asks[0], *map(_without_prompt, asks[1:])] if self.has_one_prompt else asks

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        made = [self.choice(index, segments) for index, segments in enumerate(choices)]
        about = (head.call_id, self.answer_object, head.created, head.model)
        more = self.prompt_parts(choices[0]) if self.has_one_prompt else {}
        return encode(self.answer_type(*about, made, usage, head.revision, **more))

    def prompt_parts(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """The prompt's tokens and log probabilities, where asked for."""
        parts: dict[str, Any] = {}
        if self.shown.has_token_ids:
            parts["prompt_token_ids"] = [token for segment in segments for token in segment.output.prompt_ids]
        if self._sampling.prompt_logprobs is not None:
            entries = [entry for segment in segments for entry in segment.output.prompt_logprobs]
            parts["prompt_logprobs"] = [prompt_logprobs(entry) for entry in entries]
        return parts

    def token_ids(self, segments: Sequence[Segment]) -> dict[str, list[int]]:
        if not self.shown.has_token_ids:
            return {}
        return {"token_ids": [token for segment in segments for token in segment.output.token_ids]}

    @abstractmethod
    def choice(self, index: int, segments: Sequence[Segment]) -> msgspec.Struct: ...


def _without_prompt(ask: Ask) -> Ask:
    """A prompt that all choices share is shown by the first."""
    work = ask.work
    if not isinstance(work, Generate) or work.sampling.prompt_logprobs is None:
        return ask
    return ask._replace(work=replace(work, sampling=replace(work.sampling, prompt_logprobs=None)))


class Shown(NamedTuple):
    """What a call wants to see besides its text."""

    has_usage: bool = False
    has_running_usage: bool = False  # in each chunk
    has_token_ids: bool = False
    has_id_names: bool = False  # log probabilities name tokens by their ids

    def entries(self, tokens: Iterable[TokenLogprob]) -> Iterable[TokenLogprob]:
        return map(_named_by_id, tokens) if self.has_id_names else tokens


def _named_by_id(token: TokenLogprob) -> TokenLogprob:
    top = [(other, f"token_id:{other}", value, raw) for other, _, value, raw in token.top]
    return replace(token, token=f"token_id:{token.token_id}", top=top)


class Chunks:
    """The events of one answer, each a chunk as JSON.

    Everything that stays the same over a stream is joined once; a token costs one JSON escape and one join.
    """

    __slots__ = ("_head", "_shown", "_tail", "_used")

    def __init__(self, head: AnswerHead, kind: bytes, shown: Shown) -> None:
        self._shown = shown
        self._used: dict[int, tuple[int, int]] = {}  # prompt and completion tokens of each choice
        self._head = (
            b'data: {"id":"%b","object":"%b","created":%d,"model":%b,"system_fingerprint":%b,"choices":['
            % (head.call_id.encode(), kind, head.created, text_json(head.model), text_json(head.revision))
        )
        self._tail = b',"usage":null}\n\n' if shown.has_usage else b"}\n\n"

    def count(self, index: int, segment: Segment) -> None:
        """Take up what a segment used, before its chunks are made: for `has_running_usage` alone."""
        prompt, completion = self._used.get(index, (0, 0))
        prompt, completion = prompt or segment.prompt_tokens, completion + len(segment.output.token_ids)
        self._used[index] = prompt, completion
        self._tail = b',"usage":%b}\n\n' % encode(Usage(prompt, completion, prompt + completion))

    def token_ids(self, token_ids: Sequence[int], name: bytes = b"token_ids") -> bytes:
        """A field of a choice; empty where there are none."""
        return b',"%b":%b' % (name, encode(token_ids)) if token_ids else b""

    def chunk(self, choice: bytes, more: bytes = b"") -> bytes:
        return b"%b%b]%b%b" % (self._head, choice, more, self._tail)

    def end(self, usage: Usage) -> bytes:
        if not self._shown.has_usage:
            return DONE
        return b'%b],"usage":%b}\n\n%b' % (self._head, encode(usage), DONE)


class PromptLogprob(msgspec.Struct):
    """One of the tokens that may stand at a place of the prompt. The likeliest has rank 1."""

    logprob: float
    rank: int
    decoded_token: str


# By token id; null for the first token.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


def prompt_logprobs(token: TokenLogprob) -> dict[str, PromptLogprob] | None:
    if token.logprob is None:
        return None
    found = {
        str(other): PromptLogprob(finite(value), place, text)
        for place, (other, text, value, _) in enumerate(token.top, 1)
    }
    found[str(token.token_id)] = PromptLogprob(finite(token.logprob), token.rank, token.token)
    return found


encode = msgspec.json.Encoder().encode


def whole_text(segments: Sequence[Segment]) -> str:
    return "".join([segment.output.text for segment in segments])


def all_logprobs(segments: Sequence[Segment]) -> list[TokenLogprob]:
    return [token for segment in segments for token in segment.output.logprobs]


def finish_reason(finish: Finish | None) -> FinishReason:
    return "length" if finish is not None and finish.reason == "length" else "stop"


def finite(logprob: float | None) -> float:
    """JSON holds neither infinity nor NaN."""
    if logprob is None or math.isnan(logprob):
        return UNLIKELY_LOGPROB
    return max(logprob, UNLIKELY_LOGPROB)
